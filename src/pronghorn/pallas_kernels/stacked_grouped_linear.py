"""Grouped linear layers of one input as one product: the gate and up of a mixture's quantised experts.

n layers that are alike, as in `grouped_linear`: one shape, quantised in one way, adapters of one rank or none. With W =
[W_1; W_2; ..] [groups, n out, in], B = [s_1 B_1; s_2 B_2; ..] [groups, n out, r], and A = [A_1; A_2; ..] [groups, n r,
in], and ∘ for products of which layer i has the i-th columns of the left side and the i-th rows of the right:

    T    = X A_gᵀ
    Y    = X W_gᵀ + T ∘ B_gᵀ + b_g                  [rows, n out]
    G    = dY ∘ B_g                                 [rows, n r]
    dX   = dY W_g + G A_g
    dA_g = Σ G_rowᵀ X_row      dB_g = Σ dY_rowᵀ ∘ T_row      db_g = Σ dY_row

A loop over in or n out then runs in one large tile, where one for each layer of dX takes so many registers that tiles
are half as wide; X is read once. What is saved, and named, is what `grouped_linear` saves.

A quantised weight becomes an array in each direction anyway, and W is written in place of them. One that is an array
already would be copied into W: such layers are left to `grouped_linear`, and so are those that are not alike.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.grouped_linear import FACTORS_NAME, RANK_NAME, check, worth_together
from pronghorn.pallas_kernels.grouped_products import LowRank, by_columns, by_rows, over_rows
from pronghorn.pallas_kernels.lora_linear import is_quantized
from pronghorn.pallas_kernels.stacked_linears import LinearWeights, instantiate, stacked_a, wanted_fields


def stack_well(x: jax.Array, linears: Sequence[LinearWeights]) -> bool:
    """Whether `stacked_grouped_linears` takes these layers of x [rows, in], and saves time by it.

    That is where they are quantised, alike in everything, and the matrices of all, which then exist at once in forward
    as well, are no more than `grouped_linears` allows itself in backward. With fewer rows than groups (decoding) only
    the matrices of the groups that have rows are wanted, which is its business.
    """
    kinds = [
        (jax.tree.structure(linear), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(linear)])
        for linear in linears
    ]
    alike = all(kind == kinds[0] for kind in kinds)
    quantized = all(is_quantized(linear.weight) for linear in linears)
    enough_rows = x.shape[0] >= linears[0].weight.shape[0]
    return alike and quantized and enough_rows and worth_together(linears, x.shape, x.dtype)


def stacked_grouped_linears(
    x: jax.Array,
    linears: Sequence[LinearWeights],
    group_sizes: jax.Array,
    *,
    scales: Sequence[float],
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """y_1, y_2, .. of `grouped_linears` beside each other.

    Args:
      x, group_sizes, scales, implementation: as there.
      linears: n layers that `stack_well`, or that are at least quantised and alike.

    Returns:
      [rows, n out] in the dtype of x.

    Raises:
      InputError: as there.
    """
    check(x, linears, group_sizes, scales)
    scales = tuple(float(scale) for scale in scales)
    chosen = launch.resolve(implementation)
    return _stacked(x, tuple(linears), group_sizes.astype(jnp.int32), scales, chosen)


def _matrices(weights: Sequence[Any], dtype: Any) -> jax.Array:
    """W [groups, n out, in]: written at once where the class can, else dequantised by what XLA fuses into one pass."""
    first, *others = weights
    if hasattr(first, "dequantize_above"):
        return first.dequantize_above(*others).astype(dtype)
    return jnp.concatenate([weight.dequantize().astype(dtype) for weight in weights], axis=-2)


def _factors(linears, scales, dtype):
    """(A, B) in the dtype of X, or Nones; the scale goes on the smallest matrix, before the one rounding of B."""
    if linears[0].lora_a is None:
        return None, None
    bs = [(scale * linear.lora_b).astype(dtype) for linear, scale in zip(linears, scales, strict=True)]
    return stacked_a(linears, dtype), jnp.concatenate(bs, axis=1)


def _compute(x, linears, factors, group_sizes, implementation):
    """(Y, T); T is None without adapters."""
    a, b = factors
    t = None if a is None else by_rows(x, a, group_sizes, implementation=implementation)
    # Dequantised when it is needed and not before, see `stacked_linears`.
    weights = [linear.weight for linear in linears]
    (x, t), weights = jax.lax.optimization_barrier(((x, t), weights))
    lowrank = None if t is None else LowRank(t, b)
    biased = linears[0].bias is not None
    bias = jnp.concatenate([linear.bias for linear in linears], axis=1) if biased else None
    matrices = _matrices(weights, x.dtype)
    return by_rows(x, matrices, group_sizes, lowrank, bias, implementation=implementation), t


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _stacked(x, linears, group_sizes, scales, implementation):
    return _compute(x, linears, _factors(linears, scales, x.dtype), group_sizes, implementation)[0]


def _stacked_forward(x, linears, group_sizes, scales, implementation):
    wanted_x = launch.perturbed(x)
    wanted = tuple(wanted_fields("grouped_linear", linear) for linear in linears)
    values = jax.custom_derivatives.custom_vjp_primal_tree_values
    x, linears, group_sizes = values((x, linears, group_sizes))
    factors = jax.tree.map(
        lambda factor: checkpoint_name(factor, FACTORS_NAME), _factors(linears, scales, x.dtype)
    )
    weights = tuple(linear.weight for linear in linears)
    saved: dict[str, Any] = {"weights": weights, "factors": factors, "group_sizes": group_sizes}
    if any("lora_a" in fields for fields in wanted):
        saved["x"] = x
    y, t = _compute(x, linears, factors, group_sizes, implementation)
    if any("lora_b" in fields for fields in wanted):
        saved["t"] = checkpoint_name(t, RANK_NAME)
    dtypes = tuple(
        tuple((field, getattr(linear, field).dtype) for field in sorted(fields))
        for linear, fields in zip(linears, wanted, strict=True)
    )
    return y, (saved, launch.Static((wanted_x, dtypes)))


def _stacked_backward(scales, implementation, residuals, cotangent):
    saved, static = residuals
    wanted_x, dtypes = static.value
    a, b = saved["factors"]
    sizes, parts = saved["group_sizes"], len(scales)
    # Or XLA would find the forward's dequantised weights equal to these, and keep them alive in between.
    weights, dy = jax.lax.optimization_barrier((saved["weights"], instantiate(cotangent)))
    sums = functools.partial(over_rows, implementation=implementation)
    wanted = {field for fields in dtypes for field, _ in fields}

    g: Any = None
    if a is not None and (wanted_x or "lora_a" in wanted):
        g = by_columns(dy, b, sizes, parts=parts, implementation=implementation)
    dx: Any = None
    if wanted_x:
        lowrank = None if g is None else LowRank(g, a)
        dx = by_columns(dy, _matrices(weights, dy.dtype), sizes, lowrank, implementation=implementation)
        # The matrices are the largest arrays of a layer: what is in fp32, and X, come when they have gone.
        dx, dy, g = jax.lax.optimization_barrier((dx, dy, g))
    totals: dict[str, Any] = {}
    if "lora_a" in wanted:
        totals["lora_a"] = sums(g, saved["x"], sizes)
    if "lora_b" in wanted:
        totals["lora_b"] = sums(dy, saved["t"], sizes, parts=parts)
    if "bias" in wanted:
        totals["bias"] = sums(dy, jnp.ones((dy.shape[0], 1), dy.dtype), sizes)[..., 0]

    gradients = []
    for index, (scale, fields) in enumerate(zip(scales, dtypes, strict=True)):
        found: dict[str, Any] = dict.fromkeys(LinearWeights._fields)
        for field, dtype in fields:
            size = totals[field].shape[1] // parts
            part = totals[field][:, index * size : (index + 1) * size]
            found[field] = (scale * part if field == "lora_b" else part).astype(dtype)
        gradients.append(LinearWeights(**found))
    return dx, tuple(gradients), None


_stacked.defvjp(_stacked_forward, _stacked_backward, symbolic_zeros=True)
