"""A linear layer a group of rows with low-rank adapters, the experts of a mixture, and its gradient by hand.

Rows are sorted by group; g is the group of a row. With W [groups, out, in] (frozen or trained, 16 bit or quantised),
A [groups, r, in], B [groups, out, r]:

    T  = X A_gᵀ
    Y  = X W_gᵀ + s T B_gᵀ + b_g
    G  = s dY B_g                      rank r, computed once
    dX = dY W_g + G A_g
    dA_g = Σ G_rowᵀ X_row      dB_g = s Σ dY_rowᵀ T_row      dW_g = Σ dY_rowᵀ X_row      db_g = Σ dY_row

each sum over the rows of g. No ΔW = B A is formed, and a frozen W gets no gradient. Products run in the dtype of X and
add up in fp32; A and B are cast to it, their gradients leave the products in fp32. The low-rank part of Y and of dX is
added inside of the large product, in fp32, before its one rounding.

Saved: X only where A or W is trained, T (r numbers a row, named "grouped_linear_rank" for `jax.checkpoint` policies)
where B is. A quantised weight is dequantised again in backward. Where there are fewer rows than groups, as in decoding,
no more matrices are dequantised than there are rows: those of the groups that have any, with static shapes.

Source: Hu et al., LoRA, 2021, section 4.1, https://arxiv.org/abs/2106.09685; Gale et al., MegaBlocks, 2022, section 5,
https://arxiv.org/abs/2211.15841, for products of experts without padding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.grouped_products import LowRank, by_columns, by_rows, group_of_rows, over_rows
from pronghorn.pallas_kernels.lora_linear import QuantizedWeight, dense, differentiated, is_quantized


def grouped_linear(
    x: jax.Array,
    weight: jax.Array | QuantizedWeight,
    group_sizes: jax.Array,
    lora_a: jax.Array | None = None,
    lora_b: jax.Array | None = None,
    *,
    scale: float = 1.0,
    bias: jax.Array | None = None,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """x W_gᵀ + scale · (x A_gᵀ) B_gᵀ + bias_g, g the group of each row.

    Args:
      x: [rows, in], sorted by group; bf16, fp16 or fp32.
      weight: [groups, out, in] of any float dtype, or a `QuantizedWeight` of that shape, which is never trained.
      group_sizes: int32 [groups], rows of each group, zero among them. Their sum may be below rows: rows past it give
        zeros, and zero gradients.
      lora_a, lora_b: [groups, r, in] and [groups, out, r], fp32 masters; both or neither.
      scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
      bias: [groups, out].
      implementation: "pallas" (kernels), "xla" (`jax.lax.ragged_dot_general`), or None: the kernels on a GPU, where
        XLA multiplies every row with every group's matrix. Both have the gradient by hand.

    Returns:
      [rows, out] in the dtype of x.

    Raises:
      InputError: when shapes do not fit, one of A and B is missing, or a quantised weight would be trained.
    """
    if len(weight.shape) != 3 or x.ndim != 2 or x.shape[1] != weight.shape[2]:
        raise InputError(
            f"grouped_linear: x {x.shape} and weight {weight.shape} must be [rows, in] and [groups, out, in]."
        )
    groups, outputs, inputs = weight.shape
    if group_sizes.shape != (groups,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise InputError(
            f"grouped_linear: group_sizes {group_sizes.dtype}{group_sizes.shape} must be integers ({groups},)."
        )
    if (lora_a is None) != (lora_b is None):
        raise InputError("grouped_linear: give both lora_a and lora_b, or neither.")
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[1]
        if lora_a.shape != (groups, rank, inputs) or lora_b.shape != (groups, outputs, rank):
            raise InputError(
                f"grouped_linear: lora_a {lora_a.shape} and lora_b {lora_b.shape} must be [groups, r, in] and "
                f"[groups, out, r] for weight {weight.shape}."
            )
    if bias is not None and bias.shape != (groups, outputs):
        raise InputError(f"grouped_linear: bias {bias.shape} must be {(groups, outputs)}.")
    chosen = launch.resolve(implementation)
    sizes = group_sizes.astype(jnp.int32)
    return _grouped_linear(x, weight, sizes, lora_a, lora_b, bias, float(scale), chosen)


def grouped_linear_reference(
    x: jax.Array,
    weight: jax.Array | QuantizedWeight,
    group_sizes: jax.Array,
    lora_a: jax.Array | None = None,
    lora_b: jax.Array | None = None,
    *,
    scale: float = 1.0,
    bias: jax.Array | None = None,
) -> jax.Array:
    """The oracle of `grouped_linear`: every row through every group, and its own kept; summed in fp32, rounded once."""
    group = group_of_rows(group_sizes, x.shape[0])
    matrices = dense(weight, x.dtype)
    total = jnp.zeros((x.shape[0], weight.shape[1]), jnp.float32)
    for g in range(weight.shape[0]):
        y = jnp.dot(x, matrices[g].T, preferred_element_type=jnp.float32)
        if lora_a is not None and lora_b is not None:
            t = jnp.dot(x, lora_a[g].astype(x.dtype).T, preferred_element_type=jnp.float32).astype(x.dtype)
            y += scale * jnp.dot(t, lora_b[g].astype(x.dtype).T, preferred_element_type=jnp.float32)
        if bias is not None:
            y += bias[g].astype(jnp.float32)
        total = jnp.where((group == g)[:, None], y, total)
    return total.astype(x.dtype)


def _dense_groups(rows, weight, group_sizes, *stacks):
    """(W as an array, sizes, the other stacks) of the groups that have rows, or of all: what the large product takes.

    The groups that have rows, in order, come first of `rows` many; those after them are group 0 again, without rows.
    """
    groups = group_sizes.shape[0]
    if not is_quantized(weight) or rows >= groups:
        return dense(weight, weight.dtype), group_sizes, *stacks
    present = jnp.nonzero(group_sizes > 0, size=rows, fill_value=0)[0]
    sizes = jnp.where(jnp.arange(rows) < jnp.sum(group_sizes > 0), group_sizes[present], 0)
    weight, stacks = jax.tree.map(lambda leaf: leaf[present], (weight, stacks))
    return dense(weight, weight.dtype), sizes, *stacks


def _compute(x, weight, group_sizes, lora_a, lora_b, bias, scale, implementation):
    """(Y, T); T is None without an adapter."""
    t: Any = None
    lowrank = None
    if is_quantized(weight):  # dequantised when x is there and not before, see `stacked_linears`
        x, weight = jax.lax.optimization_barrier((x, weight))
    if lora_a is not None:
        t = by_rows(x, lora_a.astype(x.dtype), group_sizes, implementation=implementation)
    matrices, sizes, lora_b, bias = _dense_groups(x.shape[0], weight, group_sizes, lora_b, bias)
    if lora_a is not None:
        # The scale goes on the smallest matrix of the product, before the one rounding of B.
        lowrank = LowRank(t, (scale * lora_b).astype(x.dtype))
    return by_rows(x, matrices.astype(x.dtype), sizes, lowrank, bias, implementation=implementation), t


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _grouped_linear(x, weight, group_sizes, lora_a, lora_b, bias, scale, implementation):
    return _compute(x, weight, group_sizes, lora_a, lora_b, bias, scale, implementation)[0]


def _grouped_linear_forward(x, weight, group_sizes, lora_a, lora_b, bias, scale, implementation):
    arguments = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    wanted = differentiated("grouped_linear", arguments)
    x, weight, group_sizes, lora_a, lora_b, bias = jax.custom_derivatives.custom_vjp_primal_tree_values(
        (x, weight, group_sizes, lora_a, lora_b, bias)
    )
    saved: dict[str, Any] = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    saved["group_sizes"] = group_sizes
    if wanted & {"weight", "lora_a"}:
        saved["x"] = x
    y, t = _compute(x, weight, group_sizes, lora_a, lora_b, bias, scale, implementation)
    if "lora_b" in wanted:
        saved["t"] = checkpoint_name(t, "grouped_linear_rank")
    return y, (saved, launch.Static((wanted, x.dtype)))


def _grouped_linear_backward(scale, implementation, residuals, dy):
    saved, static = residuals
    wanted, dtype = static.value
    gradients: dict[str, Any] = dict.fromkeys(("x", "weight", "group_sizes", "lora_a", "lora_b", "bias"))
    weight, lora_a, lora_b, sizes = (saved[name] for name in ("weight", "lora_a", "lora_b", "group_sizes"))
    if is_quantized(weight):
        # Or XLA would find the forward's dequantised weight equal to this one, and keep it alive in between.
        weight, dy = jax.lax.optimization_barrier((weight, dy))
    columns = functools.partial(by_columns, implementation=implementation)
    sums = functools.partial(over_rows, implementation=implementation)

    if lora_a is not None and wanted & {"x", "lora_a"}:
        g = columns(dy, (scale * lora_b).astype(dtype), sizes)
    if "x" in wanted:
        matrices, some, some_a = _dense_groups(dy.shape[0], weight, sizes, lora_a)
        lowrank = None if lora_a is None else LowRank(g, some_a.astype(dtype))
        gradients["x"] = columns(dy, matrices.astype(dtype), some, lowrank)
    if "lora_a" in wanted:
        gradients["lora_a"] = sums(g, saved["x"], sizes).astype(lora_a.dtype)
    if "lora_b" in wanted:
        gradients["lora_b"] = (scale * sums(dy, saved["t"], sizes)).astype(lora_b.dtype)
    if "weight" in wanted:
        # bf16 out of bf16 operands: the product rounds once, and no fp32 copy of the weight's size exists.
        product_dtype = jnp.promote_types(dtype, weight.dtype)
        gradients["weight"] = sums(dy, saved["x"], sizes, dtype=product_dtype).astype(weight.dtype)
    if "bias" in wanted:
        ones = jnp.ones((dy.shape[0], 1), dtype)
        gradients["bias"] = sums(dy, ones, sizes)[..., 0].astype(saved["bias"].dtype)
    return tuple(gradients.values())


_grouped_linear.defvjp(_grouped_linear_forward, _grouped_linear_backward, symbolic_zeros=True)
