import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.fp8_quantize import fp8_quantize
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import normal


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert np.array_equal(*(np.asarray(a).view(np.uint8) for a in (one, other)))


def both(x, scales):
    return [jax.jit(lambda x, i=i: fp8_quantize(x, scales, implementation=i))(x) for i in ("pallas", "xla")]


@pytest.mark.parametrize("scales,shape", [("row", (2, 3, 70)), ("row", (37, 16)), ("block", (130, 200))])
def test_kernel_equals_its_oracle_to_the_bit(scales, shape):
    x = normal(0, shape, "bfloat16").at[..., 0].multiply(100).at[0].set(0)
    assert_equal(*both(x, scales))


def test_a_row_that_is_not_finite_is_not_hidden_and_harms_no_other():
    x = jnp.ones((3, 20)).at[1, 4].set(jnp.nan)
    for codes, scales in both(x, "row"):
        assert np.isnan(scales).tolist() == [False, True, False]
        assert np.array_equal(codes[0].astype(jnp.float32) * scales[0], np.ones(20))


@pytest.mark.parametrize("scales", ["row", "block"])
def test_lowers_for_an_h100(scales):
    x = jnp.ones((300, 4096), jnp.bfloat16)
    assert "fp8_quantize" in lower_for_h100(lambda x: fp8_quantize(x, scales, implementation="pallas"), x)


def test_what_has_no_blocks_is_refused():
    with pytest.raises(InputError, match="scales"):
        fp8_quantize(jnp.ones((2, 3, 4)), "block")
    with pytest.raises(InputError, match="scales"):
        fp8_quantize(jnp.ones((3, 4)), "column")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "scales,shape",
    [("row", (4096, 14336)), ("row", (77, 1000)), ("block", (4096, 14336)), ("block", (1000, 77))],
)
def test_kernel_equals_its_oracle_on_a_gpu(scales, shape):
    x = normal(0, shape, "bfloat16")
    for one, other in zip(*both(x, scales), strict=True):
        assert jnp.array_equal(one.astype(jnp.float32), other.astype(jnp.float32))
