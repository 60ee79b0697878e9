import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.nf4_dequantize import (
    CodedWeight,
    NestedScales,
    nf4_dequantize,
    nf4_dequantize_reference,
    nf4_dequantize_stacked,
)
from tests.lowering import lower_for_h100


def arguments(shape, *, nested, block_size=64, seed=0):
    """Codes, absmax, table and nested scales of a weight of this shape, all random."""
    random = np.random.default_rng(seed)
    count = int(np.prod(shape))
    blocks = -(-count // block_size)
    codes = jnp.asarray(random.integers(0, 256, -(-count // 2)), jnp.uint8)
    table = jnp.asarray(np.sort(random.uniform(-1, 1, 16)), jnp.float32)
    if not nested:
        return codes, jnp.asarray(random.uniform(0, 0.1, blocks), jnp.float32), table, None
    scales = NestedScales(
        jnp.asarray(random.uniform(0, 0.05, -(-blocks // 256)), jnp.float32),
        jnp.asarray(np.sort(random.uniform(-1, 1, 256)), jnp.float32),
        jnp.asarray(0.0519986, jnp.float32),
    )
    return codes, jnp.asarray(random.integers(0, 256, blocks), jnp.uint8), table, scales


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kernel_equals_its_oracle_to_the_bit(nested, dtype):
    for shape, block_size in (
        ((40, 64), 64),
        ((7, 33), 64),
        ((300, 70), 64),
        ((5, 130), 32),
        ((3, 500), 256),
    ):
        given = arguments(shape, nested=nested, block_size=block_size)
        options = {"shape": shape, "dtype": dtype, "block_size": block_size}
        kernel = nf4_dequantize(*given, **options, implementation="pallas")
        assert kernel.dtype == jnp.dtype(dtype) and kernel.shape == shape
        assert np.array_equal(kernel, jax.jit(lambda: nf4_dequantize_reference(*given, **options))()), shape  # noqa: B023


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_stacked_weights_are_each_what_it_is_alone_to_the_bit(count, nested, implementation):
    for shape in ((40, 64), (7, 33), (300, 70)):
        weights = [CodedWeight(*arguments(shape, nested=nested, seed=seed)) for seed in range(count)]
        options = {"shape": shape, "dtype": "bfloat16", "implementation": implementation}
        alone = [nf4_dequantize(*weight, **options) for weight in weights]
        assert np.array_equal(nf4_dequantize_stacked(weights, **options), jnp.stack(alone)), shape


def test_stacked_weights_of_another_size_are_refused():
    weights = [CodedWeight(*arguments(shape, nested=False)) for shape in ((8, 64), (8, 32))]
    with pytest.raises(InputError, match="must be"):
        nf4_dequantize_stacked(weights, shape=(8, 64), dtype="bfloat16")


def test_scales_are_rounded_before_the_offset_is_added():
    codes, absmax, table, scales = arguments((64, 256), nested=True)
    product = np.asarray(scales.table)[np.asarray(absmax)] * np.repeat(np.asarray(scales.absmax), 256)[:256]
    expected = np.asarray(table)[np.asarray(codes[::32] >> 4)] * (product + np.asarray(scales.offset))
    actual = jax.jit(lambda *a: nf4_dequantize(*a, shape=(64, 256), dtype="float32"))(
        codes, absmax, table, scales
    )
    assert np.array_equal(actual.reshape(-1)[::64], expected)


@pytest.mark.parametrize("nested", [False, True])
def test_lowers_for_an_h100(nested):
    given = arguments((48, 80), nested=nested)
    text = lower_for_h100(
        lambda *a: nf4_dequantize(*a, shape=(48, 80), dtype="bfloat16", implementation="pallas"), *given
    )
    assert "nf4_dequantize" in text


def test_sizes_that_do_not_fit_are_refused():
    codes, absmax, table, scales = arguments((48, 80), nested=True)
    with pytest.raises(InputError, match="codes"):
        nf4_dequantize(codes[1:], absmax, table, scales, shape=(48, 80), dtype="float32")
    with pytest.raises(InputError, match="nested absmax"):
        nf4_dequantize(
            codes, absmax, table, scales._replace(absmax=jnp.ones(2)), shape=(48, 80), dtype="float32"
        )
    with pytest.raises(InputError, match="power of two"):
        nf4_dequantize(codes, absmax, table, scales, shape=(48, 80), dtype="float32", block_size=48)


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
def test_kernel_equals_its_oracle_on_a_gpu_at_the_size_of_a_real_layer(nested):
    for shape in ((14336, 4096), (1023, 77)):
        given = arguments(shape, nested=nested)
        for dtype in ("bfloat16", "float16", "float32"):
            options = {"shape": shape, "dtype": dtype}
            kernel = nf4_dequantize(*given, **options, implementation="pallas")
            assert jnp.array_equal(kernel, nf4_dequantize_reference(*given, **options))
