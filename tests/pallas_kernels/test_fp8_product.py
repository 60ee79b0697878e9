import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.fp8_product import dequantize, fp8_times, fp8_times_transposed
from pronghorn.pallas_kernels.fp8_quantize import FORMATS, fp8_quantize, power_of_two_scale, round_to_fp8
from tests.compiling import compile_for_h100
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import normal
from tests.tolerances import assert_close


def weight(outputs, inputs, *, rows=False, seed=0):
    codes, scale = round_to_fp8(normal(seed, (outputs, inputs), scale=inputs**-0.5))
    scales = scale * 2.0 ** (jnp.arange(outputs) % 3) if rows else scale
    return codes, scales


@pytest.mark.parametrize("format", FORMATS)
def test_the_scale_is_the_smallest_power_of_two_that_fits(format):
    largest_number = float(jnp.finfo(FORMATS[format].dtype).max)
    values = np.concatenate(
        [largest_number * 2.0 ** np.arange(-40, 40) * factor for factor in (0.51, 0.9999, 1.0, 1.0001)]
    ).astype(np.float32)
    scale, inverse = power_of_two_scale(values, format)
    assert np.array_equal(scale * inverse, np.ones_like(scale)) and np.all(np.frexp(scale)[0] == 0.5)
    assert np.all(values / scale <= largest_number) and np.all(values / scale > largest_number / 2)
    assert np.array_equal(power_of_two_scale(jnp.asarray(values), format)[0], scale)


def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden():
    codes, scale = round_to_fp8(jnp.zeros((3, 5), jnp.bfloat16))
    assert not np.any(codes.astype(jnp.float32) * scale)
    for value in (jnp.inf, -jnp.inf, jnp.nan):
        assert np.isnan(round_to_fp8(jnp.zeros(4).at[1].set(value))[1])


@pytest.mark.parametrize("format", FORMATS)
def test_a_value_is_rounded_the_same_whatever_else_is_in_the_tensor(format):
    x = normal(0, (40,))
    alone = round_to_fp8(x, format)
    beside = round_to_fp8(jnp.append(x, 150.0), format)
    values = [codes[:40].astype(jnp.float32) * scale for codes, scale in (alone, beside)]
    assert beside[1] > alone[1] and np.array_equal(*values)


@pytest.mark.parametrize("rows,dtype", [(False, "float32"), (True, "bfloat16"), (False, "float16")])
def test_products_equal_those_of_the_rounded_arrays(rows, dtype):
    codes, scales = weight(33, 70, rows=rows)
    full = dequantize(codes, scales, jnp.float32)
    x, dy = normal(1, (2, 5, 70), dtype), normal(2, (2, 5, 33), dtype)
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    for implementation in ("pallas", "xla"):
        for known in (largest, None):
            value, scale = round_to_fp8(x) if known is not None else fp8_quantize(x, "row")
            y = fp8_times_transposed(x, codes, scales, largest=known, implementation=implementation)
            assert y.dtype == x.dtype
            rounded = value.astype(jnp.float32) * (scale if known is not None else scale[..., None])
            assert_close(y, rounded @ full.T, what=implementation)
        for format in FORMATS:
            folded = dy.astype(jnp.float32) * scales if rows else dy
            value, scale = round_to_fp8(folded, format)
            dx = fp8_times(dy, codes, scales, format=format, implementation=implementation)
            expected = (value.astype(jnp.float32) * scale) @ (codes.astype(jnp.float32))
            assert_close(dx, expected * (1 if rows else scales), what=f"{implementation} {format}")
        assert_close(
            fp8_times(dy, codes, scales, format=None), dy.astype(jnp.float32) @ full, what=implementation
        )


@pytest.mark.parametrize("format", ["e5m2", None])
def test_the_gradient_of_one_product_is_the_other(format):
    codes, scales = weight(24, 40)
    x, dy = normal(1, (6, 40), "bfloat16"), normal(2, (6, 24), "bfloat16")
    _, pullback = jax.vjp(lambda x: fp8_times_transposed(x, codes, scales, gradient_format=format), x)
    assert np.array_equal(pullback(dy)[0], fp8_times(dy, codes, scales, format=format))


