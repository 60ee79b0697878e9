"""Pieces that the flash attention kernels share: products, masked tiles, and the walk over visible blocks.

Blocks need not divide the array and head dims need not be powers of two: Triton's values must be, and before jax 0.12
nothing masks a last block on a GPU, so every load and store masks by hand.
"""

import dataclasses
import math
import struct
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.pallas_kernels.attention_blocks import AttentionBlocks
from pronghorn.pallas_kernels.tile_operations import ptx, tile_product

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What is static in one attention call."""

    scale: float
    softcap: float | None
    sliding_window: int | None  # only where there are no segments: else the window is inside the bounds
    blocks: AttentionBlocks
    native: bool  # compiled for a GPU and not interpreted: inline PTX and tf32 products exist

    @property
    def base2(self) -> float:
        """Factor from `scores` to logits in base 2."""
        return (self.scale if self.softcap is None else self.softcap) * LOG2_E


def dot(a: jax.Array, b: jax.Array, contract, spec: AttentionSpec) -> jax.Array:
    """`tile_product` of one attention call."""
    return tile_product(a, b, contract, native=spec.native)


def exp2(x: jax.Array, spec: AttentionSpec) -> jax.Array:
    """2^x by the hardware's instruction alone; results below 2^-126 become 0.

    Left to the compiler, each exponential is four instructions: it scales the argument for the sake of subnormal
    results, which no softmax can tell from 0. That was a quarter of the forward kernel's inner loop.
    """
    if not spec.native:
        return jnp.exp2(x)
    return ptx("ex2.approx.ftz.f32 $0, $1;", x)


def exponentials(s: jax.Array, spec: AttentionSpec, offset: jax.Array) -> jax.Array:
    """2^(base2 s − offset), in two instructions (left alone, it compiles to five)."""
    if not spec.native:
        return jnp.exp2(s * spec.base2 - offset)
    code = f"{{.reg .f32 t; fma.rn.ftz.f32 t, $1, {_hex(spec.base2)}, $2; ex2.approx.ftz.f32 $0, t;}}"
    return ptx(code, s, jnp.broadcast_to(-offset, s.shape))


def scores(qk: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Products as they are, or tanh(scale qk / softcap), by 1 − 2 / (1 + exp 2x): it saturates without overflow."""
    if spec.softcap is None:
        return qk
    factor = 2.0 * LOG2_E * spec.scale / spec.softcap
    if not spec.native:
        return 1.0 - 2.0 / (1.0 + jnp.exp2(qk * factor))
    # tanh.approx is one instruction and too coarse: 2^-11 of a cap of 50 is 2 % of a probability.
    return ptx(
        f"{{.reg .f32 t; mul.ftz.f32 t, $1, {_hex(factor)}; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, 0f3F800000; "
        "rcp.approx.ftz.f32 t, t; fma.rn.ftz.f32 $0, t, 0fC0000000, 0f3F800000;}",
        qk,
    )


def _hex(value: float) -> str:
    """A PTX literal."""
    return "0f" + struct.pack(">f", value).hex()


def _mask(shape: tuple[int, int], start, seq_len: int | None, head_dim: int) -> jax.Array | None:
    """True inside the array; seq_len None: the rows are known to be inside."""
    mask = None
    if seq_len is not None and seq_len % shape[0] != 0:
        mask = jnp.broadcast_to((start + jnp.arange(shape[0], dtype=jnp.int32) < seq_len)[:, None], shape)
    if head_dim != shape[1]:
        columns = jnp.broadcast_to((jnp.arange(shape[1], dtype=jnp.int32) < head_dim)[None, :], shape)
        mask = columns if mask is None else mask & columns
    return mask


def load_tile(ref, head, start, rows: int, seq_len: int | None, head_dim: int) -> jax.Array:
    """Rows [start, start + rows) of a [seq, padded] ref (or of one head of [seq, heads, padded]); 0 outside."""
    view = ref.at[pl.ds(start, rows), :] if head is None else ref.at[pl.ds(start, rows), head, :]
    mask = _mask((rows, ref.shape[-1]), start, seq_len, head_dim)
    return triton.load(view) if mask is None else triton.load(view, mask=mask, other=0.0)


def store_tile(ref, start, value: jax.Array, seq_len: int, head_dim: int) -> None:
    mask = _mask((value.shape[0], value.shape[1]), start, seq_len, head_dim)
    triton.store(ref.at[pl.ds(start, value.shape[0]), :], value.astype(ref.dtype), mask=mask)


