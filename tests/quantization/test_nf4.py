"""NF4 and FP4 against bitsandbytes on the CPU, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.exact_division import _mended_reciprocal
from pronghorn.pallas_kernels.launch import kernels
from pronghorn.quantization.nf4 import NF4Array, empty_like_4bit, quantize_4bit
from pronghorn.quantization.tables import CODE_TABLES, DYNAMIC_SIGNED, DYNAMIC_UNSIGNED
from tests.quantization import reference
from tests.tolerances import assert_close

WHERE = {"host": np.asarray, "device": jnp.asarray}


def from_bitsandbytes(codes, state) -> NF4Array:
    nested = {}
    if state.nested:
        nested = {
            "nested_absmax": state.state2.absmax.numpy(),
            "nested_table": state.state2.code.numpy(),
            "nested_offset": state.offset.numpy(),
        }
    return NF4Array(
        codes.numpy()[:, 0],
        state.absmax.numpy(),
        **nested,
        matrix_shape=tuple(state.shape),
        dtype_name=str(state.dtype).removeprefix("torch."),
        kind=state.quant_type,
        block_size=state.blocksize,
    )


def test_tables_are_those_of_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional as F

    for kind, table in CODE_TABLES.items():
        assert np.array_equal(table, F.get_4bit_type(kind, device="cpu").numpy())
    for signed, table in ((True, DYNAMIC_SIGNED), (False, DYNAMIC_UNSIGNED)):
        # The construction itself rounds differently on some machines.
        built = F.create_dynamic_map(signed=signed).numpy()
        np.testing.assert_array_max_ulp(table, built, maxulp=2)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "dtype,scale",
    [
        ("float32", 1.0),
        ("bfloat16", 1.0),
        ("float16", 1.0),
        ("float32", 1e30),
        ("bfloat16", 1e37),
        ("float32", 1e-30),
        ("bfloat16", 1e-30),
        ("float16", 1e4),
        ("float16", 1e-6),
    ],
)
def test_codes_and_absmax_equal_those_of_bitsandbytes(where, kind, dtype, scale):
    pytest.importorskip("bitsandbytes")
    for shape in ((64, 64), (7, 33), (3, 128), (1, 5)):
        weight = reference.weight(shape, dtype, scale=scale)
        codes, state = reference.quantize_4bit(weight, kind, nested=False)
        ours = quantize_4bit(WHERE[where](weight), kind=kind, nested=False)
        assert np.array_equal(np.asarray(ours.codes), codes.numpy()[:, 0]), shape
        assert np.array_equal(np.asarray(ours.absmax), state.absmax.numpy()), shape


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("block_size", [32, 256])
def test_other_block_sizes_equal_those_of_bitsandbytes(where, block_size):
    pytest.importorskip("bitsandbytes")
    weight = reference.weight((12, 100), "bfloat16")
    codes, state = reference.quantize_4bit(weight, "nf4", False, block_size)
    ours = quantize_4bit(WHERE[where](weight), nested=False, block_size=block_size)
    assert np.array_equal(np.asarray(ours.codes), codes.numpy()[:, 0])
    assert np.array_equal(np.asarray(ours.absmax), state.absmax.numpy())


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.37, -2.5])
def test_constant_weights_equal_those_of_bitsandbytes(where, dtype, value):
    pytest.importorskip("bitsandbytes")
    weight = np.full((3, 64), value, reference.DTYPES[dtype])
    weight[1] = 0  # a block of zeros, whose codes differ between the libraries' own devices
    codes, state = reference.quantize_4bit(weight, "nf4", nested=False)
    ours = quantize_4bit(WHERE[where](weight), nested=False)
    assert np.array_equal(np.asarray(ours.absmax), state.absmax.numpy())
    if value:
        rows = np.asarray(ours.codes).reshape(3, 32), codes.numpy().reshape(3, 32)
        assert np.array_equal(rows[0][::2], rows[1][::2])
    assert np.array_equal(np.asarray(ours.dequantize(), np.float32), reference.dequantize_4bit(codes, state))


@pytest.mark.parametrize("where", WHERE)
def test_nested_scales_follow_the_rule_of_the_gpu(where):
    """At most one code beside the CPU's own in at most 0.2 % of the scales; the offset within one ulp."""
    pytest.importorskip("bitsandbytes")
    weight = reference.weight((2048, 256), "bfloat16")
    codes, state = reference.quantize_4bit(weight, "nf4", nested=True)
    ours = quantize_4bit(WHERE[where](weight))
    assert np.array_equal(np.asarray(ours.codes), codes.numpy()[:, 0])
    np.testing.assert_array_max_ulp(np.asarray(ours.nested_offset), state.offset.numpy(), maxulp=1)
    difference = np.abs(np.asarray(ours.absmax, np.int32) - state.absmax.numpy())
    assert difference.max() <= 1 and np.mean(difference > 0) <= 0.002


