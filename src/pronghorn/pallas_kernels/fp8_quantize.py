"""An array in FP8, with a scale a row, a block of 128 x 128, or one for the tensor.

    k = the smallest power of two with max|x| / k <= the format's largest number      q = e4m3(x / k)

the maximum over the row, the block, or all. Dividing by a power of two changes no mantissa: a value is rounded the same
way whatever else shares its scale, down to 2^-14 of the largest that does. A kernel finds the scales of rows and blocks
and rounds in one pass, what it reads staying in registers, where XLA reads twice. One scale a tensor leaves no other
way, so that one is XLA's, unless the largest magnitude is known. There is no gradient.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch

Format = Literal["e4m3", "e5m2"]


class _Format(NamedTuple):
    dtype: Any
    exponent: int  # the largest number is 1.75 · 2^exponent


FORMATS = {"e4m3": _Format(jnp.float8_e4m3fn, 8), "e5m2": _Format(jnp.float8_e5m2, 15)}

BLOCK = 128
# Elements of a program that takes whole rows; a row that has more goes to the oracle.
ROW_ELEMENTS = 8192
MOST_COLUMNS = 32768


def power_of_two_scale(largest: Any, format: Format) -> tuple[Any, Any]:
    """(k, 1 / k): the smallest power of two with largest / k <= the largest number of the format, in exact arithmetic.

    On the host for numpy, on the device for jax. Powers are kept from 2^-126 to 2^126, which fp32 and bf16 hold without
    losing bits.
    """
    host = isinstance(largest, np.ndarray | np.generic)
    xp: Any = np if host else jnp
    bits = xp.asarray(largest, np.float32).view(np.int32)
    # A mantissa over 1.75 carries into the exponent.
    biased = ((bits + np.int32(0x1FFFFF)) >> 23) - np.int32(FORMATS[format].exponent)
    biased = xp.minimum(xp.maximum(biased, np.int32(1)), np.int32(253))
    scale, inverse = ((exponent << 23).view(np.float32) for exponent in (biased, 254 - biased))
    return xp.where(largest < np.inf, scale, np.float32(np.nan)), inverse


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


def fp8_quantize(
    x: jax.Array, scales: Literal["row", "block"], *, implementation: launch.Implementation | None = None
) -> tuple[jax.Array, jax.Array]:
    """(codes, scales) of x.

    Args:
      x: [..., columns] with a scale a row, [rows, columns] with a scale a block; bf16, fp16 or fp32.
      scales: "row" or "block".
      implementation: "pallas" or "xla" (the oracle); None takes the kernel on a GPU.

    Returns:
      e4m3 codes in the shape of x, and fp32 scales, x.shape[:-1] or [ceil(rows / 128), ceil(columns / 128)]; NaN where
      a value is not finite.

    Raises:
      InputError: unknown `scales`, or blocks of what is no matrix.
    """
    if scales not in ("row", "block") or (scales == "block" and x.ndim != 2):
        raise InputError(
            f"fp8_quantize: scales={scales!r} must be 'row', or 'block' for a matrix and not {x.shape}."
        )
    if (
        launch.resolve(implementation) == "xla"
        or not x.size
        or (scales == "row" and x.shape[-1] > MOST_COLUMNS)
    ):
        return fp8_quantize_reference(x, scales)
    return _launch(x, scales)


def fp8_quantize_reference(x: jax.Array, scales: Literal["row", "block"]) -> tuple[jax.Array, jax.Array]:
    """The oracle of `fp8_quantize`."""
    wide = x.astype(jnp.float32)
    if scales == "row":
        factors, inverses = power_of_two_scale(jnp.max(jnp.abs(wide), axis=-1, initial=0), "e4m3")
        return (wide * inverses[..., None]).astype(FORMATS["e4m3"].dtype), factors
    rows, columns = (launch.cdiv(size, BLOCK) for size in x.shape)
    padding = [(0, count * BLOCK - size) for count, size in zip((rows, columns), x.shape, strict=True)]
    blocks = jnp.pad(jnp.abs(wide), padding).reshape(rows, BLOCK, columns, BLOCK)
    factors, inverses = power_of_two_scale(jnp.max(blocks, axis=(1, 3)), "e4m3")
    return (wide * spread(inverses, x.shape)).astype(FORMATS["e4m3"].dtype), factors


def spread(scales: Any, shape: tuple[int, ...]) -> Any:
    """Scales of blocks, one for each element of a matrix of this shape."""
    return scales.repeat(BLOCK, axis=0)[: shape[0]].repeat(BLOCK, axis=1)[:, : shape[1]]


def _kernel(x_ref, codes_ref, scales_ref, *, block, of_rows):
    row, column = pl.program_id(0), pl.program_id(1)
    rows, columns = row * block[0] + jnp.arange(block[0]), column * block[1] + jnp.arange(block[1])
    mask = (rows[:, None] < x_ref.shape[0]) & (columns[None, :] < x_ref.shape[1])
    tile = (rows[:, None], columns[None, :])
    x = triton.load(x_ref.at[tile], mask=mask, other=0.0).astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=1)
    if of_rows:
        scale, inverse = power_of_two_scale(largest, "e4m3")
        triton.store(scales_ref.at[rows], scale, mask=rows < x_ref.shape[0])
        inverse = inverse[:, None]
    else:
        scale, inverse = power_of_two_scale(jnp.max(largest), "e4m3")
        scales_ref[row, column] = scale
    triton.store(codes_ref.at[tile], (x * inverse).astype(codes_ref.dtype), mask=mask)


def _launch(x: jax.Array, scales: str) -> tuple[jax.Array, jax.Array]:
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    grid: tuple[int, ...]
    of_scales: tuple[int, ...]
    if scales == "row":
        across = launch.next_power_of_2(width)
        block = (min(max(1, ROW_ELEMENTS // across), launch.next_power_of_2(rows)), across)
        grid, of_scales = (launch.cdiv(rows, block[0]), 1), (rows,)
    else:
        block = (BLOCK, BLOCK)
        grid = of_scales = launch.cdiv(rows, BLOCK), launch.cdiv(width, BLOCK)
    codes, factors = launch.pallas_call(
        functools.partial(_kernel, block=block, of_rows=scales == "row"),
        name="fp8_quantize",
        grid=grid,
        out_shape=(
            jax.ShapeDtypeStruct((rows, width), FORMATS["e4m3"].dtype),
            jax.ShapeDtypeStruct(of_scales, jnp.float32),
        ),
        num_warps=launch.warps_for(block[0] * block[1]),
    )(x.reshape(rows, width))
    return codes.reshape(x.shape), factors.reshape(x.shape[:-1]) if scales == "row" else factors
