"""The three Triton kernels of flash attention: forward, dk and dv, dq.

Notation: t a query, k a key, s_tk = scale q_t·k_k (soft-capped: softcap tanh(s / softcap)), and
    lse_t = log(exp(sink) + Σ_k exp s_tk),  p_tk = exp(s_tk − lse_t),  o_t = Σ_k p_tk v_k
with the sums over the interval of keys that t sees (attention_bounds). Backward, with delta_t = o_t·do_t:
    dv_k = Σ_t p_tk do_t,  ds_tk = p_tk (do_t·v_k − delta_t) [(1 − tanh²) where soft-capped],
    dk_k = scale Σ_t ds_tk q_t,  dq_t = scale Σ_k ds_tk k_k,  dsink = −Σ_t exp(sink − lse_t) delta_t.
Logits are kept in base 2 (times log2 e), so exp is the hardware's exp2; `logsumexp` here is in base 2 too.

Every kernel walks the blocks of the other axis in two loops: blocks that are visible as a whole (no mask), then the
blocks at either edge of the interval (masked). The online softmax does not mind the order. Programs with the most
blocks start first: heads vary fastest, query blocks run backwards. No atomics: a rerun is bit-exact.

Sources: Dao, FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2; Milakov and Gimelshein, Online normalizer
calculation for softmax (arXiv:1805.02867).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.pallas_kernels.attention_tiles import (
    LOG2_E,
    AttentionSpec,
    BlockRange,
    KeyInterval,
    dot,
    exp2,
    exponentials,
    load_tile,
    load_vector,
    scores,
    store_tile,
    walk,
)
from pronghorn.pallas_kernels.launch import cdiv, next_power_of_2, pallas_call
from pronghorn.pallas_kernels.tile_operations import ROWS_BY_COLUMNS, ROWS_BY_ROWS
from pronghorn.pallas_kernels.tuned import multiprocessors

# Start of the running maximum: finite, so that (−inf) − (maximum) is never NaN in a row that saw no key yet.
LOWEST = -1e30


def _split(operand: jax.Array) -> bool:
    """Whether unmasked blocks get a loop of their own: fp32 kernels compile slowly and are there for exactness."""
    return operand.dtype != jnp.float32


# ---- forward ----


def _forward_kernel(
    q_ref,
    k_ref,
    v_ref,
    k_start_ref,
    sinks_ref,
    o_ref,
    lse_ref,
    *,
    spec: AttentionSpec,
    seq_len: int,
    head_dim: int,
):
    """Grid (head, batch, query block backwards). q, k, v, o: [seq, padded]; k_start, lse: [seq]; sinks: [heads]."""
    b = spec.blocks.forward
    q0 = (cdiv(seq_len, b.block_q) - 1 - pl.program_id(2)) * b.block_q
    keys = KeyInterval(k_start_ref, q0, b.block_q, b.block_k, seq_len, spec.sliding_window)
    q = load_tile(q_ref, None, q0, b.block_q, seq_len, head_dim)

    accumulator = jnp.zeros((b.block_q, q_ref.shape[-1]), jnp.float32)
    if sinks_ref is None:
        maximum = jnp.full((b.block_q,), LOWEST, jnp.float32)
        total = jnp.zeros((b.block_q,), jnp.float32)
    else:
        # The sink is a key with value 0 that every query has already seen.
        sink = sinks_ref[pl.program_id(0)].astype(jnp.float32) * LOG2_E
        highest = jnp.maximum(sink, LOWEST)
        maximum = jnp.zeros((b.block_q,), jnp.float32) + highest
        total = jnp.zeros((b.block_q,), jnp.float32) + exp2(
            jnp.zeros((b.block_q,), jnp.float32) + (sink - highest), spec
        )

    def body(block, _, carry, edge):
        accumulator, maximum, total = carry
        k0 = block * b.block_k
        k = load_tile(k_ref, None, k0, b.block_k, seq_len if edge else None, head_dim)
        s = scores(dot(q, k, ROWS_BY_ROWS, spec), spec)
        if edge:
            s = jnp.where(keys.visible(k0, b.block_k), s, float("-inf"))
        new_maximum = jnp.maximum(maximum, jnp.max(s, axis=1) * spec.base2)
        p = exponentials(s, spec, new_maximum[:, None])
        correction = exp2(maximum - new_maximum, spec)
        total = total * correction + jnp.sum(p, axis=1)
        v = load_tile(v_ref, None, k0, b.block_k, seq_len if edge else None, head_dim)
        accumulator = accumulator * correction[:, None] + dot(p.astype(v.dtype), v, ROWS_BY_COLUMNS, spec)
        return accumulator, new_maximum, total

    accumulator, maximum, total = walk(keys.blocks, body, (accumulator, maximum, total), split=_split(q))
    store_tile(o_ref, q0, accumulator * (1.0 / total)[:, None], seq_len, head_dim)
    inside = None if seq_len % b.block_q == 0 else keys.rows < seq_len
    triton.store(lse_ref.at[pl.ds(q0, b.block_q)], maximum + jnp.log2(total), mask=inside)


# ---- backward ----


def _dq_kernel(
    q_ref, k_ref, v_ref, o_ref, do_ref, lse_ref, k_start_ref, dq_ref, delta_ref,
    *, spec, seq_len: int, head_dim: int,
):  # fmt: skip
    """Grid (head, batch, query block backwards). Refs: [seq, padded]; lse, delta, k_start: [seq]."""
    b = spec.blocks.dq
    q0 = (cdiv(seq_len, b.block_q) - 1 - pl.program_id(2)) * b.block_q
    keys = KeyInterval(k_start_ref, q0, b.block_q, b.block_k, seq_len, spec.sliding_window)
    q = load_tile(q_ref, None, q0, b.block_q, seq_len, head_dim)
    do = load_tile(do_ref, None, q0, b.block_q, seq_len, head_dim)
    lse = load_vector(lse_ref, None, q0, b.block_q, seq_len)
    o = load_tile(o_ref, None, q0, b.block_q, seq_len, head_dim)
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=1)
    inside = None if seq_len % b.block_q == 0 else keys.rows < seq_len
    triton.store(delta_ref.at[pl.ds(q0, b.block_q)], delta, mask=inside)

    def body(block, _, dq, edge):
        k0 = block * b.block_k
        k = load_tile(k_ref, None, k0, b.block_k, seq_len if edge else None, head_dim)
        v = load_tile(v_ref, None, k0, b.block_k, seq_len if edge else None, head_dim)
        qk, dp = dot(q, k, ROWS_BY_ROWS, spec), dot(do, v, ROWS_BY_ROWS, spec)
        s = scores(qk, spec)
        p = exponentials(s, spec, lse[:, None])
        if edge:
            p = jnp.where(keys.visible(k0, b.block_k), p, 0.0)
        ds = p * (dp - delta[:, None])
        if spec.softcap is not None:
            ds = ds * (1.0 - s * s)
        return dq + dot(ds.astype(k.dtype), k, ROWS_BY_COLUMNS, spec)

    dq = jnp.zeros((b.block_q, q_ref.shape[-1]), jnp.float32)
    dq = walk(keys.blocks, body, dq, split=_split(q))
    store_tile(dq_ref, q0, dq * spec.scale, seq_len, head_dim)


def _dkdv_kernel(
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, q_end_ref, dk_ref, dv_ref,
    *, spec, seq_len: int, head_dim: int, heads: int,
):  # fmt: skip
    """Grid (part of a group of query heads, batch, key block); sums over the part's `heads` query heads.

    q, do: [seq, all heads, padded]; k, v, dk, dv: [seq, padded]; lse, delta: [all heads, seq]; q_end: [seq].
    Tiles are transposed, [keys, queries], so that no probability tile is transposed between two products.
    """
    b = spec.blocks.dkdv
    k0 = pl.program_id(2) * b.block_k
    k_last = jnp.minimum(k0 + (b.block_k - 1), seq_len - 1)
    keys = k0 + jnp.arange(b.block_k, dtype=jnp.int32)
    end = None
    low = high = jnp.int32(seq_len)
    if q_end_ref is not None:
        end = load_vector(q_end_ref, None, k0, b.block_k, seq_len)
        low, high = q_end_ref[k0], q_end_ref[k_last]
    elif spec.sliding_window is not None:
        end = keys + spec.sliding_window
        low = jnp.minimum(k0 + spec.sliding_window, seq_len)
        high = jnp.minimum(k_last + spec.sliding_window, seq_len)
    blocks = BlockRange.ordered(
        lax.div(k0, b.block_q),
        lax.div(k0 + (b.block_k - 1 + b.block_q - 1), b.block_q),
        lax.div(low, b.block_q),
        lax.div(high + (b.block_q - 1), b.block_q),
        left_edge=True,
        right_edge=end is not None or seq_len % b.block_q != 0,
    )
    k = load_tile(k_ref, None, k0, b.block_k, seq_len, head_dim)
    v = load_tile(v_ref, None, k0, b.block_k, seq_len, head_dim)
    first_head = pl.program_id(0) * heads

    def body(block, head, carry, edge):
        dk, dv = carry
        head, q0 = first_head + head, block * b.block_q
        q = load_tile(q_ref, head, q0, b.block_q, seq_len if edge else None, head_dim)
        do = load_tile(do_ref, head, q0, b.block_q, seq_len if edge else None, head_dim)
        lse = load_vector(lse_ref, head, q0, b.block_q, seq_len)
        delta = load_vector(delta_ref, head, q0, b.block_q, seq_len)
        # Both products before the exponentials, which the compiler then takes between the second one's instructions.
        qk, dp = dot(k, q, ROWS_BY_ROWS, spec), dot(v, do, ROWS_BY_ROWS, spec)
        s = scores(qk, spec)
        p = exponentials(s, spec, lse[None, :])
        if edge:
            rows = (q0 + jnp.arange(b.block_q, dtype=jnp.int32))[None, :]
            seen = rows >= keys[:, None]  # rows past the sequence add nothing: their q, do and delta are 0
            p = jnp.where(seen if end is None else seen & (rows < end[:, None]), p, 0.0)
        dv = dv + dot(p.astype(do.dtype), do, ROWS_BY_COLUMNS, spec)
        ds = p * (dp - delta[None, :])
        if spec.softcap is not None:
            ds = ds * (1.0 - s * s)
        return dk + dot(ds.astype(q.dtype), q, ROWS_BY_COLUMNS, spec), dv

    zeros = jnp.zeros((b.block_k, k_ref.shape[-1]), jnp.float32)
    dk, dv = walk(blocks, body, (zeros, zeros), heads=heads, split=_split(k))
    store_tile(dk_ref, k0, dk * spec.scale, seq_len, head_dim)
    store_tile(dv_ref, k0, dv, seq_len, head_dim)


# ---- launches ----
#
# Each is a jit of its own because jax never drops a bare pallas_call whose outputs nobody uses, and does drop a jit:
# so rematerialisation runs no second forward, and dk, dv or dq that nobody asked for costs nothing. It also makes
# layers of one shape share a trace.


def _specs(q: jax.Array, k: jax.Array):
    """BlockSpecs of a grid (head, batch, block): one head of q-like, of k-like, one row of [batch, head, seq]."""
    seq_len, group = q.shape[1], q.shape[2] // k.shape[2]
    tile = (None, seq_len, None, max(16, next_power_of_2(q.shape[3])))
    return (
        pl.BlockSpec(tile, lambda h, b, i: (b, 0, h, 0)),
        pl.BlockSpec(tile, lambda h, b, i: (b, 0, h if group == 1 else lax.div(h, group), 0)),
        pl.BlockSpec((None, None, seq_len), lambda h, b, i: (b, h, 0)),
    )


def _bound_spec(bound: jax.Array | None) -> pl.BlockSpec | None:
    return None if bound is None else pl.BlockSpec((None, bound.shape[1]), lambda h, b, i: (b, 0))


@functools.partial(jax.jit, static_argnames="spec")
def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_start: jax.Array | None,
    sinks: jax.Array | None,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array]:
    """(o [batch, seq, heads, head_dim] in q's dtype, base-2 logsumexp fp32 [batch, heads, seq])."""
    batch, seq_len, num_heads, head_dim = q.shape
    query, key, row = _specs(q, k)
    b = spec.blocks.forward
    return pallas_call(
        functools.partial(_forward_kernel, spec=spec, seq_len=seq_len, head_dim=head_dim),
        name="flash_attention_forward",
        grid=(num_heads, batch, cdiv(seq_len, b.block_q)),
        in_specs=[
            query, key, key, _bound_spec(k_start),
            None if sinks is None else pl.BlockSpec((num_heads,), lambda h, b, i: (0,)),
        ],
        out_specs=(query, row),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, seq_len), jnp.float32),
        ),
        num_warps=b.num_warps,
        num_stages=b.num_stages,
    )(q, k, v, k_start, sinks)  # fmt: skip


