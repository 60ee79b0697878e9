"""A matrix in FP8 (e4m3) with a scale a row or a block of 128 x 128, in one pass: what is read stays in registers.

    k_i = power_of_two_scale(max_j |x_ij|)      q_ij = e4m3(x_ij / k_i)

the maximum over the row, or over the block, the scale as in `fp8_product`. XLA reads the matrix twice, once for the
maxima and once for the cast; one scale a tensor leaves no other way, so that one is XLA's. There is no gradient.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.fp8_product import FORMATS, power_of_two_scale

BLOCK = 128
# Elements of a program that takes whole rows; a row that has more goes to the oracle.
ROW_ELEMENTS = 8192
MOST_COLUMNS = 32768


def fp8_quantize(
    x: jax.Array, scales: Literal["row", "block"], *, implementation: launch.Implementation | None = None
) -> tuple[jax.Array, jax.Array]:
    """(codes, scales) of x.

    Args:
      x: [..., columns] with a scale a row, [rows, columns] with a scale a block; bf16, fp16 or fp32.
      scales: "row" or "block".
      implementation: "pallas" or "xla" (the oracle); None takes the kernel on a GPU.

    Returns:
      e4m3 codes in the shape of x, and fp32 scales, x.shape[:-1] or [ceil(rows / 128), ceil(columns / 128)]; NaN where a
      value is not finite.

    Raises:
      InputError: unknown `scales`, or blocks of what is no matrix.
    """
    if scales not in ("row", "block") or (scales == "block" and x.ndim != 2):
        raise InputError(f"fp8_quantize: scales={scales!r} must be 'row', or 'block' for a matrix and not {x.shape}.")
    if launch.resolve(implementation) == "xla" or not x.size or (scales == "row" and x.shape[-1] > MOST_COLUMNS):
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
