"""Products of rows sorted by group with one matrix a group: what a mixture of experts multiplies.

Rows of X [rows, i] lie sorted by group; group g holds rows s_g .. e_g, from `group_sizes`. Rows past the last group's
belong to none. With W [groups, o, i], and P Q the low-rank part that an adapter adds:

    by_rows:             Y_row = X_row W_gᵀ + P_row Q_gᵀ + b_g      W [groups, o, i], Q [groups, o, r]
    by_columns:          Y_row = Σ X_row W_g + P_row Q_g            W [groups, i, o], Q [groups, r, o]
    over_rows:           D_g = Σ_{row in g} A_rowᵀ B_row            [groups, a, b]

so both directions of a layer read the same array, no matrix is transposed in memory, and no sum of W and an adapter's
product is formed. By columns the sum is over pairs (X, W): layers that read one input send it one gradient. Sums are in
fp32; a row of no group gives zeros, an empty group a D of zeros.

Layers that are stacked (W [groups, n o, i], one output [rows, n o]) have adapters of their own: rank-r products of such
are n products of `parts` beside each other, of which part p reads columns p of X (or A, B, P) and rows p of W (or Q),
and no matrix with blocks of zeros is made for it.

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
    """What is added to a product: P [rows, r], and Q [groups, o, r] or [groups, r, o], as W lies.

    By rows P may have n r columns, r of them for each nth of the outputs, in order.
    """

    rows: jax.Array
    matrices: jax.Array


def by_rows(
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    lowrank: LowRank | None = None,
    bias: jax.Array | None = None,
    *,
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
      dtype: of the result; that of x by default.
      implementation: "pallas", "xla", or None: the kernel on a GPU.

    Returns:
      [rows, o].

    Raises:
      InputError: where shapes do not fit each other.
    """
    pairs = ((x, weight),)
    return _product(pairs, group_sizes, lowrank, bias, dtype or x.dtype, implementation, transposed=True)


def by_columns(
    x: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    lowrank: LowRank | None = None,
    *,
    more: Sequence[tuple[jax.Array, jax.Array]] = (),
    parts: int = 1,
    dtype: Any = None,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """Σ X_row W_g + P_row Q_g -> [rows, o]; like `by_rows` with weight [groups, i, o], and `more` pairs of such x and
    weight, of the same shapes, that are summed up with it.

    Of n `parts`, which have neither `lowrank` nor `more`: x [rows, n i], weight [groups, n i, o] -> [rows, n o].
    """
    pairs, dtype = ((x, weight), *more), dtype or x.dtype
    return _product(pairs, group_sizes, lowrank, None, dtype, implementation, transposed=False, parts=parts)


def over_rows(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    *,
    parts: int = 1,
    dtype: Any = jnp.float32,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """Σ_{row in g} A_rowᵀ B_row -> [groups, a, b] of `dtype`, for A [rows, a] and B [rows, b] of one dtype.

    Of n `parts`: A [rows, n a] and B [rows, n b] -> [groups, n a, b].

    Raises:
      InputError: where shapes do not fit each other.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0] or a.dtype != b.dtype:
        raise InputError(
            f"over_rows: {a.dtype}{a.shape} and {b.dtype}{b.shape} must be [rows, columns] of the same rows and dtype."
        )
    if launch.resolve(implementation) == "pallas":
        return grouped_kernels.over_rows(a, b, group_sizes, jnp.dtype(dtype), parts=parts)
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    options: Any = {"precision": _precision(a), "preferred_element_type": jnp.float32}
    of_parts = zip(_split(a, parts), _split(b, parts), strict=True)
    return _joined(
        [lax.ragged_dot_general(*part, group_sizes, dims, **options).astype(dtype) for part in of_parts], 1
    )


def group_of_rows(group_sizes: jax.Array, rows: int) -> jax.Array:
    """int32 [rows]: the group of each row, and the number of groups for a row of none."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right").astype(jnp.int32)


def _precision(x):
    """fp32 products are fp32's, as in the kernels."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _split(array, parts):
    """`parts` arrays of as many columns (of [rows, columns]) or rows (of [groups, rows, columns])."""
    return [array] if parts == 1 else jnp.split(array, parts, axis=1)


def _joined(arrays, axis):
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def _product(pairs, group_sizes, lowrank, bias, dtype, implementation, *, transposed, parts=1):
    rows = pairs[0][0].shape[0]
    for x, weight in pairs:
        fits = (
            weight.ndim == 3 and weight.shape == pairs[0][1].shape and group_sizes.shape == weight.shape[:1]
        )
        if not fits or x.shape != (rows, weight.shape[2 if transposed else 1]):
            raise InputError(
                f"grouped product: x {x.shape}, weight {weight.shape} and group_sizes {group_sizes.shape} do not fit; "
                f"they must be [rows, i], {'[groups, o, i]' if transposed else '[groups, i, o]'} and [groups]."
            )
    if launch.resolve(implementation) == "pallas":
        return grouped_kernels.product(
            pairs, group_sizes, lowrank, bias, jnp.dtype(dtype), transposed=transposed, parts=parts
        )
    y = sum(_ragged_parts(x, weight, group_sizes, transposed, parts) for x, weight in pairs)
    if lowrank is not None:
        count = lowrank.rows.shape[1] // lowrank.matrices.shape[2 if transposed else 1]
        y += _ragged_parts(lowrank.rows, lowrank.matrices, group_sizes, transposed, count)
    if bias is not None:
        padded = jnp.pad(bias.astype(jnp.float32), ((0, 1), (0, 0)))
        y += padded[group_of_rows(group_sizes, rows)]
    return y.astype(dtype)


def _ragged_parts(x, weight, group_sizes, transposed, parts):
    """The products of all parts beside each other."""
    of_parts = zip(_split(x, parts), _split(weight, parts), strict=True)
    return _joined([_ragged(*part, group_sizes, transposed) for part in of_parts], 1)


def _ragged(x, weight, group_sizes, transposed):
    """One product by XLA, in fp32."""
    dims = lax.RaggedDotDimensionNumbers((((1,), (2 if transposed else 1,)), ((), ())), [0], [0])
    return lax.ragged_dot_general(
        x, weight, group_sizes, dims, precision=_precision(x), preferred_element_type=jnp.float32
    )