@functools.partial(jax.jit, static_argnames="spec")
def backward_dq(q, k, v, o, do, lse, k_start, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """(dq, like q; delta, like lse). lse in base 2: fp32 [batch, heads, seq]."""
    batch, seq_len, num_heads, head_dim = q.shape
    query, key, row = _specs(q, k)
    b = spec.blocks.dq
    return pallas_call(
        functools.partial(_dq_kernel, spec=spec, seq_len=seq_len, head_dim=head_dim),
        name="flash_attention_dq",
        grid=(num_heads, batch, cdiv(seq_len, b.block_q)),
        in_specs=[query, key, key, query, query, row, _bound_spec(k_start)],
        out_specs=(query, row),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)),
        num_warps=b.num_warps,
        num_stages=b.num_stages,
    )(q, k, v, o, do, lse, k_start)


def _group_parts(programs: int, group: int) -> int:
    """Into how many parts a group of query heads is cut, so that every multiprocessor has work; a divisor of it."""
    parts = 1
    while programs * parts < multiprocessors() and group % (parts * 2) == 0:
        parts *= 2
    return parts


@functools.partial(jax.jit, static_argnames="spec")
def backward_dkdv(q, k, v, do, lse, delta, q_end, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """(dk, dv), like k and v, given `backward_dq`'s delta. Summed over a group's query heads inside the kernel; a small
    problem cuts the group into parts whose fp32 sums XLA adds, in a fixed order either way."""
    batch, seq_len, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    group = num_heads // num_kv_heads
    b = spec.blocks.dkdv
    num_blocks = cdiv(seq_len, b.block_k)
    parts = _group_parts(num_kv_heads * batch * num_blocks, group)
    padded = max(16, next_power_of_2(head_dim))
    every_head = pl.BlockSpec((None, seq_len, num_heads, padded), lambda p, b, i: (b, 0, 0, 0))
    every_row = pl.BlockSpec((None, num_heads, seq_len), lambda p, b, i: (b, 0, 0))
    tile = (None, seq_len, None, padded)
    key = pl.BlockSpec(tile, lambda p, b, i: (b, 0, p if parts == 1 else lax.div(p, parts), 0))
    partial_sum = pl.BlockSpec(tile, lambda p, b, i: (b, 0, p, 0))
    shape = jax.ShapeDtypeStruct(
        (batch, seq_len, num_kv_heads * parts, head_dim), k.dtype if parts == 1 else jnp.float32
    )
    dk, dv = pallas_call(
        functools.partial(_dkdv_kernel, spec=spec, seq_len=seq_len, head_dim=head_dim, heads=group // parts),
        name="flash_attention_dkdv",
        grid=(num_kv_heads * parts, batch, num_blocks),
        in_specs=[every_head, key, key, every_head, every_row, every_row, _bound_spec(q_end)],
        out_specs=(partial_sum, partial_sum),
        out_shape=(shape, shape),
        num_warps=b.num_warps,
        num_stages=b.num_stages,
    )(q, k, v, do, lse, delta, q_end)
    if parts > 1:
        parted = (batch, seq_len, num_kv_heads, parts, head_dim)
        dk, dv = (x.reshape(parted).sum(axis=3).astype(k.dtype) for x in (dk, dv))
    return dk, dv
