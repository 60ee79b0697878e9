import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.fp8_quantize import ELEMENTS, fp8_quantize, round_to_fp8
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import normal


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert np.array_equal(*(np.atleast_1d(a).view(np.uint8) for a in (one, other)))


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


def rounded_by_both(x, largest, format="e4m3"):
    return [
        jax.jit(lambda x, i=i: round_to_fp8(x, format, largest, implementation=i))(x)
        for i in ("pallas", "xla")
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(1,), (2, 3, 70), (ELEMENTS + 7,)], ids=str)
def test_rounding_with_a_known_scale_equals_its_oracle_to_the_bit(shape, dtype):
    x = normal(0, shape, dtype)
    assert_equal(*rounded_by_both(x, None))
    assert_equal(*rounded_by_both(x, jnp.float32(1000.0)))


def test_with_a_known_scale_what_is_not_finite_is_not_hidden():
    x = jnp.ones((3, 20)).at[0, 1].set(jnp.nan).at[1, 4].set(jnp.inf).at[2, 0].set(-jnp.inf)
    for codes, _ in rounded_by_both(x, jnp.float32(1.0)):
        found = np.isnan(codes.astype(jnp.float32))
        assert np.array_equal(found, ~np.isfinite(x))


def test_nothing_is_rounded_to_nothing_and_e5m2_is_left_to_xla():
    assert round_to_fp8(jnp.zeros((0, 4)), implementation="pallas")[0].shape == (0, 4)
    assert_equal(*rounded_by_both(normal(0, (40,)), None, "e5m2"))


def test_rounding_lowers_for_an_h100():
    x = jnp.ones((300, 4096), jnp.bfloat16)
    assert "round_to_fp8" in lower_for_h100(lambda x: round_to_fp8(x, implementation="pallas"), x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(4096, 14336), (77, 1001)], ids=str)
def test_rounding_equals_its_oracle_on_a_gpu(shape, dtype):
    x = normal(0, shape, dtype)
    x = x.at[0, 5].set(jnp.nan).at[1, 7].set(jnp.inf)
    (codes, _), (expected, _) = rounded_by_both(x, jnp.float32(6.0))
    assert np.array_equal(*(np.asarray(a.astype(jnp.float32)) for a in (codes, expected)), equal_nan=True)


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
