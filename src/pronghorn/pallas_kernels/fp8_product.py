"""Products with a frozen weight in FP8, the other operand rounded on the way: what an H100 multiplies twice as fast.

A weight W [out, in] is kept as e4m3 codes (sign, four bits of exponent, three of mantissa, up to 448) and fp32 scales,
one for the tensor or one a row: W = s Wq. With k(Z) the smallest power of two for which max|Z| / k fits the format:

    Y  = X Wᵀ = k(X) s (Xq Wqᵀ)                Xq = e4m3(X / k(X))
    dX = dY W = k(dY) s (dYq Wq)                dYq = e4m3 or e5m2 (dY / k(dY))

The scale of X or dY is found anew in every product, one for the tensor, which cuBLAS takes as it takes that of a weight,
and adds a further product or a residual stream while it writes: the maximum and the cast are all that is done besides.
It is a power of two, because dividing by one changes no mantissa: a value is rounded the same way whatever else is in
the tensor, so other tokens touch a token only in what is below 2^-14 of the largest of all. With one scale a row of W, s
multiplies the columns of Y in a pass of its own, and goes into dY before that is rounded.

On Ada and Hopper the inner side of both operands must be contiguous: dY Wq reads a transposed copy of Wq, which
`fp8_transpose` makes in every product.
The oracle ("xla") multiplies the same codes in fp32: equal but for the order of sums, and for what cuBLAS drops from
sums of products (it adds them up with fewer bits than fp32).

Nothing is saved for backward, and a frozen weight has no gradient.

Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022, https://arxiv.org/abs/2209.05433.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.fp8_transpose import fp8_transpose

Format = Literal["e4m3", "e5m2"]


class _Format(NamedTuple):
    dtype: Any
    exponent: int  # the largest number is 1.75 · 2^exponent


FORMATS = {"e4m3": _Format(jnp.float8_e4m3fn, 8), "e5m2": _Format(jnp.float8_e5m2, 15)}


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
      largest: max|x|, where it is known: that saves a pass over x.
      implementation: "pallas" (a product of FP8 operands, which XLA gives to cuBLAS; no kernel is launched) or "xla" (the
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

    The other arguments are those of `fp8_times_transposed`.
    """
    _check("fp8_times", y.shape[-1], codes, scales, 0)
    _check_format(format)
    fast = launch.resolve(implementation) == "pallas"
    return _times(y, codes, scales, largest, format, jnp.dtype(dtype or y.dtype), fast)


def round_to_fp8(
    x: jax.Array, format: Format = "e4m3", largest: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(codes, scale): x = scale codes but for rounding, the scale the smallest power of two for which they fit.

    A value that is not finite makes the scale NaN, or, where max|x| is given as `largest`, its code.
    """
    if largest is None:
        largest = jnp.max(jnp.abs(x), initial=0).astype(jnp.float32)
    scale, inverse = power_of_two_scale(largest, format)
    return (x.astype(jnp.float32) * inverse).astype(FORMATS[format].dtype), scale


def dequantize(codes: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """The weight [out, in] of codes and scales [] or [out], rounded once."""
    scales = scales[:, None] if scales.ndim else scales
    return (codes.astype(jnp.float32) * scales).astype(dtype)


def power_of_two_scale(largest: Any, format: Format) -> tuple[Any, Any]:
    """(k, 1 / k): the smallest power of two with largest / k <= the largest number of the format, in exact arithmetic.

    On the host for numpy, on the device for jax. Powers are kept from 2^-126 to 2^126, which fp32 and bf16 hold without losing bits.
    """
    host = isinstance(largest, np.ndarray | np.generic)
    xp: Any = np if host else jnp
    bits = xp.asarray(largest, np.float32).view(np.int32)
    # A mantissa over 1.75 carries into the exponent.
    biased = ((bits + np.int32(0x1FFFFF)) >> 23) - np.int32(FORMATS[format].exponent)
    biased = xp.minimum(xp.maximum(biased, np.int32(1)), np.int32(253))
    scale, inverse = ((exponent << 23).view(np.float32) for exponent in (biased, 254 - biased))
    return xp.where(largest < np.inf, scale, np.float32(np.nan)), inverse


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
    rounded, scale = round_to_fp8(x, "e4m3", largest)
    return _product(rounded, codes, 1, scale * scales, dtype, fast)


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


def _product(a, codes, axis, scale, dtype, fast):
    """scale (a · codes), contracted over an axis of codes; scale fp32 [], or [out] for the columns of the result."""
    dims = (((a.ndim - 1,), (axis,)), ((), ()))
    if not fast:
        a, codes = a.astype(jnp.float32), codes.astype(jnp.float32)
        product = jax.lax.dot_general(a, codes, dims, preferred_element_type=jnp.float32)
        return (product * scale).astype(dtype)
    # XLA hands a scalar factor in the dtype of the product to cuBLAS, and not one with a cast behind it. fp16 does not
    # reach as far as scales do.
    narrow = scale.ndim == 0 and dtype != jnp.float16
    if axis == 0:
        codes = fp8_transpose(codes, implementation="pallas")
        dims = (((a.ndim - 1,), (1,)), ((), ()))
    product = jax.lax.dot_general(
        a, codes, dims, preferred_element_type=dtype if narrow else jnp.float32
    )
    return (product * scale.astype(product.dtype)).astype(dtype)
