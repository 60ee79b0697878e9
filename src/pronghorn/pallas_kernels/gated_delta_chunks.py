"""What the gated delta rule computes inside of each chunk, for 16-bit arguments: one program a chunk and value head.

The formulas are those of `gated_delta_rule`; between kernels T, U, W, V, dV, S and R have the arguments' dtype, and
every product has operands of that dtype and is accumulated in fp32, as in flash-linear-attention. T itself is found in
fp32 (three tf32 products): from blocks on the diagonal of width w to blocks of 2 w, with X the inverse of those and A_w
the part of A that lies below them in blocks of 2 w,

    X ← X − X A_w X,        w = 1, 2, 4, …

which is `gated_delta_rule.unit_lower_inverse`, in products of whole tiles.

Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks, 2024, arXiv:2412.06464, section 3.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pronghorn.pallas_kernels import launch, tuned
from pronghorn.pallas_kernels.tile_operations import (
    COLUMNS_BY_COLUMNS,
    ROWS_BY_COLUMNS,
    ROWS_BY_ROWS,
    tile_product,
)

PREPARE, SOLVE = "gated_delta_prepare", "gated_delta_solve"
OUTPUT, LOCAL = "gated_delta_output", "gated_delta_local"
READ, WRITTEN = "gated_delta_read_gradients", "gated_delta_write_gradients"
# [warps] where nothing was measured; what `tuned` holds means the same.
DEFAULTS = {PREPARE: (4,), SOLVE: (4,), OUTPUT: (4,), LOCAL: (4,), READ: (8,), WRITTEN: (8,)}


class Rows(NamedTuple):
    """One number a token and value head, [chunks, batch, value_heads, C] in fp32: β, c, e and w of the formulas; γ is
    [chunks, batch, value_heads], and `runs`, the number of the token's segment, int32 [chunks, batch, C]."""

    beta: jax.Array
    decay: jax.Array
    into: jax.Array
    out_of: jax.Array
    through: jax.Array
    runs: jax.Array


