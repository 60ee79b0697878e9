"""8 bits a value: blocks of 256 values share one fp32 scale, and a code is an entry of a dynamic map.

An array row by row in blocks of 256; T is the map of 256 ascending entries, with a sign or without, t its midpoints:

    a = max |x|        code = number of midpoints t below x / a         x' = T[code] a      in fp32, rounded once

the rule of bitsandbytes on a GPU (its CPU code looks values up on a grid of 65,536 points instead, which moves up to
0.2 % of the codes by one, and no value below 1.56e-5 a exists there). A block of zeros has a = 0 and comes back as
zeros. x / a is x times the rounded reciprocal of a, the same bits on every device.

Nothing is searched for. A map is seven decades of evenly spaced entries, twice as many in each: the code as a function
of x / a is, but for rounding, concave and piecewise linear, so it is the smallest of seven lines. Rounded down, that
is the code or the one below it (the largest deviation from a midpoint is 0.25 of a code), and one comparison with the
midpoint between the two decides. A dozen operations and one lookup, where a binary search takes eight lookups.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, section 2, https://arxiv.org/abs/2110.02861.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.dynamic_tables import (
    DYNAMIC_SIGNED,
    DYNAMIC_SIGNED_MIDPOINTS,
    DYNAMIC_UNSIGNED,
    DYNAMIC_UNSIGNED_MIDPOINTS,
)
from pronghorn.pallas_kernels.exact_division import over_scales

BLOCK = 256
BLOCKS_PER_PROGRAM = 16
WARPS = 8
ZERO_SIGNED = 127  # the code of zero in the map with a sign; without one it is 0


class Blockwise(NamedTuple):
    """An array in 8 bits.

    Attributes:
      codes: uint8, in the shape of the array.
      absmax: fp32 [ceil(elements / 256)].
    """

    codes: Any
    absmax: Any


def quantize_blockwise(
    x: jax.Array, *, signed: bool = True, implementation: launch.Implementation | None = None
) -> Blockwise:
    """An array in 8 bits.

    Args:
      x: any shape; bf16, fp16 or fp32.
      signed: the map with a sign; without one, x must not be negative.
      implementation: "pallas" or "xla" (the oracle); None takes the kernel on a GPU.
    """
    if launch.resolve(implementation) == "xla" or x.size == 0:
        return quantize_blockwise_reference(x, signed=signed)
    shapes = (
        jax.ShapeDtypeStruct((x.size,), jnp.uint8),
        jax.ShapeDtypeStruct((num_blocks(x.size),), jnp.float32),
    )
    codes, absmax = launch_by_blocks(
        functools.partial(_quantize_kernel, signed=signed), "quantize_blockwise", x.size, shapes
    )(lookup_table(), x.reshape(-1))
    return Blockwise(codes.reshape(x.shape), absmax)


def dequantize_blockwise(
    array: Blockwise,
    *,
    signed: bool = True,
    dtype: Any = jnp.float32,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """What the codes stand for, in their shape.

    Args:
      array: from `quantize_blockwise`, or a file.
      signed: which map.
      dtype: bf16, fp16 or fp32.
      implementation: see `quantize_blockwise`.

    Raises:
      InputError: where codes and scales do not fit each other.
    """
    codes, absmax = array
    if absmax.shape != (num_blocks(codes.size),):
        raise InputError(
            f"dequantize_blockwise: absmax {absmax.shape} must be ({num_blocks(codes.size)},) for {codes.size} codes "
            f"in blocks of {BLOCK}."
        )
    if launch.resolve(implementation) == "xla" or codes.size == 0:
        return dequantize_blockwise_reference(array, signed=signed, dtype=dtype)
    (flat,) = launch_by_blocks(
        functools.partial(_dequantize_kernel, signed=signed),
        "dequantize_blockwise",
        codes.size,
        (jax.ShapeDtypeStruct((codes.size,), dtype),),
    )(lookup_table(), codes.reshape(-1), absmax)
    return flat.reshape(codes.shape)


def quantize_blockwise_reference(x: jax.Array, *, signed: bool = True) -> Blockwise:
    """The oracle of `quantize_blockwise`."""
    blocks = jnp.pad(x.reshape(-1).astype(jnp.float32), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    midpoints = DYNAMIC_SIGNED_MIDPOINTS if signed else DYNAMIC_UNSIGNED_MIDPOINTS
    codes = jnp.searchsorted(midpoints, over_scales(blocks, absmax), side="left")
    return Blockwise(codes.astype(jnp.uint8).reshape(-1)[: x.size].reshape(x.shape), absmax)


def dequantize_blockwise_reference(array: Blockwise, *, signed: bool = True, dtype: Any = jnp.float32):
    """The oracle of `dequantize_blockwise`."""
    codes, absmax = array
    blocks = jnp.pad(codes.reshape(-1), (0, -codes.size % BLOCK)).reshape(-1, BLOCK)
    values = jnp.asarray(DYNAMIC_SIGNED if signed else DYNAMIC_UNSIGNED)[blocks.astype(jnp.int32)]
    flat = (values * absmax[:, None]).reshape(-1)[: codes.size]
    return flat.reshape(codes.shape).astype(dtype)


def num_blocks(elements: int) -> int:
    """Scales of an array of so many elements."""
    return launch.cdiv(elements, BLOCK)


def lookup_table() -> jax.Array:
    """fp32 [1024]: both maps and both lists of midpoints, the one operand that the kernels look values up in."""
    last = np.full(1, np.inf, np.float32)
    return jnp.asarray(
        np.concatenate(
            [
                *(DYNAMIC_SIGNED, DYNAMIC_UNSIGNED),
                *(DYNAMIC_SIGNED_MIDPOINTS, last, DYNAMIC_UNSIGNED_MIDPOINTS, last),
            ]
        )
    )


def decoded(table_ref: Any, codes: jax.Array, *, signed: bool) -> jax.Array:
    """In a kernel: the entries of a map, fp32; codes int32."""
    return triton.load(table_ref.at[codes + (0 if signed else 256)])


def encoded(table_ref: Any, x: jax.Array, *, signed: bool) -> jax.Array:
    """In a kernel: the codes of fp32 values that are divided by their scale, int32."""
    magnitude = jnp.abs(x) if signed else x
    # Three decades down everything is the same but for the factors 1000 and 8: four lines do for seven.
    low = magnitude < 1e-3
    enlarged = jnp.where(low, magnitude * 1e3, magnitude)
    lines = (intercept + slope * enlarged for intercept, slope in _lines(signed))
    place = functools.reduce(jnp.minimum, lines) * jnp.where(low, 0.125, 1.0) - (0.5 if signed else 1.5)
    # A lookup outside of the list would be a fault, whatever x is.
    place = jnp.minimum(place, 127.5 if signed else 254.5)
    if signed:
        place = 127.0 + _with_sign_of(x, place)
    lower = place.astype(jnp.int32)
    midpoint = triton.load(table_ref.at[lower + (512 if signed else 768)])
    return lower + (x > midpoint).astype(jnp.int32)


def _with_sign_of(x: jax.Array, magnitude: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x80000000)
    return jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(magnitude, jnp.uint32) | bits, jnp.float32
    )


def _lines(signed: bool) -> list[tuple[float, float]]:
    """Intercept and slope of the upper four decades.

    Decade i of seven reaches from 10^(i-7) to 10^(i-6). With a sign it has n = 2^i entries, the n-th to the
    (2 n - 1)-th above zero, at y = 0.1 + 0.9 (j + 0.5) / n of its upper end: the place n + j is n (8/9 + y / 0.9) -
    1/2. Without a sign there are twice as many, and the first is the second entry above zero counted from one.
    """
    entries = [2.0 ** (i if signed else i + 1) for i in range(3, 7)]
    return [(n * 8 / 9, n * 10.0 ** (3 - i) / 0.9) for i, n in enumerate(entries)]


class Tile(NamedTuple):
    """What one program of a kernel over blocks works on.

    Attributes:
      blocks: int32 [blocks of a program], and the mask of those that exist, or None where all do.
      elements: int32 [blocks of a program, 256] and its mask, alike.
    """

    blocks: Any
    block_mask: Any
    elements: Any
    mask: Any

    def load(self, ref: Any) -> jax.Array:
        """The tile of an array [elements]; what does not exist is 0."""
        return _load(ref, self.elements, self.mask)

    def load_scales(self, ref: Any) -> jax.Array:
        """The scales of the tile's blocks, from [blocks of the array]."""
        return _load(ref, self.blocks, self.block_mask)

    def existing(self, values: jax.Array) -> jax.Array:
        """Zeros where there is no element: the code 0 of one that does not exist is no zero in the map with a sign."""
        return values if self.mask is None else jnp.where(self.mask, values, 0.0)

    def store(self, ref: Any, values: jax.Array) -> None:
        triton.store(ref.at[self.elements], values.astype(ref.dtype), mask=self.mask)

    def store_scales(self, ref: Any, values: jax.Array) -> None:
        triton.store(ref.at[self.blocks], values, mask=self.block_mask)


