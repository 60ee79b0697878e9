import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.blockwise_8bit import (
    Blockwise,
    dequantize_blockwise,
    dequantize_blockwise_reference,
    quantize_blockwise,
    quantize_blockwise_reference,
)
from pronghorn.pallas_kernels.dynamic_tables import (
    DYNAMIC_SIGNED,
    DYNAMIC_SIGNED_MIDPOINTS,
    DYNAMIC_UNSIGNED,
    DYNAMIC_UNSIGNED_MIDPOINTS,
)
from tests.lowering import lower_for_h100

MAPS = {True: DYNAMIC_SIGNED, False: DYNAMIC_UNSIGNED}
MIDPOINTS = {True: DYNAMIC_SIGNED_MIDPOINTS, False: DYNAMIC_UNSIGNED_MIDPOINTS}


def values(shape, *, signed, seed=0, decades=7):
    """Values over several decades, so that every part of the map is used."""
    random = np.random.default_rng(seed)
    size = 10.0 ** random.uniform(-decades, 0, shape)
    return (size * (random.choice([-1, 1], shape) if signed else 1)).astype(np.float32)


def awkward(signed):
    """[blocks, 256] whose largest element is 1: every entry and midpoint of the map, and their neighbours in fp32."""
    corners = np.concatenate([MAPS[signed], MIDPOINTS[signed], np.float32([0.0, -0.0, 1e-30, 1e-39])])
    around = [corners, np.nextafter(corners, np.float32(2)), np.nextafter(corners, np.float32(-2))]
    flat = np.clip(np.concatenate(around), -1 if signed else 0, 1)
    flat = np.pad(flat, (0, -flat.size % 255)).reshape(-1, 255)
    return np.concatenate([np.ones((len(flat), 1), np.float32), flat], axis=1)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_number_of_midpoints_below(signed):
    x = awkward(signed)
    x[np.abs(x) < 2.0**-126] = 0  # smaller numbers count as zero on a device
    codes, absmax = quantize_blockwise(jnp.asarray(x), signed=signed, implementation="pallas")
    assert np.array_equal(codes, np.searchsorted(MIDPOINTS[signed], x, side="left"))
    assert np.all(np.asarray(absmax) == 1)


@functools.partial(jax.jit, static_argnames=("signed", "implementation"))
def there_and_back(x, *, signed, implementation):
    array = quantize_blockwise(x, signed=signed, implementation=implementation)
    return array, dequantize_blockwise(array, signed=signed, dtype=x.dtype, implementation=implementation)


@pytest.mark.parametrize(
    ("dtype", "signed"), [("float32", True), ("float32", False), ("bfloat16", False), ("float16", True)]
)
def test_kernels_equal_their_oracles_to_the_bit(dtype, signed):
    for shape in ((5,), (17, 259)):
        x = jnp.asarray(values(shape, signed=signed, decades=4)).astype(dtype)
        kernel, back = there_and_back(x, signed=signed, implementation="pallas")
        oracle, expected = there_and_back(x, signed=signed, implementation="xla")
        assert kernel.codes.shape == shape and back.dtype == x.dtype
        assert np.array_equal(kernel.codes, oracle.codes) and np.array_equal(kernel.absmax, oracle.absmax)
        assert np.array_equal(back, expected)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_scales_and_values_are_those_of_bitsandbytes(signed):
    """Of fp64 tensors, whose codes bitsandbytes computes by the nearest entry on a CPU too."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    x = values((37, 256), signed=signed, decades=9)
    table = torch.tensor(MAPS[signed])
    assert torch.equal(table, functional.create_dynamic_map(signed=signed).float())
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(torch.tensor(x).double(), table, 256)
    ours, ours_back = there_and_back(jnp.asarray(x), signed=signed, implementation="xla")
    assert np.array_equal(ours.absmax, absmax.numpy())
    assert np.array_equal(ours.codes, codes.numpy())
    back = functional.dequantize_blockwise(codes, absmax=absmax, code=table, blocksize=256)
    assert np.array_equal(ours_back, back.float().numpy())


def test_the_cpu_code_of_bitsandbytes_differs_by_one_in_few_codes():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    x = np.random.default_rng(0).standard_normal((400, 256)).astype(np.float32)
    codes, state = functional.quantize_blockwise(torch.tensor(x), blocksize=256)
    ours, _ = there_and_back(jnp.asarray(x), signed=True, implementation="xla")
    assert np.array_equal(ours.absmax, state.absmax.numpy())
    distance = np.abs(np.asarray(ours.codes, np.int32) - codes.numpy())
    assert distance.max() <= 1 and np.mean(distance) < 2e-3


def test_blocks_of_zeros_and_of_numbers_next_to_zero_come_back_as_zeros():
    x = jnp.stack([jnp.zeros(256), jnp.full(256, 1e-39), jnp.ones(256)])
    for implementation in ("pallas", "xla"):
        array, back = there_and_back(x, signed=True, implementation=implementation)
        assert np.all(np.asarray(back)[:2] == 0)
        assert np.all(np.asarray(array.codes)[0] == 127)


def test_every_code_survives_a_round_trip():
    for signed, table in MAPS.items():
        scale = jnp.float32([0.37])
        codes = jnp.arange(256, dtype=jnp.uint8)
        again = quantize_blockwise(
            dequantize_blockwise(Blockwise(codes, scale), signed=signed), signed=signed
        )
        assert np.array_equal(again.codes, codes), table


def test_codes_and_scales_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="absmax"):
        dequantize_blockwise(Blockwise(jnp.zeros(300, jnp.uint8), jnp.ones(1)))


@pytest.mark.parametrize("shape", [(64, 256), (7, 33)])
def test_lowers_for_an_h100(shape):
    def both(x):
        return dequantize_blockwise(quantize_blockwise(x, implementation="pallas"), implementation="pallas")

    text = lower_for_h100(both, jnp.zeros(shape))
    assert "quantize_blockwise" in text and "dequantize_blockwise" in text


@pytest.mark.gpu
@pytest.mark.parametrize("signed", [True, False])
def test_kernels_equal_their_oracles_on_a_gpu(signed):
    for shape in ((4096, 4096), (1023, 77), (5,)):
        x = jax.random.normal(jax.random.key(0), shape) ** 5
        x = x if signed else jnp.abs(x)
        kernel = quantize_blockwise(x, signed=signed, implementation="pallas")
        oracle = quantize_blockwise_reference(x, signed=signed)
        assert jnp.array_equal(kernel.codes, oracle.codes) and jnp.array_equal(kernel.absmax, oracle.absmax)
        back = dequantize_blockwise(kernel, signed=signed, implementation="pallas")
        assert jnp.array_equal(back, dequantize_blockwise_reference(kernel, signed=signed))
    x = awkward(signed)
    codes, _ = quantize_blockwise(jnp.asarray(x), signed=signed, implementation="pallas")
    x[np.abs(x) < 2.0**-126] = 0
    assert np.array_equal(codes, np.searchsorted(MIDPOINTS[signed], x, side="left"))