def prepare(k: jax.Array, v: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(T, U, W) of every chunk.

    Args:
      k: [batch, seq, heads, dk]; seq is a whole number of chunks, dk and dv are powers of two from 16 on.
      v: [batch, seq, value_heads, dv], the dtype of k.
      rows: of every token.

    Returns:
      [chunks, batch, value_heads, C, C], [batch, seq, value_heads, dv] and [batch, seq, value_heads, dk].
    """
    call = _Call(k, v, rows)
    return call(
        _prepare_kernel,
        PREPARE,
        tokens=(k, v),
        numbers=(rows.beta, rows.decay, rows.into),
        outputs=(call.tile, call.values, call.keys),
    )


def solve(k: jax.Array, v: jax.Array, inverse: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """(U, W) of T: those of `prepare`, to the last bit, for two of its products; shapes as there."""
    call = _Call(k, v, rows)
    return call(
        _solve_kernel,
        SOLVE,
        tokens=(k, v),
        tiles=(inverse,),
        numbers=(rows.beta, rows.into),
        outputs=(call.values, call.keys),
    )


def output(
    q: jax.Array, k: jax.Array, written: jax.Array, states: jax.Array, rows: Rows, scale: float
) -> jax.Array:
    """O, [batch, seq, value_heads, dv]; `written` and `states` are V and S."""
    call = _Call(k, written, rows)
    (out,) = call(
        functools.partial(_output_kernel, scale=scale),
        OUTPUT,
        tokens=(q, k, written),
        tiles=(states,),
        numbers=(rows.decay, rows.into),
        outputs=(call.values,),
    )
    return out


def local_gradient(q: jax.Array, k: jax.Array, dout: jax.Array, rows: Rows, scale: float) -> jax.Array:
    """Pᵀ dO, [batch, seq, value_heads, dv]."""
    call = _Call(k, dout, rows)
    (local,) = call(
        functools.partial(_local_kernel, scale=scale),
        LOCAL,
        tokens=(q, k, dout),
        numbers=(rows.decay,),
        outputs=(call.values,),
    )
    return local


def read_gradients(
    q: jax.Array,
    k: jax.Array,
    written: jax.Array,
    d_written: jax.Array,
    dout: jax.Array,
    states: jax.Array,
    after: jax.Array,
    rows: Rows,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dq, dW, and what reading and leaving the state adds to dk and dc) from V, dV, dO, S and R.

    The first three are [batch, seq, value_heads, dk], the last is fp32 [chunks, batch, value_heads, C].
    """
    call = _Call(k, written, rows)
    return call(
        functools.partial(_read_kernel, scale=scale),
        READ,
        tokens=(q, k, written, d_written, dout),
        tiles=(states, after),
        numbers=(rows.decay, rows.into, rows.out_of),
        through=(rows.through,),
        outputs=(call.keys, call.keys, call.keys, call.numbers),
    )


def write_gradients(
    k: jax.Array,
    v: jax.Array,
    inverse: jax.Array,
    u: jax.Array,
    w: jax.Array,
    d_written: jax.Array,
    d_w: jax.Array,
    rows: Rows,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(dv, what writing adds to dk, dβ, what writing adds to dc) from T, U, W, dV and dW; shapes as in the other."""
    call = _Call(k, v, rows)
    return call(
        _write_kernel,
        WRITTEN,
        tokens=(k, v, u, w, d_written, d_w),
        tiles=(inverse,),
        numbers=(rows.beta, rows.decay, rows.into),
        outputs=(call.values, call.keys, call.numbers, call.numbers),
    )


class _Call:
    """Launches one program for every chunk and value head. Its references: blocks of tokens [C, dim], tiles of the
    chunk, numbers [C], γ where asked for, and the segments [C]; then the outputs."""

    def __init__(self, k: jax.Array, v: jax.Array, rows: Rows):
        (batch, seq, self._heads, value_dim), self._dtype = v.shape, v.dtype
        lead, size, key_dim = rows.through.shape, rows.runs.shape[-1], k.shape[-1]
        self._grid, self._runs = (lead[0], self._heads, batch), rows.runs
        self._widest, self._size = max(key_dim, value_dim), size
        self._numbers = pl.BlockSpec((None, None, None, size), lambda n, h, b: (n, b, h, 0))
        self.keys = jax.ShapeDtypeStruct((batch, seq, self._heads, key_dim), v.dtype)
        self.values = jax.ShapeDtypeStruct((batch, seq, self._heads, value_dim), v.dtype)
        self.tile = jax.ShapeDtypeStruct((*lead, size, size), v.dtype)
        self.numbers = jax.ShapeDtypeStruct((*lead, size), jnp.float32)

    def _tokens(self, x: Any) -> pl.BlockSpec:
        group = self._heads // x.shape[2]
        return pl.BlockSpec((None, self._size, None, x.shape[3]), lambda n, h, b: (b, n, h // group, 0))

    def _output(self, x: Any) -> pl.BlockSpec:
        if x is self.numbers:
            return self._numbers
        return _tile(x) if x is self.tile else self._tokens(x)

    def __call__(
        self, kernel: Any, name: str, *, tokens: tuple, numbers: tuple, outputs: tuple, tiles: tuple = (),
        through: tuple = (),
    ) -> Any:  # fmt: skip
        (warps,) = tuned.choice(name, self._dtype, self._widest) or DEFAULTS[name]
        return launch.pallas_call(
            functools.partial(kernel, native=not launch.interpreting()),
            name=name,
            grid=self._grid,
            in_specs=[
                *map(self._tokens, tokens),
                *map(_tile, tiles),
                *(self._numbers for _ in numbers),
                *(pl.BlockSpec((None, None, 1), lambda n, h, b: (n, b, h)) for _ in through),
                pl.BlockSpec((None, None, self._size), lambda n, h, b: (n, b, 0)),
            ],
            out_specs=[self._output(x) for x in outputs],
            out_shape=list(outputs),
            num_warps=warps,
            num_stages=1,
        )(*tokens, *tiles, *numbers, *through, self._runs)


def _tile(x: Any) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda n, h, b: (n, b, h, 0, 0))


def _places(size: int) -> tuple[jax.Array, jax.Array]:
    """The rows' and columns' numbers of a square tile."""
    return (
        jax.lax.broadcasted_iota(jnp.int32, (size, size), 0),
        jax.lax.broadcasted_iota(jnp.int32, (size, size), 1),
    )


def _pairs(decay_ref, runs_ref) -> jax.Array:
    """D, fp32 [C, C]."""
    decay, runs = decay_ref[...], runs_ref[...]
    i, j = _places(decay.shape[0])
    seen = (runs[:, None] == runs[None, :]) & (i >= j)
    return jnp.exp(jnp.where(seen, decay[:, None] - decay[None, :], -jnp.inf))


def _inverse(strict: jax.Array, *, native: bool) -> jax.Array:
    """(I + A)⁻¹ of a strictly lower A, fp32."""
    size = strict.shape[0]
    i, j = _places(size)

    def below(width):
        """A_w: rows in the second half of a block of 2 w, columns in its first."""
        shift = width.bit_length()
        together = (i >> shift) == (j >> shift)
        return jnp.where(together & ((i & width) != 0) & ((j & width) == 0), strict, 0.0)

    inverse, width = jnp.where(i == j, 1.0, 0.0) - below(1), 2
    while width < size:
        half = tile_product(below(width), inverse, ROWS_BY_COLUMNS, native=native)
        inverse = inverse - tile_product(inverse, half, ROWS_BY_COLUMNS, native=native)
        width *= 2
    return inverse


def _prepare_kernel(
    k_ref, v_ref, beta_ref, decay_ref, into_ref, runs_ref, inverse_ref, u_ref, w_ref, *, native
):
    k, dtype = k_ref[...], k_ref.dtype
    beta = beta_ref[...]
    i, j = _places(beta.shape[0])
    keys = tile_product(k, k, ROWS_BY_ROWS, native=native)
    coupling = jnp.where(i > j, beta[:, None] * keys * _pairs(decay_ref, runs_ref), 0.0)
    inverse = _inverse(coupling, native=native).astype(dtype)
    inverse_ref[...] = inverse
    _write_solution(inverse, k, v_ref, beta, into_ref, u_ref, w_ref, native=native)


def _solve_kernel(k_ref, v_ref, inverse_ref, beta_ref, into_ref, _, u_ref, w_ref, *, native):
    inverse, k, beta = inverse_ref[...], k_ref[...], beta_ref[...]
    _write_solution(inverse, k, v_ref, beta, into_ref, u_ref, w_ref, native=native)


def _write_solution(inverse, k, v_ref, beta, into_ref, u_ref, w_ref, *, native):
    """U = T (β v), W = T (β e k), of T as it is rounded for other kernels."""
    dtype = k.dtype
    values = (beta[:, None] * v_ref[...].astype(jnp.float32)).astype(dtype)
    u_ref[...] = tile_product(inverse, values, ROWS_BY_COLUMNS, native=native).astype(dtype)
    entering = ((beta * into_ref[...])[:, None] * k.astype(jnp.float32)).astype(dtype)
    w_ref[...] = tile_product(inverse, entering, ROWS_BY_COLUMNS, native=native).astype(dtype)


def _output_kernel(
    q_ref, k_ref, written_ref, states_ref, decay_ref, into_ref, runs_ref, out_ref, *, scale, native
):
    q, dtype = q_ref[...], q_ref.dtype
    inside = tile_product(q, k_ref[...], ROWS_BY_ROWS, native=native) * _pairs(decay_ref, runs_ref)
    out = into_ref[...][:, None] * tile_product(q, states_ref[...], ROWS_BY_COLUMNS, native=native)
    out += tile_product(inside.astype(dtype), written_ref[...], ROWS_BY_COLUMNS, native=native)
    out_ref[...] = (scale * out).astype(dtype)


def _local_kernel(q_ref, k_ref, dout_ref, decay_ref, runs_ref, local_ref, *, scale, native):
    inside = tile_product(q_ref[...], k_ref[...], ROWS_BY_ROWS, native=native)
    inside = (scale * inside * _pairs(decay_ref, runs_ref)).astype(q_ref.dtype)
    local_ref[...] = tile_product(inside, dout_ref[...], COLUMNS_BY_COLUMNS, native=native).astype(
        q_ref.dtype
    )


def _read_kernel(
    q_ref, k_ref, written_ref, d_written_ref, dout_ref, states_ref, after_ref, decay_ref, into_ref, out_of_ref,
    through_ref, runs_ref, dq_ref, d_w_ref, dk_ref, d_decay_ref, *, scale, native,
):  # fmt: skip
    dtype = q_ref.dtype
    q, k, dout = q_ref[...], k_ref[...], dout_ref[...]
    size = q.shape[0]
    # P's part: of q, k and of D's exponents.
    pairs = _pairs(decay_ref, runs_ref)
    d_scores = scale * pairs * tile_product(dout, written_ref[...], ROWS_BY_ROWS, native=native)
    d_pairs = d_scores * tile_product(q, k, ROWS_BY_ROWS, native=native)
    d_decay = jnp.sum(d_pairs, axis=1) - jnp.sum(d_pairs, axis=0)
    d_scores = d_scores.astype(dtype)
    # Reading the state in front of the chunk, by q and by W.
    arriving = (scale * into_ref[...])[:, None]
    dq = arriving * tile_product(dout, states_ref[...], ROWS_BY_ROWS, native=native)
    d_decay += jnp.sum(dq * q.astype(jnp.float32), axis=1)
    dq += tile_product(d_scores, k, ROWS_BY_COLUMNS, native=native)
    dq_ref[...] = dq.astype(dtype)
    d_w_ref[...] = (-tile_product(d_written_ref[...], states_ref[...], ROWS_BY_ROWS, native=native)).astype(
        dtype
    )
    # Leaving the state behind it.
    dk = out_of_ref[...][:, None] * tile_product(
        written_ref[...], after_ref[...], ROWS_BY_ROWS, native=native
    )
    d_out_of = jnp.sum(dk * k.astype(jnp.float32), axis=1)
    dk += tile_product(d_scores, q, COLUMNS_BY_COLUMNS, native=native)
    dk_ref[...] = dk.astype(dtype)
    kept = states_ref[...].astype(jnp.float32) * after_ref[...].astype(jnp.float32)
    d_end = jnp.sum(d_out_of) + through_ref[0] * jnp.sum(kept)
    last = jax.lax.broadcasted_iota(jnp.int32, (size,), 0) == size - 1
    d_decay_ref[...] = d_decay - d_out_of + jnp.where(last, d_end, 0.0)


def _write_kernel(
    k_ref, v_ref, u_ref, w_ref, d_written_ref, d_w_ref, inverse_ref, beta_ref, decay_ref, into_ref, runs_ref,
    dv_ref, dk_ref, d_beta_ref, d_decay_ref, *, native,
):  # fmt: skip
    dtype = k_ref.dtype
    k, inverse, beta, into = k_ref[...], inverse_ref[...], beta_ref[...], into_ref[...]
    i, j = _places(beta.shape[0])
    # Of β v: x_v.
    x_v = tile_product(inverse, d_written_ref[...], COLUMNS_BY_COLUMNS, native=native)
    d_beta = jnp.sum(x_v * v_ref[...].astype(jnp.float32), axis=1)
    dv_ref[...] = (beta[:, None] * x_v).astype(dtype)
    d_coupling = tile_product(x_v.astype(dtype), u_ref[...], ROWS_BY_ROWS, native=native)
    # Of β e k: x_k.
    x_k = tile_product(inverse, d_w_ref[...], COLUMNS_BY_COLUMNS, native=native)
    entered = into * jnp.sum(x_k * k.astype(jnp.float32), axis=1)
    d_coupling += tile_product(x_k.astype(dtype), w_ref[...], ROWS_BY_ROWS, native=native)
    # Of k_i·k_j, where β_i D_ij stand beside it in A.
    d_keys = jnp.where(i > j, -d_coupling * _pairs(decay_ref, runs_ref), 0.0)
    coupled = d_keys * tile_product(k, k, ROWS_BY_ROWS, native=native)
    d_beta_ref[...] = d_beta + entered + jnp.sum(coupled, axis=1)
    coupled = beta[:, None] * coupled
    d_decay_ref[...] = beta * entered + jnp.sum(coupled, axis=1) - jnp.sum(coupled, axis=0)
    d_keys = (beta[:, None] * d_keys).astype(dtype)
    dk = (beta * into)[:, None] * x_k + tile_product(d_keys, k, ROWS_BY_COLUMNS, native=native)
    dk_ref[...] = (dk + tile_product(d_keys, k, COLUMNS_BY_COLUMNS, native=native)).astype(dtype)