def test_a_token_does_not_change_what_another_gets():
    codes, scales = weight(24, 40)
    x = normal(1, (6, 40), "bfloat16")
    y = fp8_times_transposed(x, codes, scales)
    assert np.array_equal(fp8_times_transposed(x.at[0].multiply(1e6), codes, scales)[1:], y[1:])


def test_a_largest_gradient_that_is_known_changes_nothing():
    codes, scales = weight(24, 40)
    dy = normal(2, (6, 24), "bfloat16")
    largest = jnp.max(jnp.abs(dy)).astype(jnp.float32)
    assert np.array_equal(fp8_times(dy, codes, scales, largest=largest), fp8_times(dy, codes, scales))


def test_what_does_not_fit_is_refused():
    codes, scales = weight(24, 40)
    with pytest.raises(InputError, match=r"40 columns|39 columns"):
        fp8_times_transposed(jnp.ones((3, 39)), codes, scales)
    with pytest.raises(InputError, match="scales"):
        fp8_times(jnp.ones((3, 24)), codes, jnp.ones(40))
    with pytest.raises(InputError, match="format"):
        fp8_times(jnp.ones((3, 24)), codes, scales, format="e3m4")


def test_lowers_for_an_h100_to_a_product_of_fp8_operands():
    codes, scales = weight(32, 48)
    text = lower_for_h100(
        lambda x, dy: (
            fp8_times_transposed(x, codes, scales, implementation="pallas"),
            fp8_times(dy, codes, scales, format="e5m2", implementation="pallas"),
        ),
        jnp.ones((16, 48), jnp.bfloat16),
        jnp.ones((16, 32), jnp.bfloat16),
    )
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2 and all("f8E4M3FN" in line and "bf16" in line for line in products)
    assert "f8E5M2" in products[1]


OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": "0",
}  # as in a training step


def three_products(x, dy, low, residual, codes, scales):
    y = fp8_times_transposed(x, codes, scales, largest=jnp.float32(6), implementation="pallas") + low
    dx = fp8_times(dy, codes, scales, implementation="pallas") + residual
    return y, dx, fp8_times_transposed(x + 1, codes, scales, implementation="pallas") + low


def assert_all_are_in_fp8_with_what_is_added(hlo):
    """cuBLAS multiplies FP8, and adds where no scale a row comes between: that is one pass; nothing else transposes."""
    calls = [line for line in hlo.splitlines() if '"__cublas$lt$matmul$f8"' in line]
    assert len(calls) == 3 and sum('"beta":1' in call for call in calls) == 2
    entry = hlo[hlo.index("ENTRY") :]
    assert "fp8_transpose" in entry and "wrapped_transpose" not in entry and "fp8_quantize" in entry
    assert entry.count(" = bf16[128,256]{1,0} fusion(") == 1


def test_compiles_for_an_h100_to_cublas_in_fp8():
    codes, scales = weight(256, 512)
    x, dy = jnp.ones((128, 512), jnp.bfloat16), jnp.ones((128, 256), jnp.bfloat16)
    assert_all_are_in_fp8_with_what_is_added(
        compile_for_h100(three_products, x, dy, dy, x, codes, scales, options=OPTIONS)
    )


@pytest.mark.gpu
def test_products_on_a_gpu_are_cublas_in_fp8_and_equal_the_oracle():
    if float(jax.local_devices()[0].compute_capability) < 8.9:
        pytest.skip("no FP8 products before Ada")
    codes, scales = weight(256, 512)
    x, dy = normal(1, (128, 512), "bfloat16"), normal(2, (128, 256), "bfloat16")
    run = jax.jit(three_products, compiler_options=OPTIONS).lower(x, dy, dy, x, codes, scales).compile()
    assert_all_are_in_fp8_with_what_is_added(run.as_text())
    y, dx, of_rows = run(x, dy, dy, x, codes, scales)
    exact = functools.partial(fp8_times_transposed, dtype="float32", implementation="xla")
    assert_close(y, exact(x, codes, scales, largest=jnp.float32(6)) + dy, what="Y")
    assert_close(dx, fp8_times(dy, codes, scales, dtype="float32", implementation="xla") + x, what="dX")
    assert_close(of_rows, exact(x + 1, codes, scales) + dy, what="Y, scales of rows")