def test_host_and_device_give_the_same_nested_codes():
    weight = reference.weight((300, 130), "float16", seed=3)
    host, device = quantize_4bit(weight), quantize_4bit(jnp.asarray(weight))
    for one, other in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True):
        assert np.array_equal(one, np.asarray(other))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_dequantised_values_equal_those_of_bitsandbytes(kind, nested, dtype):
    pytest.importorskip("bitsandbytes")
    for shape in ((300, 64), (9, 30)):
        codes, state = reference.quantize_4bit(reference.weight(shape, dtype), kind, nested)
        ours = jax.jit(NF4Array.dequantize)(from_bitsandbytes(codes, state))
        assert ours.dtype.name == dtype
        assert np.array_equal(np.asarray(ours, np.float32), reference.dequantize_4bit(codes, state))


@pytest.mark.parametrize("error", [-2, -1, 0, 1, 2])
def test_reciprocals_are_rounded_to_nearest_however_the_device_divides(error):
    m = np.random.default_rng(0).uniform(1, 2, 1 << 16).astype(np.float32)
    rough = ((np.float32(1) / m).view(np.int32) + error).view(np.float32)

    @jax.jit
    def mended(m, r):
        return _mended_reciprocal(m, _mended_reciprocal(m, r))

    assert np.array_equal(np.asarray(mended(m, rough)), np.float32(1) / m)


def test_a_stack_dequantises_to_the_stack_of_its_matrices():
    arrays = [quantize_4bit(jnp.asarray(reference.weight((6, 40), "float32", seed=s))) for s in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
    assert stack.shape == (3, 6, 40)
    assert np.array_equal(stack.dequantize(), np.stack([a.dequantize() for a in arrays]))
    _, scanned = jax.lax.scan(lambda carry, array: (carry, array.dequantize()), 0, stack)
    assert np.array_equal(scanned, stack.dequantize())


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_products_equal_those_with_the_dequantised_weight(implementation):
    for shape, rows, dtype in (
        ((40, 128), 3, "float32"),
        ((40, 128), 80, "float32"),
        ((9, 30), 2, "bfloat16"),
    ):
        array = quantize_4bit(jnp.asarray(reference.weight(shape, dtype)))
        x = jnp.asarray(reference.weight((rows, shape[1]), dtype, seed=1))
        with kernels(implementation):
            y = array.product(x, jnp.float32)
        expected = jnp.einsum("ri,oi->ro", x, array.dequantize(), preferred_element_type=jnp.float32)
        assert y.dtype == jnp.float32
        assert_close(y, expected, dtype=dtype)


@pytest.mark.parametrize("nested", [False, True])
def test_abstract_arrays_have_the_shapes_of_real_ones(nested):
    real = quantize_4bit(jnp.ones((130, 77)), nested=nested)
    abstract = empty_like_4bit((130, 77), jnp.float32, nested=nested)
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    for one, other in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize("options", [{"kind": "int3"}, {"block_size": 48}])
def test_unknown_kinds_and_block_sizes_are_refused(options):
    with pytest.raises(InputError):
        quantize_4bit(np.ones((4, 4), np.float32), **options)


@pytest.mark.gpu
def test_codes_on_a_gpu_equal_those_on_the_host():
    for dtype in reference.DTYPES:
        weight = reference.weight((1024, 4096), dtype, seed=5)
        for kind in ("nf4", "fp4"):
            host, device = quantize_4bit(weight, kind=kind), quantize_4bit(jnp.asarray(weight), kind=kind)
            for one, other in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True):
                assert np.array_equal(one, np.asarray(other))
