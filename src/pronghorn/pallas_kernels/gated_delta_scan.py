"""The two walks over chunks of the gated delta rule, each one kernel whose state never leaves the registers.

With the notation of `gated_delta_rule`, for a head and from the first chunk to the last, S starting at zero,

    V = U − W S,    S ← γ S + kᵀ (w V)                        and back, R starting at zero:
    dV = Pᵀ dO + w (k R),    R ← γ R + qᵀ (scale e dO) − Wᵀ dV

where w and e multiply rows. A program has some columns of the values of one head: columns do not meet in any of these
products. The state is fp32; products have operands of the arguments' dtype, bf16 and fp16 ones as they are, fp32 ones
with fp32's precision (three tf32 products), and are accumulated in fp32.

Source: Yang et al., Parallelizing Linear Transformers with the Delta Rule, 2024, arXiv:2406.06484, section 3.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pronghorn.pallas_kernels import launch, tuned
from pronghorn.pallas_kernels.tile_operations import COLUMNS_BY_COLUMNS, ROWS_BY_COLUMNS, tile_product

STATES, GRADIENTS = "gated_delta_states", "gated_delta_gradients"
# [columns, warps, stages] by the size of an element where nothing was measured; what `tuned` holds means the same.
DEFAULTS = {
    (STATES, 2): (32, 4, 2),
    (STATES, 4): (16, 4, 1),
    (GRADIENTS, 2): (32, 4, 2),
    (GRADIENTS, 4): (16, 4, 1),
}


def chunk_states(
    u: jax.Array, w: jax.Array, k: jax.Array, out_of: jax.Array, through: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(S in front of every chunk, V of every token).

    Args:
      u: [batch, seq, value_heads, dv], one dtype with w and k; seq is a whole number of chunks, dv and dk are powers of
        two from 16 on.
      w: [batch, seq, value_heads, dk].
      k: [batch, seq, heads, dk].
      out_of: fp32 [chunks, batch, value_heads, C], w of the formulas.
      through: fp32 [chunks, batch, value_heads], γ.

    Returns:
      [chunks, batch, value_heads, dk, dv] and [batch, seq, value_heads, dv], in the dtype of u.
    """
    return _walk(_states_kernel, STATES, (w, k), (out_of,), through, (u,))


def chunk_state_gradients(
    w: jax.Array,
    q: jax.Array,
    k: jax.Array,
    arriving: jax.Array,
    out_of: jax.Array,
    through: jax.Array,
    dout: jax.Array,
    local: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(R behind every chunk, dV of every token).

    Args:
      w, k, out_of, through: as for `chunk_states`.
      q: [batch, seq, heads, dk].
      arriving: fp32 [chunks, batch, value_heads, C], scale e.
      dout, local: [batch, seq, value_heads, dv], dO and Pᵀ dO.

    Returns:
      [chunks, batch, value_heads, dk, dv] and [batch, seq, value_heads, dv], in the dtype of dout.
    """
    return _walk(_gradients_kernel, GRADIENTS, (w, q, k), (arriving, out_of), through, (dout, local))


def _walk(kernel, name, keys, rows, through, values):
    """Launch a kernel with one program for some columns of `values` of a head."""
    (batch, seq, heads, value_dim), key_dim, dtype = values[0].shape, keys[0].shape[-1], values[0].dtype
    chunks, size = rows[0].shape[0], rows[0].shape[-1]
    default = DEFAULTS[name, dtype.itemsize]
    columns, warps, stages = tuned.choice(name, dtype, max(key_dim, value_dim)) or default
    columns = min(columns, value_dim)

    def whole(x):
        group = heads // x.shape[2]
        return pl.BlockSpec((None, seq, None, key_dim), lambda j, h, b: (b, 0, h // group, 0))

    some = pl.BlockSpec((None, seq, None, columns), lambda j, h, b: (b, 0, h, j))
    state = pl.BlockSpec((chunks, None, None, key_dim, columns), lambda j, h, b: (0, b, h, 0, j))
    states = jax.ShapeDtypeStruct((chunks, batch, heads, key_dim, value_dim), dtype)
    return launch.pallas_call(
        functools.partial(kernel, native=not launch.interpreting()),
        name=name,
        grid=(value_dim // columns, heads, batch),
        in_specs=[
            *map(whole, keys),
            *(pl.BlockSpec((chunks, None, None, size), lambda j, h, b: (0, b, h, 0)) for _ in rows),
            pl.BlockSpec((chunks, None, None), lambda j, h, b: (0, b, h)),
            *(some for _ in values),
        ],
        out_specs=[state, some],
        out_shape=[states, jax.ShapeDtypeStruct((batch, seq, heads, value_dim), dtype)],
        num_warps=warps,
        num_stages=stages,
    )(*keys, *rows, through, *values)


def _states_kernel(w_ref, k_ref, out_of_ref, through_ref, u_ref, states_ref, written_ref, *, native):
    """Refs: [seq, dk] of keys, [chunks, C] of rows, [chunks] γ, [seq, columns] of values, [chunks, dk, columns]."""
    chunks, size = out_of_ref.shape
    dtype = u_ref.dtype

    def body(chunk, state):
        rows = pl.ds(chunk * size, size)
        narrow = state.astype(dtype)
        states_ref[chunk, :, :] = narrow
        read = tile_product(w_ref[rows, :], narrow, ROWS_BY_COLUMNS, native=native)
        written = u_ref[rows, :].astype(jnp.float32) - read
        written_ref[rows, :] = written.astype(dtype)
        leaving = (out_of_ref[chunk, :][:, None] * written).astype(dtype)
        added = tile_product(k_ref[rows, :], leaving, COLUMNS_BY_COLUMNS, native=native)
        return through_ref[chunk] * state + added

    jax.lax.fori_loop(0, chunks, body, jnp.zeros(states_ref.shape[1:], jnp.float32))


def _gradients_kernel(
    w_ref, q_ref, k_ref, arriving_ref, out_of_ref, through_ref, dout_ref, local_ref, after_ref, written_ref, *, native
):  # fmt: skip
    """Refs as those of `_states_kernel`."""
    chunks, size = out_of_ref.shape
    dtype = dout_ref.dtype

    def body(step, state):
        chunk = chunks - 1 - step
        rows = pl.ds(chunk * size, size)
        narrow = state.astype(dtype)
        after_ref[chunk, :, :] = narrow
        reached = tile_product(k_ref[rows, :], narrow, ROWS_BY_COLUMNS, native=native)
        written = local_ref[rows, :].astype(jnp.float32) + out_of_ref[chunk, :][:, None] * reached
        written = written.astype(dtype)
        written_ref[rows, :] = written
        scaled = (arriving_ref[chunk, :][:, None] * dout_ref[rows, :].astype(jnp.float32)).astype(dtype)
        arrived = tile_product(q_ref[rows, :], scaled, COLUMNS_BY_COLUMNS, native=native)
        forgotten = tile_product(w_ref[rows, :], written, COLUMNS_BY_COLUMNS, native=native)
        return through_ref[chunk] * state + arrived - forgotten

    jax.lax.fori_loop(0, chunks, body, jnp.zeros(after_ref.shape[1:], jnp.float32))