def load_vector(ref, head, start, rows: int, seq_len: int) -> jax.Array:
    """Entries [start, start + rows) of a [seq] ref (or of one head of [heads, seq]); 0 outside."""
    view = ref.at[pl.ds(start, rows)] if head is None else ref.at[head, pl.ds(start, rows)]
    if seq_len % rows == 0:
        return triton.load(view)
    inside = start + jnp.arange(rows, dtype=jnp.int32) < seq_len
    return triton.load(view, mask=inside, other=jnp.zeros((), ref.dtype))


@dataclasses.dataclass(frozen=True)
class BlockRange:
    """Blocks [start, end) hold a visible pair; in [full, full_end) every pair is visible."""

    start: jax.Array
    full: jax.Array
    full_end: jax.Array
    end: jax.Array
    left_edge: bool  # False: start == full is known when compiling
    right_edge: bool  # False: full_end == end is known

    @classmethod
    def ordered(cls, start, full, full_end, end, *, left_edge: bool, right_edge: bool) -> "BlockRange":
        """With start <= full <= full_end <= end enforced."""
        full = jnp.minimum(jnp.maximum(full, start), end)
        return cls(start, full, jnp.minimum(jnp.maximum(full_end, full), end), end, left_edge, right_edge)

    @property
    def num_whole(self):
        return self.full_end - self.full

    @property
    def num_edge(self):
        return (self.full - self.start) + (self.end - self.full_end)

    def whole(self, i):
        return self.full + i

    def edge(self, i):
        if not self.left_edge:
            return self.full_end + i
        if not self.right_edge:
            return self.start + i
        before = self.full - self.start
        return jnp.where(i < before, self.start + i, self.full_end + (i - before))


class KeyInterval:
    """The keys that a block of queries sees: per-row first key, and the blocks of keys to walk."""

    def __init__(self, k_start_ref, q0, block_q: int, block_k: int, seq_len: int, window: int | None):
        self.first: jax.Array | None = None
        self.rows = q0 + jnp.arange(block_q, dtype=jnp.int32)
        q_last = jnp.minimum(q0 + (block_q - 1), seq_len - 1)
        if k_start_ref is not None:
            self.first = load_vector(k_start_ref, None, q0, block_q, seq_len)
            low, high = k_start_ref[q0], k_start_ref[q_last]
        elif window is not None:
            self.first = self.rows - (window - 1)
            low, high = jnp.maximum(q0 - (window - 1), 0), jnp.maximum(q_last - (window - 1), 0)
        else:
            low = high = jnp.int32(0)
        self.blocks = BlockRange.ordered(
            lax.div(low, block_k),
            lax.div(high + (block_k - 1), block_k),
            lax.div(q0 + 1, block_k),
            lax.div(q_last + block_k, block_k),
            left_edge=self.first is not None,
            right_edge=True,
        )

    def visible(self, k0, block_k: int) -> jax.Array:
        keys = (k0 + jnp.arange(block_k, dtype=jnp.int32))[None, :]
        seen = keys <= self.rows[:, None]
        return seen if self.first is None else seen & (keys >= self.first[:, None])


def walk(blocks: "BlockRange", body: Callable[..., Any], carry, *, heads: int = 1, split: bool = True):
    """carry = body(block, head, carry, edge) over `heads` times the blocks: whole ones first, then the edges.

    split False: one loop that masks every block, half the code to compile.
    """
    passes = [(False, blocks.num_whole, blocks.whole), (True, blocks.num_edge, blocks.edge)]
    if not split:
        passes = [(True, blocks.end - blocks.start, lambda i: blocks.start + i)]
    for edge, count, position in passes:

        def step(i, carry, edge=edge, position=position):
            return body(position(i), jnp.int32(0), carry, edge)

        def grouped(_, carry, edge=edge, count=count, position=position):
            i, head, carry = carry
            carry = body(position(i), head, carry, edge)
            last = i + 1 == count
            return jnp.where(last, 0, i + 1), jnp.where(last, head + 1, head), carry

        if heads == 1:
            carry = lax.fori_loop(0, count, step, carry)
        else:
            # One flat loop over heads and blocks: nested loops would drain the load pipeline between heads. Position
            # and head are counted along: dividing the turn by `count` took a tenth of the loop's instructions.
            carry = lax.fori_loop(0, count * heads, grouped, (jnp.int32(0), jnp.int32(0), carry))[2]
    return carry
