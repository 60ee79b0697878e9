"""The state-space recurrence of Mamba 2: linear attention whose state forgets at a rate that every token sets.

A head's state S `[n, p]` is zero where a segment starts. Every token has a step t > 0, an input x, a direction b that
it writes in and a direction c that it reads; a head has a rate a < 0 and a skip d:

    S ← exp(a t) S + b (t x)ᵀ,    o = Sᵀ c + d x

That is the gated delta rule without its correction, and runs in the same chunks: with D, e, w and γ of `token_chunks`
for g = a t, with U of rows t x, and S the state in front of the chunk,

    P = (C Bᵀ) D,    O = e C S + P U + d x,    S ← γ S + (w B)ᵀ U

Backward, from dO and the gradient R of the state behind the chunk:

    gradient of S: γ R + (e C)ᵀ dO                             (from the last chunk to the first)
    dU = Pᵀ dO + w B R,    dP = dO Uᵀ
    dC = (dP D) B + e dO Sᵀ,    dB = (dP D)ᵀ C + w U Rᵀ        (summed over the heads that share b and c)
    of c_i:  Σ_j dP_ij P_ij − Σ_j dP_ji P_ji + e_i dO_i·(C S)_i − w_i U_i·(B R)_i,
             and of the chunk's last one also  Σ_i w_i U_i·(B R)_i + γ ⟨S, R⟩
    dt = x·dU + a dg,    da = Σ t dg,    dx = t dU + d dO,    dd = Σ dO·x

Saved: the arguments. P and the chunks' states are computed again in the backward pass. All of it is in fp32. Heads that
share b and c share their product C Bᵀ.

Source: Dao and Gu, Transformers are SSMs, 2024, arXiv:2405.21060, sections 6 and 7.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.token_chunks import (
    chunk_decays,
    cut,
    decay_gradient,
    joined,
    pair_decays,
    product,
    segment_runs,
    segment_starts,
)

CHUNK = 64


def state_space(
    x: jax.Array,
    step: jax.Array,
    rate: jax.Array,
    b: jax.Array,
    c: jax.Array,
    skip: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """What every token reads of a state that all before it have written to.

    Args:
      x: [batch, seq, heads, p], what is written; bf16, fp16 or fp32.
      step: [batch, seq, heads], at least 0; computed with in fp32, as are rate and skip.
      rate: [heads], at most 0: a token leaves exp(rate step) of the state.
      b, c: [batch, seq, groups, n], where x is written to and read from, the dtype of x. Each serves heads / groups
        heads that follow one another.
      skip: [heads], the share of x that is added to the output.
      segment_ids: int [batch, seq]; the state starts anew wherever the id changes. None: each row is one segment.

    Returns:
      [batch, seq, heads, p] in the dtype of x.

    Raises:
      InputError: when the shapes do not fit each other.
    """
    _check_shapes(x, step, rate, b, c, skip, segment_ids)
    if x.size == 0:
        return jnp.zeros_like(x)
    step, rate, skip = (values.astype(jnp.float32) for values in (step, rate, skip))
    return _state_space(x, step, rate, b, c, skip, segment_runs(segment_ids, x.shape[:2]))


def continue_state_space(
    x: jax.Array,
    step: jax.Array,
    rate: jax.Array,
    b: jax.Array,
    c: jax.Array,
    skip: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(output, state) of tokens that follow those already in the state; not to be differentiated.

    Arguments as in `state_space`, with state fp32 [batch, heads, n, p]. A token whose step is 0 leaves the state as it
    is.
    """
    _check_shapes(x, step, rate, b, c, skip, None)
    size = min(CHUNK, launch.next_power_of_2(x.shape[1]))
    step, rate, skip = (values.astype(jnp.float32) for values in (step, rate, skip))
    runs = segment_runs(None, x.shape[:2])
    chunks = _chunks(x, step, rate, b, c, runs, size, carried=True)
    grouped = state.reshape(state.shape[0], b.shape[2], -1, *state.shape[2:])
    states, after = _states(chunks, grouped)
    out = _read(chunks, states, x.shape) + skip[:, None] * x.astype(jnp.float32)
    return out.astype(x.dtype), after.reshape(state.shape)


