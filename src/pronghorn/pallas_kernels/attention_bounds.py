"""Which keys a query sees, as one interval a row, so that no mask tensor is ever made.

Causal attention over packed rows with an optional sliding window of w lets query t see exactly the keys
    k_start[t] <= k <= t        with k_start[t] = max(start of t's segment, t - w + 1),
and, seen from the other side, lets key k be seen by exactly the queries
    k <= t < q_end[k]           with q_end[k]   = min(end of k's segment, k + w).
Both bounds never decrease along a row: the first and the last row of a block bound the whole block, which is how the
kernels skip blocks. A segment is a run of equal ids: a new one starts wherever the id changes, so an id may come back.
"""

import jax
import jax.numpy as jnp


def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """int32 [batch, seq]: the index of the first token of each token's run of equal ids."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def segment_ends(segment_ids: jax.Array) -> jax.Array:
    """int32 [batch, seq]: one past the index of the last token of each token's run of equal ids."""
    seq_len = segment_ids.shape[1]
    end = jnp.arange(1, seq_len + 1, dtype=jnp.int32)[None]
    last = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    return jax.lax.cummin(jnp.where(last, end, seq_len), axis=1, reverse=True)


def interval_bounds(segment_ids: jax.Array, sliding_window: int | None) -> tuple[jax.Array, jax.Array]:
    """The two bounds of the formulas above for packed rows.

    Args:
      segment_ids: integers [batch, seq].
      sliding_window: w, or None for no window.

    Returns:
      (k_start, q_end), both int32 [batch, seq].
    """
    k_start, q_end = segment_starts(segment_ids), segment_ends(segment_ids)
    if sliding_window is not None:
        index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
        k_start = jnp.maximum(k_start, index - (sliding_window - 1))
        q_end = jnp.minimum(q_end, index + sliding_window)
    return k_start, q_end