def _load(ref, places, mask):
    if mask is None:
        return triton.load(ref.at[places])
    return triton.load(ref.at[places], mask=mask, other=0)


def tile_of_program(count: int, blocks_per_program: int) -> Tile:
    """In a kernel over an array of `count` elements: this program's tile.

    Masks only where the array does not fill its last tile: without them loads are as wide as they can be.
    """
    blocks = pl.program_id(0) * blocks_per_program + jnp.arange(blocks_per_program)
    elements = blocks[:, None] * BLOCK + jnp.arange(BLOCK)[None, :]
    if count % (BLOCK * blocks_per_program) == 0:
        return Tile(blocks, None, elements, None)
    return Tile(blocks, blocks < num_blocks(count), elements, elements < count)


def launch_by_blocks(
    kernel: Any,
    name: str,
    count: int,
    out_shape: tuple[jax.ShapeDtypeStruct, ...],
    input_output_aliases: dict[int, int] | None = None,
) -> Any:
    """A launch whose programs share the blocks of an array of `count` elements; the kernel is told both sizes."""
    blocks_per_program = min(BLOCKS_PER_PROGRAM, launch.next_power_of_2(num_blocks(count)))
    return launch.pallas_call(
        functools.partial(kernel, count=count, blocks_per_program=blocks_per_program),
        name=name,
        grid=(launch.cdiv(num_blocks(count), blocks_per_program),),
        out_shape=out_shape,
        num_warps=max(1, WARPS * blocks_per_program // BLOCKS_PER_PROGRAM),
        input_output_aliases=input_output_aliases,
    )


def _quantize_kernel(table_ref, x_ref, codes_ref, absmax_ref, *, signed, count, blocks_per_program):
    tile = tile_of_program(count, blocks_per_program)
    x = tile.load(x_ref).astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=1)
    tile.store(codes_ref, encoded(table_ref, over_scales(x, absmax), signed=signed))
    tile.store_scales(absmax_ref, absmax)


def _dequantize_kernel(table_ref, codes_ref, absmax_ref, out_ref, *, signed, count, blocks_per_program):
    tile = tile_of_program(count, blocks_per_program)
    values = decoded(table_ref, tile.load(codes_ref).astype(jnp.int32), signed=signed)
    tile.store(out_ref, values * tile.load_scales(absmax_ref)[:, None])


def stored_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of an array of this shape in 8 bits."""
    return math.prod(shape) + 4 * num_blocks(math.prod(shape))
