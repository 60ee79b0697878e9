"""Rows of tokens in chunks, for recurrences whose state decays: what `gated_delta_rule` and `state_space` share.

A token multiplies the state by exp(g), g <= 0. With c the running sum of g inside a chunk of C tokens, the decays are

    D_ij = exp(c_i − c_j), i >= j        from token j to token i of one chunk
    e_i  = exp(c_i)                      from in front of the chunk to token i
    w_i  = exp(c_last − c_i)             from token i to the end of the chunk
    γ    = exp(c_last)                   over the whole chunk

Segments cut all of it: D is zero between two segments, e and γ where the state belongs to an earlier one, w where a
later one has started. Where a factor is zero so is its derivative, and the gradients need no masks of their own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Decays(NamedTuple):
    """One number a token and head, fp32 [chunks, batch, heads, C]: c, e and w; γ is [chunks, batch, heads], and `runs`,
    the number of the token's segment, int32 [chunks, batch, C]."""

    decay: jax.Array
    into: jax.Array
    out_of: jax.Array
    through: jax.Array
    runs: jax.Array


def product(pattern: str, *operands: jax.Array) -> jax.Array:
    """`einsum` whose fp32 products are of fp32."""
    return jnp.einsum(pattern, *operands, precision=jax.lax.Precision.HIGHEST)


def segment_runs(segment_ids: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """The number of the segment of every token in its row, from 0, int32 `[batch, seq]`: an id may come again."""
    if segment_ids is None:
        return jnp.zeros(shape, jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def segment_starts(runs: jax.Array) -> jax.Array:
    """Whether a token is the first of its segment, but for the first of a row, bool `[batch, seq]`."""
    return runs != jnp.pad(runs, ((0, 0), (1, 0)))[:, :-1]


def cut(x: jax.Array, size: int) -> jax.Array:
    """[batch, seq, heads, ..] -> [chunks, batch, heads, size, ..], zeros behind the last token."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, 3)


def joined(x: jax.Array, seq: int) -> jax.Array:
    """The way back."""
    x = jnp.moveaxis(jnp.moveaxis(x, 3, 2), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :seq]


def chunk_decays(g: jax.Array, runs: jax.Array, size: int, *, carried: bool = False) -> Decays:
    """The decays of every chunk, of g fp32 [batch, seq, heads] and `segment_runs`.

    `carried`: the first segment continues the state that the first chunk is given.
    """
    decay = jnp.cumsum(cut(g, size), axis=-1)
    runs = jnp.pad(runs, ((0, 0), (0, -runs.shape[1] % size)), mode="edge")
    runs = jnp.moveaxis(runs.reshape(runs.shape[0], -1, size), 1, 0)
    here = runs[:, :, None]  # [chunks, batch, 1, size]
    last = here[..., -1:]
    before = jnp.pad(last[:-1], ((1, 0), *((0, 0),) * 3), constant_values=0 if carried else -1)
    end = decay[..., -1:]
    return Decays(
        decay=decay,
        into=jnp.where(here == before, jnp.exp(decay), 0.0),
        out_of=jnp.where(here == last, jnp.exp(end - decay), 0.0),
        through=jnp.where(last == before, jnp.exp(end), 0.0)[..., 0],
        runs=runs,
    )


def pair_decays(decay: jax.Array, runs: jax.Array) -> jax.Array:
    """D of every chunk, [chunks, batch, heads, C, C], of c and `runs`."""
    here, size = runs[:, :, None], runs.shape[-1]
    same = (here[..., :, None] == here[..., None, :]) & jnp.tril(jnp.ones((size, size), bool))
    return jnp.exp(jnp.where(same, decay[..., :, None] - decay[..., None, :], -jnp.inf))


def decay_gradient(d_decay: jax.Array, seq: int) -> jax.Array:
    """The gradient of g, [batch, seq, heads], of that of c by chunk: a token's decay is in every later sum."""
    return joined(jnp.cumsum(d_decay[..., ::-1], axis=-1)[..., ::-1], seq)


def group_sum(gradient: jax.Array, of: Any) -> jax.Array:
    """Gradients of heads added up over those that share a head of `of` [batch, seq, heads, dim], in its dtype."""
    batch, seq, heads, dim = of.shape
    return jnp.sum(gradient.reshape(batch, seq, heads, -1, dim), axis=3).astype(of.dtype)
