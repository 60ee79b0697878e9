"""Products with a frozen weight in FP8, the other operand rounded on the way: what an H100 multiplies twice as fast.

A weight W [out, in] is kept as e4m3 codes (sign, four bits of exponent, three of mantissa, up to 448) and fp32 scales,
one for the tensor or one a row: W = s Wq. With k(Z) the smallest power of two for which max|Z| / k fits the format:

    Y  = X Wᵀ = k(X) s (Xq Wqᵀ)                Xq = e4m3(X / k(X))                       k one a row, or one
    dX = dY W = k(dY) s (dYq Wq)                dYq = e4m3 or e5m2 (dY / k(dY))            one

One scale, of X, dY or W, cuBLAS takes itself, and adds a further product or a residual stream while it writes. A scale
for each row of X costs a pass over Y instead, with that addition in it. It is what X gets that can hold anything:
single tokens of a language model are a thousand times the others where `down` reads them, and would leave those two
bits. A normalised X needs no more than one, from a bound (`rms_norm.largest_normalized`) that spares a pass over X.
Either way no token of a batch changes how another is rounded. dY has one scale, from its largest magnitude. With one
scale a row of W, s multiplies the columns of Y in the same pass, and goes into dY before that is rounded.

On Ada and Hopper the inner side of both operands must be contiguous: dY Wq reads a transposed copy of Wq, which
`fp8_transpose` makes in every product.
The oracle ("xla") multiplies the same codes in fp32: equal but for the order of sums, and for what cuBLAS drops from
sums of products (it adds them up with fewer bits than fp32).

Nothing is saved for backward, and a frozen weight has no gradient.

Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022, https://arxiv.org/abs/2209.05433.
"""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.fp8_quantize import Format, fp8_quantize, round_to_fp8
from pronghorn.pallas_kernels.fp8_transpose import fp8_transpose


def fp8_times_transposed(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *,
    gradient_format: Format | None = "e4m3",
    dtype: Any = None,
    largest: jax.Array | None = None,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """x Wᵀ, x rounded to e4m3.

    Args:
      x: [..., in]; bf16, fp16 or fp32.
      codes: e4m3 [out, in].
      scales: fp32 [] or [out].
      gradient_format: what dY is rounded to, should this be differentiated; None for a product of dY as it is.
      dtype: of the result; that of x by default.
      largest: a bound of |x|, fp32 []: x has one scale then, and otherwise one a row.
      implementation: "pallas" (a product of FP8 operands, which XLA gives to cuBLAS; no kernel is launched) or "xla"
      (the
        oracle, the default on a CPU).

    Returns:
      [..., out].

    Raises:
      InputError: where shapes or dtypes do not fit.
    """
    _check("fp8_times_transposed", x.shape[-1], codes, scales, 1)
    _check_format(gradient_format)
    fast = launch.resolve(implementation) == "pallas"
    return _times_transposed(x, codes, scales, largest, gradient_format, jnp.dtype(dtype or x.dtype), fast)


def fp8_times(
    y: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *,
    format: Format | None = "e4m3",
    dtype: Any = None,
    largest: jax.Array | None = None,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """y W, y rounded to `format`, or multiplied as it is: [..., out] -> [..., in].

    `largest` is max|y| where it is known; the other arguments are those of `fp8_times_transposed`.
    """
    _check("fp8_times", y.shape[-1], codes, scales, 0)
    _check_format(format)
    fast = launch.resolve(implementation) == "pallas"
    return _times(y, codes, scales, largest, format, jnp.dtype(dtype or y.dtype), fast)


def dequantize(codes: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """The weight [out, in] of codes and scales [] or [out], rounded once."""
    scales = scales[:, None] if scales.ndim else scales
    return (codes.astype(jnp.float32) * scales).astype(dtype)


def _check(op: str, inner: int, codes: Any, scales: Any, axis: int) -> None:
    if codes.ndim != 2 or codes.shape[axis] != inner or codes.dtype != jnp.float8_e4m3fn:
        raise InputError(
            f"{op}: codes {codes.dtype}{codes.shape} must be a float8_e4m3fn matrix with {inner} "
            f"{('rows', 'columns')[axis]}."
        )
    if scales.shape not in ((), codes.shape[:1]):
        raise InputError(f"{op}: scales {scales.shape} must be () or {codes.shape[:1]}.")


def _check_format(format: str | None) -> None:
    if format is not None and format not in get_args(Format):
        raise InputError(f"format={format!r} is not known; use one of {', '.join(get_args(Format))}.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _times_transposed(x, codes, scales, largest, gradient_format, dtype, fast):
    if largest is not None:
        rounded, scale = round_to_fp8(x, "e4m3", largest)
        return _product(rounded, codes, 1, scale * scales, dtype, fast)
    rounded, of_rows = fp8_quantize(x, "row", implementation="pallas" if fast else "xla")
    return _product(rounded, codes, 1, scales, dtype, fast, of_rows[..., None])


def _times_transposed_forward(x, codes, scales, largest, gradient_format, dtype, fast):
    y = _times_transposed(x, codes, scales, largest, gradient_format, dtype, fast)
    return y, (codes, scales, launch.Static(x.dtype))


def _times_transposed_backward(gradient_format, dtype, fast, residuals, dy):
    codes, scales, x_dtype = residuals
    return _times(dy, codes, scales, None, gradient_format, x_dtype.value, fast), None, None, None


_times_transposed.defvjp(_times_transposed_forward, _times_transposed_backward)


def _times(y, codes, scales, largest, format, dtype, fast):
    if format is None:
        weight = dequantize(codes, scales, y.dtype)
        dims = (((y.ndim - 1,), (0,)), ((), ()))
        return jax.lax.dot_general(y, weight, dims, preferred_element_type=dtype)
    if scales.ndim:
        y, scales, largest = y.astype(jnp.float32) * scales, jnp.float32(1), None
    rounded, scale = round_to_fp8(y, format, largest)
    return _product(rounded, codes, 0, scale * scales, dtype, fast)


def _product(a, codes, axis, scale, dtype, fast, of_rows=None):
    """scale of_rows (a · codes), contracted over an axis of codes; scale fp32 [], or [out] for the columns."""
    dims = (((a.ndim - 1,), (axis,)), ((), ()))
    if not fast:
        a, codes = a.astype(jnp.float32), codes.astype(jnp.float32)
        product = jax.lax.dot_general(a, codes, dims, preferred_element_type=jnp.float32) * scale
        return (product if of_rows is None else product * of_rows).astype(dtype)
    if axis == 0:
        codes = fp8_transpose(codes, implementation="pallas")
        dims = (((a.ndim - 1,), (1,)), ((), ()))
    # XLA hands a scalar factor in the dtype of the product to cuBLAS, and not one with a cast behind it. fp16 does not
    # reach as far as scales do.
    narrow = scale.ndim == 0 and dtype != jnp.float16
    product = jax.lax.dot_general(a, codes, dims, preferred_element_type=dtype if narrow else jnp.float32)
    product *= scale.astype(product.dtype)
    if of_rows is not None:
        product *= of_rows.astype(product.dtype)
    return product.astype(dtype)