def state_space_reference(
    x: jax.Array,
    step: jax.Array,
    rate: jax.Array,
    b: jax.Array,
    c: jax.Array,
    skip: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """The oracle of `state_space`: one token after the other, in fp32."""
    x32, step, rate, skip = (values.astype(jnp.float32) for values in (x, step, rate, skip))
    b, c = (jnp.repeat(values.astype(jnp.float32), x.shape[2] // b.shape[2], axis=2) for values in (b, c))
    starts = segment_starts(segment_runs(segment_ids, x.shape[:2]))

    def one_token(state, token):
        x, step, b, c, start = token
        kept = jnp.where(start[:, None], 0.0, jnp.exp(rate * step))
        state = kept[..., None, None] * state + b[..., None] * (step[..., None] * x)[..., None, :]
        return state, product("bhnp,bhn->bhp", state, c) + skip[:, None] * x

    zero = jnp.zeros((x.shape[0], x.shape[2], b.shape[3], x.shape[3]), jnp.float32)
    tokens = jax.tree.map(lambda values: jnp.moveaxis(values, 1, 0), (x32, step, b, c, starts))
    return jnp.moveaxis(jax.lax.scan(one_token, zero, tokens)[1], 0, 1).astype(x.dtype)


def _check_shapes(x, step, rate, b, c, skip, segment_ids):
    if x.ndim != 4 or b.ndim != 4 or b.shape[:2] != x.shape[:2] or c.shape != b.shape:
        raise InputError(
            f"state_space: x {x.shape}, b {b.shape} and c {c.shape} must be [batch, seq, heads or groups, dim], b and "
            "c alike."
        )
    if x.shape[2] % b.shape[2]:
        raise InputError(
            f"state_space: {x.shape[2]} heads are no multiple of {b.shape[2]} groups of b and c."
        )
    if step.shape != x.shape[:3] or rate.shape != x.shape[2:3] or skip.shape != x.shape[2:3]:
        raise InputError(
            f"state_space: step {step.shape} must be [batch, seq, heads] = {x.shape[:3]}, rate {rate.shape} and skip "
            f"{skip.shape} [heads]."
        )
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise InputError(
            f"state_space: segment_ids {segment_ids.shape} must be [batch, seq] = {x.shape[:2]}."
        )


class _Chunks(NamedTuple):
    """Everything by chunk, fp32, heads as those h of every group g: `written` (U) [chunks, batch, g, h, C, p]; `b` and
    `c` [chunks, batch, g, C, n]; `pairs` (D) [chunks, batch, g, h, C, C]; `into` (e) and `out_of` (w) [.., C, 1];
    `through` (γ) [.., 1, 1]."""

    written: jax.Array
    b: jax.Array
    c: jax.Array
    pairs: jax.Array
    into: jax.Array
    out_of: jax.Array
    through: jax.Array

    @property
    def scores(self) -> jax.Array:
        """C Bᵀ, the same for all heads of a group."""
        return product("nbgik,nbgjk->nbgij", self.c, self.b)[:, :, :, None]

    @property
    def no_state(self) -> jax.Array:
        return jnp.zeros((*self.written.shape[1:4], self.b.shape[-1], self.written.shape[-1]), jnp.float32)


def _chunks(x, step, rate, b, c, runs, size: int, *, carried: bool = False) -> _Chunks:
    """`carried` as in `chunk_decays`."""
    decays = chunk_decays(rate * step, runs, size, carried=carried)

    def by_group(values):
        return values.reshape(*values.shape[:2], b.shape[2], -1, *values.shape[3:])

    return _Chunks(
        written=by_group(cut(step[..., None] * x.astype(jnp.float32), size)),
        b=cut(b.astype(jnp.float32), size),
        c=cut(c.astype(jnp.float32), size),
        pairs=by_group(pair_decays(decays.decay, decays.runs)),
        into=by_group(decays.into)[..., None],
        out_of=by_group(decays.out_of)[..., None],
        through=by_group(decays.through)[..., None, None],
    )


def _summed(
    through: jax.Array, added: jax.Array, start: jax.Array, *, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(the state in front of every chunk, the state behind all) of s ← through s + added; in reverse from the last to
    the first, and what is in front is behind."""

    def one_chunk(state, chunk):
        through, added = chunk
        return through * state + added, state

    after, states = jax.lax.scan(one_chunk, start, (through, added), reverse=reverse)
    return states, after


def _states(chunks: _Chunks, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(S in front of every chunk, [chunks, batch, g, h, n, p], S behind the last one)."""
    added = product("nbgjk,nbghjp->nbghkp", chunks.b, chunks.out_of * chunks.written)
    return _summed(chunks.through, added, start)


def _read(chunks: _Chunks, states: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """O without the skip, fp32 of the shape of x."""
    out = chunks.into * product("nbgik,nbghkp->nbghip", chunks.c, states)
    out = out + product("nbghij,nbghjp->nbghip", chunks.scores * chunks.pairs, chunks.written)
    return _in_rows(out, shape)


def _in_rows(by_chunk: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[chunks, batch, g, h, C, ..] -> [batch, seq, heads, ..]."""
    chunks, batch, groups, each, *rest = by_chunk.shape
    return joined(by_chunk.reshape(chunks, batch, groups * each, *rest), shape[1])


@jax.custom_vjp
def _state_space(x, step, rate, b, c, skip, runs):
    chunks = _chunks(x, step, rate, b, c, runs, CHUNK)
    states, _ = _states(chunks, chunks.no_state)
    out = _read(chunks, states, x.shape) + skip[:, None] * x.astype(jnp.float32)
    return out.astype(x.dtype)


def _state_space_forward(*inputs):
    return _state_space(*inputs), inputs


def _state_space_backward(inputs, dout):
    x, step, rate, b, c, skip, runs = inputs
    x32, dout32 = x.astype(jnp.float32), dout.astype(jnp.float32)
    chunks = _chunks(x, step, rate, b, c, runs, CHUNK)
    states, _ = _states(chunks, chunks.no_state)
    d_read = cut(dout32, CHUNK).reshape(chunks.written.shape)
    arriving = chunks.into * d_read
    added = product("nbgik,nbghip->nbghkp", chunks.c, arriving)
    after, _ = _summed(chunks.through, added, chunks.no_state, reverse=True)  # R

    inside = chunks.scores * chunks.pairs
    leaving = chunks.out_of * product("nbgjk,nbghkp->nbghjp", chunks.b, after)
    d_written = product("nbghij,nbghip->nbghjp", inside, d_read) + leaving
    d_inside = product("nbghip,nbghjp->nbghij", d_read, chunks.written)
    d_scores = jnp.sum(d_inside * chunks.pairs, axis=3)
    dc = product("nbgij,nbgjk->nbgik", d_scores, chunks.b)
    dc = dc + product("nbghip,nbghkp->nbgik", arriving, states)
    db = product("nbgij,nbgik->nbgjk", d_scores, chunks.c)
    db = db + product("nbghjp,nbghkp->nbgjk", chunks.out_of * chunks.written, after)

    # Of the exponents: e and D's rows add, D's columns and w subtract, the last token gets what w and γ add.
    d_pairs = d_inside * inside
    d_out_of = jnp.sum(leaving * chunks.written, -1)
    d_decay = jnp.sum(d_pairs, -1) - jnp.sum(d_pairs, -2) - d_out_of
    d_decay = d_decay + jnp.sum(arriving * product("nbgik,nbghkp->nbghip", chunks.c, states), -1)
    d_end = jnp.sum(d_out_of, -1) + chunks.through[..., 0, 0] * jnp.sum(states * after, (-1, -2))
    d_decay = d_decay.at[..., -1].add(d_end)
    dg = decay_gradient(d_decay.reshape(*d_decay.shape[:2], -1, CHUNK), x.shape[1])

    d_written = _in_rows(d_written, x.shape)
    dx = step[..., None] * d_written + skip[:, None] * dout32
    d_step = jnp.sum(x32 * d_written, -1) + rate * dg
    d_rate = jnp.sum(step * dg, (0, 1))
    d_skip = jnp.sum(dout32 * x32, (0, 1, 3))
    db, dc = (joined(gradient, x.shape[1]).astype(b.dtype) for gradient in (db, dc))
    return dx.astype(x.dtype), d_step, d_rate, db, dc, d_skip, None


_state_space.defvjp(_state_space_forward, _state_space_backward)
