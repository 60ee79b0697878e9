"""The two walks over chunks of the gated delta rule, each one kernel whose state never leaves the registers.

With the notation of `gated_delta_rule`, for a head and from the first chunk to the last, S starting at zero,

    V = U − W S,    S ← γ S + (w k)ᵀ V                    and back, R starting at zero:
    dV = Pᵀ dO + (w k) R,    R ← γ R + scale (e q)ᵀ dO − Wᵀ dV

A program has some columns of the values of one head: columns do not meet in any of these products. Every operand is
fp32 and keeps fp32's precision (three tf32 products). Sizes are padded with zeros to powers of two, which adds nothing.

Source: Yang et al., Parallelizing Linear Transformers with the Delta Rule, 2024, arXiv:2406.06484, section 3.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.tile_operations import COLUMNS_BY_COLUMNS, ROWS_BY_COLUMNS, tile_product

# Columns of the values a program: 4 programs a head of 128, so that 32 heads fill an H100's 132 multiprocessors.
COLUMNS = 32
WARPS, STAGES = 4, 1
_SMALLEST = 16  # of a side of a product on tensor cores


def chunk_states(
    u: jax.Array, w: jax.Array, leaving: jax.Array, through: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(S in front of every chunk, V of every chunk).

    Args:
      u: fp32 [chunks, batch, heads, C, dv].
      w, leaving: fp32 [chunks, batch, heads, C, dk], W and w k.
      through: fp32 [chunks, batch, heads], γ.

    Returns:
      fp32 [chunks, batch, heads, dk, dv] and [chunks, batch, heads, C, dv].
    """
    return _walk(_states_kernel, "gated_delta_states", (w, leaving), through, (u,))


def chunk_state_gradients(
    w: jax.Array,
    arriving: jax.Array,
    leaving: jax.Array,
    through: jax.Array,
    dout: jax.Array,
    local: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(R behind every chunk, dV of every chunk).

    Args:
      w, arriving, leaving: fp32 [chunks, batch, heads, C, dk], W, scale e q and w k.
      through: fp32 [chunks, batch, heads], γ.
      dout, local: fp32 [chunks, batch, heads, C, dv], dO and Pᵀ dO.

    Returns:
      fp32 [chunks, batch, heads, dk, dv] and [chunks, batch, heads, C, dv].
    """
    return _walk(_gradients_kernel, "gated_delta_gradients", (w, arriving, leaving), through, (dout, local))


def _walk(kernel, name, keys, through, values):
    """Launch a kernel with one program for some columns of `values` [.., C, dv] of a head; `keys` are [.., C, dk]."""
    (chunks, batch, heads, size, key_dim), value_dim = keys[0].shape, values[0].shape[-1]
    keys = [_padded(x) for x in keys]
    values = [_padded(x) for x in values]
    rows, wide_keys, wide_values = keys[0].shape[-2], keys[0].shape[-1], values[0].shape[-1]
    columns = min(COLUMNS, wide_values)

    def spec(tile):
        return pl.BlockSpec((chunks, None, None, *tile), lambda j, h, b: (0, b, h, 0, j))

    def whole(tile):
        return pl.BlockSpec((chunks, None, None, *tile), lambda j, h, b: (0, b, h, 0, 0))

    shapes = ((wide_keys, wide_values), (rows, wide_values))
    states, written = launch.pallas_call(
        functools.partial(kernel, native=not launch.interpreting()),
        name=name,
        grid=(wide_values // columns, heads, batch),
        in_specs=[
            *(whole((rows, wide_keys)) for _ in keys),
            pl.BlockSpec((chunks, None, None), lambda j, h, b: (0, b, h)),
            *(spec((rows, columns)) for _ in values),
        ],
        out_specs=[spec((wide_keys, columns)), spec((rows, columns))],
        out_shape=[jax.ShapeDtypeStruct((chunks, batch, heads, *tile), jnp.float32) for tile in shapes],
        num_warps=WARPS,
        num_stages=STAGES,
    )(*keys, through, *values)
    return states[..., :key_dim, :value_dim], written[..., :size, :value_dim]


def _padded(x: jax.Array) -> jax.Array:
    pads = [max(_SMALLEST, launch.next_power_of_2(extent)) - extent for extent in x.shape[-2:]]
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 2), *((0, pad) for pad in pads)))


def _states_kernel(w_ref, leaving_ref, through_ref, u_ref, states_ref, written_ref, *, native):
    """Refs: [chunks, C, dk] of keys, [chunks, C, columns] of values, [chunks, dk, columns] of states, [chunks] γ."""

    def body(chunk, state):
        states_ref[chunk, :, :] = state
        read = tile_product(w_ref[chunk, :, :], state, ROWS_BY_COLUMNS, native=native)
        written = u_ref[chunk, :, :] - read
        written_ref[chunk, :, :] = written
        added = tile_product(leaving_ref[chunk, :, :], written, COLUMNS_BY_COLUMNS, native=native)
        return through_ref[chunk] * state + added

    jax.lax.fori_loop(0, w_ref.shape[0], body, jnp.zeros(states_ref.shape[1:], jnp.float32))


def _gradients_kernel(
    w_ref, arriving_ref, leaving_ref, through_ref, dout_ref, local_ref, after_ref, written_ref, *, native
):
    """Refs as those of `_states_kernel`."""
    chunks = w_ref.shape[0]

    def body(step, state):
        chunk = chunks - 1 - step
        after_ref[chunk, :, :] = state
        written = local_ref[chunk, :, :] + tile_product(
            leaving_ref[chunk, :, :], state, ROWS_BY_COLUMNS, native=native
        )
        written_ref[chunk, :, :] = written
        arrived = tile_product(
            arriving_ref[chunk, :, :], dout_ref[chunk, :, :], COLUMNS_BY_COLUMNS, native=native
        )
        forgotten = tile_product(w_ref[chunk, :, :], written, COLUMNS_BY_COLUMNS, native=native)
        return through_ref[chunk] * state + arrived - forgotten

    jax.lax.fori_loop(0, chunks, body, jnp.zeros(after_ref.shape[1:], jnp.float32))
