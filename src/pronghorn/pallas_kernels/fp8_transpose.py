"""The transposed copy of a matrix of bytes: FP8 codes [m, n] -> [n, m].

An H100 multiplies FP8 operands only where the inner side of both is contiguous, so that dY W needs Wᵀ in every step. A
transpose of bytes is bound by how many of them an instruction moves, not by memory: here four bytes move at a time. A
word holds four columns of one row; four words of four rows, one below the other, become four words that each hold four
rows of one column,

    t0 = a0₀ a1₀ a0₂ a1₂    t1 = a0₁ a1₁ a0₃ a1₃    u0, u1 the same of a2 and a3
    b0 = a0₀ a1₀ a2₀ a3₀    b1 = a0₁ a1₁ a2₁ a3₁    b2 = a0₂ a1₂ a2₂ a3₂    b3 = a0₃ a1₃ a2₃ a3₃

and the rest is a transpose of words, which a tile makes in shared memory. Where a side is no multiple of four XLA
transposes. There is no gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch

# Words of a tile, down and across: 128 rows and 128 columns of bytes, whole 128-byte lines on both sides.
BLOCK = (32, 32)
NUM_WARPS = 4


def fp8_transpose(codes: jax.Array, *, implementation: launch.Implementation | None = None) -> jax.Array:
    """codes [m, n] of any 8-bit dtype -> [n, m].

    Args:
      codes: a matrix.
      implementation: "pallas" or "xla" (the oracle); None takes the kernel on a GPU.

    Raises:
      InputError: for anything but a matrix of bytes.
    """
    if codes.ndim != 2 or codes.dtype.itemsize != 1:
        raise InputError(f"fp8_transpose: codes {codes.dtype}{codes.shape} must be a matrix of bytes.")
    if launch.resolve(implementation) == "xla" or any(size % 4 or not size for size in codes.shape):
        return fp8_transpose_reference(codes)
    return _launch(codes)


def fp8_transpose_reference(codes: jax.Array) -> jax.Array:
    """The oracle of `fp8_transpose`."""
    return codes.T


def _kernel(x_ref, y_ref, *, block):
    down = pl.program_id(0) * block[0] + jnp.arange(block[0])
    across = pl.program_id(1) * block[1] + jnp.arange(block[1])
    mask = (down[:, None] < y_ref.shape[1]) & (across[None, :] < x_ref.shape[1])

    def load(row: int) -> Any:
        return triton.load(x_ref.at[4 * down[:, None] + row, across[None, :]], mask=mask, other=0)

    even, odd = np.uint32(0x00FF00FF), np.uint32(0xFF00FF00)
    low, high = np.uint32(0x0000FFFF), np.uint32(0xFFFF0000)
    pairs = []
    for first, second in ((load(0), load(1)), (load(2), load(3))):
        pairs.append(((first & even) | ((second & even) << 8), ((first >> 8) & even) | (second & odd)))
    for column in range(4):
        top, bottom = (pair[column % 2] for pair in pairs)
        word = (top >> 16) | (bottom & high) if column > 1 else (top & low) | (bottom << 16)
        triton.store(y_ref.at[4 * across[None, :] + column, down[:, None]], word, mask=mask)


def _launch(codes: jax.Array) -> jax.Array:
    rows, columns = codes.shape
    words = jax.lax.bitcast_convert_type(codes.reshape(rows, columns // 4, 4), jnp.uint32)
    block = tuple(
        min(side, launch.next_power_of_2(size // 4)) for side, size in zip(BLOCK, codes.shape, strict=True)
    )
    transposed = launch.pallas_call(
        functools.partial(_kernel, block=block),
        name="fp8_transpose",
        grid=(launch.cdiv(rows // 4, block[0]), launch.cdiv(columns // 4, block[1])),
        out_shape=jax.ShapeDtypeStruct((columns, rows // 4), jnp.uint32),
        num_warps=NUM_WARPS,
    )(words)
    return jax.lax.bitcast_convert_type(transposed, codes.dtype).reshape(columns, rows)
