"""Products of rows sorted by group with one matrix a group: what a mixture of experts multiplies.

Rows of X [rows, i] lie sorted by group; group g holds rows s_g .. e_g, from `group_sizes`. Rows past the last group's
belong to none. With W [groups, o, i], and P Q the low-rank part that an adapter adds:

    by_rows:             Y_row = X_row W_gᵀ + P_row Q_gᵀ + b_g      W [groups, o, i], Q [groups, o, r]
    by_columns:          Y_row = Σ X_row W_g + P_row Q_g            W [groups, i, o], Q [groups, r, o]
    over_rows:           D_g = Σ_{row in g} A_rowᵀ B_row            [groups, a, b]

X, A and B may be given by an index instead, X_row = x[index[row]], where the rows are copies of fewer ones.

So both directions of a layer read the same array, no matrix is transposed in memory, and no sum of W and an adapter's
product is formed. By columns the sum is over pairs (X, W): layers that read one input send it one gradient. Sums are in
fp32; a row of no group gives zeros, an empty group a D of zeros.

"xla" is `jax.lax.ragged_dot_general`, which a CPU and an interpreter of small sizes are served by.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import grouped_kernels, launch


class LowRank(NamedTuple):
    """What is added to a product: P [rows, r], and Q [groups, o, r] or [groups, r, o], as W lies."""

    rows: jax.Array
    matrices: jax.Array


def by_rows(
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    lowrank: LowRank | None = None,
    bias: jax.Array | None = None,
    *,
    index: jax.Array | None = None,
    dtype: Any = None,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """X_row W_gᵀ + P_row Q_gᵀ + b_g.

    Args:
      x: [rows, i]; bf16, fp16 or fp32.
      weight: [groups, o, i] in the dtype of x.
      group_sizes: int32 [groups]; their sum is at most rows.
      lowrank: in the dtype of x.
      bias: [groups, o].
      index: int32 [rows], each below the rows of x: row r of the product is of x[index[r]].
      dtype: of the result; that of x by default.
      implementation: "pallas", "xla", or None: the kernel on a GPU.

    Returns:
      [rows, o].

    Raises:
      InputError: where shapes do not fit each other.
    """
    pairs, dtype = ((x, weight),), dtype or x.dtype
    return _product(pairs, group_sizes, lowrank, bias, index, dtype, implementation, transposed=True)


def by_columns(
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    lowrank: LowRank | None = None,
    *,
    more: Sequence[tuple[jax.Array, jax.Array]] = (),
    index: jax.Array | None = None,
    dtype: Any = None,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """Σ X_row W_g + P_row Q_g -> [rows, o]; like `by_rows` with weight [groups, i, o], and `more` pairs of such x and
    weight, of the same shapes, that are summed up with it."""
    pairs, dtype = ((x, weight), *more), dtype or x.dtype
    return _product(pairs, group_sizes, lowrank, None, index, dtype, implementation, transposed=False)


def over_rows(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    *,
    a_index: jax.Array | None = None,
    b_index: jax.Array | None = None,
    dtype: Any = jnp.float32,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """Σ_{row in g} A_rowᵀ B_row -> [groups, a, b] of `dtype`, for A [rows, a] and B [rows, b] of one dtype, or
    A_row = a[a_index[row]] and B_row = b[b_index[row]] with int32 [rows].

    Raises:
      InputError: where shapes do not fit each other.
    """
    rows = [grouped_kernels.row_count(*side) for side in ((a, a_index), (b, b_index))]
    if a.ndim != 2 or b.ndim != 2 or rows[0] != rows[1] or a.dtype != b.dtype:
        raise InputError(
            f"over_rows: {a.dtype}{a.shape} and {b.dtype}{b.shape} must be [rows, columns] of the same rows and dtype."
        )
    if launch.resolve(implementation) == "pallas":
        return grouped_kernels.over_rows(a, b, group_sizes, a_index, b_index, jnp.dtype(dtype))
    a, b = _gathered(a, a_index), _gathered(b, b_index)
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return lax.ragged_dot_general(
        a, b, group_sizes, dims, precision=_precision(a), preferred_element_type=jnp.float32
    ).astype(dtype)


def group_of_rows(group_sizes: jax.Array, rows: int) -> jax.Array:
    """int32 [rows]: the group of each row, and the number of groups for a row of none."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right").astype(jnp.int32)


def gather(x: jax.Array, places: jax.Array) -> jax.Array:
    """x[places] for places that exist, and no launch of its own asks whether they do."""
    return x.at[places].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _gathered(x: jax.Array, index: jax.Array | None) -> jax.Array:
    return x if index is None else gather(x, index)


def _precision(x):
    """fp32 products are fp32's, as in the kernels."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _product(pairs, group_sizes, lowrank, bias, index, dtype, implementation, *, transposed):
    rows = grouped_kernels.row_count(pairs[0][0], index)
    for x, weight in pairs:
        fits = (
            weight.ndim == 3 and weight.shape == pairs[0][1].shape and group_sizes.shape == weight.shape[:1]
        )
        if not fits or x.shape != (pairs[0][0].shape[0], weight.shape[2 if transposed else 1]):
            raise InputError(
                f"grouped product: x {x.shape}, weight {weight.shape} and group_sizes {group_sizes.shape} do not fit; "
                f"they must be [rows, i], {'[groups, o, i]' if transposed else '[groups, i, o]'} and [groups]."
            )
    if launch.resolve(implementation) == "pallas":
        return grouped_kernels.product(
            pairs, group_sizes, lowrank, bias, index, jnp.dtype(dtype), transposed=transposed
        )
    y = sum(_ragged(_gathered(x, index), weight, group_sizes, transposed) for x, weight in pairs)
    if lowrank is not None:
        y += _ragged(lowrank.rows, lowrank.matrices, group_sizes, transposed)
    if bias is not None:
        padded = jnp.pad(bias.astype(jnp.float32), ((0, 1), (0, 0)))
        y += padded[group_of_rows(group_sizes, rows)]
    return y.astype(dtype)


def _ragged(x, weight, group_sizes, transposed):
    """One product by XLA, in fp32."""
    dims = lax.RaggedDotDimensionNumbers((((1,), (2 if transposed else 1,)), ((), ())), [0], [0])
    return lax.ragged_dot_general(
        x, weight, group_sizes, dims, precision=_precision(x), preferred_element_type=jnp.float32
    )
