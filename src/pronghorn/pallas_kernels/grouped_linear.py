"""Linear layers a group of rows with low-rank adapters, the experts of a mixture, and their gradient by hand.

Rows are sorted by group; g is the group of a row. For layers that read the same rows (gate and up), with W_i [groups,
out, in] (frozen or trained, 16 bit or quantised), A_i [groups, r_i, in], B_i [groups, out, r_i], and A = [A_1; A_2; ..]
[groups, Σr, in]:

    T   = X A_gᵀ                                            T_i: the columns of layer i
    Y_i = X W_i,gᵀ + s_i T_i B_i,gᵀ + b_i,g
    G   = [s_1 dY_1 B_1,g, s_2 dY_2 B_2,g, ..]              rank Σr, computed once
    dX  = Σ dY_i W_i,g + G A_g
    dA_g = Σ G_rowᵀ X_row      dB_i,g = s_i Σ dY_i,rowᵀ T_i,row      dW_i,g = Σ dY_i,rowᵀ X_row      db_i,g = Σ dY_i,row

each sum of the last line over the rows of g. No ΔW = B A is formed, and a frozen W gets no gradient. Products run in
the dtype of X and add up in fp32; A and B are cast to it, their gradients leave the products in fp32. The low-rank part
of Y and of dX is added inside of the large product, in fp32, before its one rounding, and so are all the dY_i W_i of
one dX. X, which has many rows for few columns of A, is so read once for all the A and once for all their gradients, and
dX is written once.

Rows may be copies of tokens: the rows of X that several experts read, and those of Y that are summed up again.
`TokenRows` says which, X_row = x[token] and y[token] = Σ Y_row, and no copy is written: the products read x, and in
backward dY_row = dy[token], through an index. dX alone exists by rows before its sum.

Saved: X only where A or W is trained, T (Σr numbers a row, named `RANK_NAME` for `jax.checkpoint` policies) where a B
is, and A and s_i B_i as the products read them (named `FACTORS_NAME`), not their masters. A quantised weight is
dequantised again in backward. Where there are fewer rows than groups, as in decoding, no more matrices are dequantised
than there are rows: those of the groups that have any, with static shapes. In backward the dequantised weights of all
layers exist at once only where that saves more than half as many bytes of dX.

Source: Hu et al., LoRA, 2021, section 4.1, https://arxiv.org/abs/2106.09685; Gale et al., MegaBlocks, 2022, section 5,
https://arxiv.org/abs/2211.15841, for products of experts without padding.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.grouped_kernels import row_count
from pronghorn.pallas_kernels.grouped_products import (
    LowRank,
    by_columns,
    by_rows,
    gather,
    group_of_rows,
    over_rows,
)
from pronghorn.pallas_kernels.lora_linear import QuantizedWeight, dense, is_quantized
from pronghorn.pallas_kernels.stacked_linears import (
    LinearWeights,
    instantiate,
    stacked_a,
    wanted_fields,
)

RANK_NAME = "grouped_linear_rank"
FACTORS_NAME = "grouped_linear_factors"


class _Factors(NamedTuple):
    """The adapters in the dtype of X: A [groups, Σr, in] and s_i B_i [groups, out_i, r_i]; None without any."""

    a: Any
    bs: tuple[Any, ...]

    def ranks(self) -> list[int]:
        return [0 if b is None else b.shape[-1] for b in self.bs]


class TokenRows(NamedTuple):
    """The rows as copies of tokens, k of each.

    Attributes:
      token: int32 [rows], whose copy a row is.
      place: int32 [tokens, k], where the copies of a token lie.
    """

    token: jax.Array
    place: jax.Array

    def sum(self, rows: jax.Array) -> jax.Array:
        """[rows, d] -> [tokens, d] in its dtype, summed in fp32."""
        return jnp.sum(gather(rows, self.place).astype(jnp.float32), axis=1).astype(rows.dtype)


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
    """x W_gᵀ + scale · (x A_gᵀ) B_gᵀ + bias_g, g the group of each row: `grouped_linears` of one layer.

    Args:
      x, group_sizes, implementation: as there.
      weight: [groups, out, in] of any float dtype, or a `QuantizedWeight` of that shape, which is never trained.
      lora_a, lora_b: [groups, r, in] and [groups, out, r], fp32 masters; both or neither.
      scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
      bias: [groups, out].

    Returns:
      [rows, out] in the dtype of x.

    Raises:
      InputError: when shapes do not fit, one of A and B is missing, or a quantised weight would be trained.
    """
    linear = LinearWeights(weight, lora_a, lora_b, bias)
    return grouped_linears(x, (linear,), group_sizes, scales=(scale,), implementation=implementation)[0]


def grouped_linears(
    x: jax.Array,
    linears: Sequence[LinearWeights],
    group_sizes: jax.Array,
    *,
    scales: Sequence[float],
    read: TokenRows | None = None,
    summed: TokenRows | None = None,
    implementation: launch.Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """(y_1, y_2, ..), y_i the i-th layer of x.

    Args:
      x: [rows, in], sorted by group; bf16, fp16 or fp32. With `read` [tokens, in], whose copies the rows are.
      linears: arrays as in `grouped_linear`; any of them may lack an adapter, ranks and outputs may differ.
      group_sizes: int32 [groups], rows of each group, zero among them. Their sum may be below rows: rows past it give
        zeros, and zero gradients.
      scales: s_i = alpha / r of each.
      read: which token each row is a copy of.
      summed: which rows each token of the result is the sum of.
      implementation: "pallas" (kernels), "xla" (`jax.lax.ragged_dot_general`), or None: the kernels on a GPU, where
        XLA multiplies every row with every group's matrix. Both have the gradient by hand.

    Returns:
      y_i [rows, out_i] in the dtype of x, or [tokens, out_i] where `summed`.

    Raises:
      InputError: when shapes do not fit, one of A and B is missing, or a quantised weight would be trained.
    """
    if len(linears) != len(scales) or not linears:
        raise InputError(
            f"grouped_linears: {len(linears)} layers and {len(scales)} scales; give one scale a layer."
        )
    for linear in linears:
        _check(x, linear, group_sizes)
    chosen = launch.resolve(implementation)
    scales = tuple(float(scale) for scale in scales)
    return _grouped_linears(x, tuple(linears), group_sizes.astype(jnp.int32), read, summed, scales, chosen)


def _check(x, linear, group_sizes):
    weight, lora_a, lora_b, bias = linear
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


def _index(rows: TokenRows | None) -> jax.Array | None:
    return None if rows is None else rows.token


def _present(rows, group_sizes):
    """(the groups that have rows, in order, `rows` many with group 0 behind them; their sizes, zeros behind them)."""
    present = jnp.nonzero(group_sizes > 0, size=rows, fill_value=0)[0]
    return present, jnp.where(jnp.arange(rows) < jnp.sum(group_sizes > 0), group_sizes[present], 0)


def _of_groups(rows, group_sizes, weight, *stacks):
    """(W as an array, sizes, the other stacks), of the groups that have rows where that is fewer to dequantise."""
    if is_quantized(weight) and rows < group_sizes.shape[0]:
        present, group_sizes = _present(rows, group_sizes)
        weight, stacks = jax.tree.map(lambda leaf: leaf[present], (weight, stacks))
    return dense(weight, weight.dtype), group_sizes, *stacks


def _factors(linears, scales, dtype):
    """The scale goes on the smallest matrix of the product, before the one rounding of B."""
    bs = tuple(
        None if linear.lora_b is None else (scale * linear.lora_b).astype(dtype)
        for linear, scale in zip(linears, scales, strict=True)
    )
    return _Factors(stacked_a(linears, dtype), bs)


def _columns(array, index, ranks):
    """Layer `index`'s part of the last axis."""
    first = sum(ranks[:index])
    whole = ranks[index] == array.shape[-1]
    return array if whole else array[..., first : first + ranks[index]]


def _compute(x, linears, factors, group_sizes, read, summed, implementation):
    """((y_1, ..), T); T is None without an adapter."""
    rows, dtype, ranks, a = row_count(x, _index(read)), x.dtype, factors.ranks(), factors.a
    multiply = functools.partial(by_rows, index=_index(read), implementation=implementation)
    t: Any = None if a is None else multiply(x, a, group_sizes)
    outputs: list[jax.Array] = []
    for index, (linear, b) in enumerate(zip(linears, factors.bs, strict=True)):
        if is_quantized(linear.weight):  # dequantised when it is needed and not before, see `stacked_linears`
            (x, t, outputs), weight = jax.lax.optimization_barrier(((x, t, outputs), linear.weight))
            linear = linear._replace(weight=weight)
        matrices, sizes, b, bias = _of_groups(rows, group_sizes, linear.weight, b, linear.bias)
        lowrank = None if b is None else LowRank(_columns(t, index, ranks), b)
        y = multiply(x, matrices.astype(dtype), sizes, lowrank, bias)
        outputs.append(y if summed is None else summed.sum(y))
    return tuple(outputs), t


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _grouped_linears(x, linears, group_sizes, read, summed, scales, implementation):
    factors = _factors(linears, scales, x.dtype)
    return _compute(x, linears, factors, group_sizes, read, summed, implementation)[0]


def _grouped_linears_forward(x, linears, group_sizes, read, summed, scales, implementation):
    wanted_x = launch.perturbed(x)
    wanted = tuple(wanted_fields("grouped_linear", linear) for linear in linears)
    values = jax.custom_derivatives.custom_vjp_primal_tree_values
    x, linears, group_sizes, read, summed = values((x, linears, group_sizes, read, summed))
    factors = jax.tree.map(
        lambda factor: checkpoint_name(factor, FACTORS_NAME), _factors(linears, scales, x.dtype)
    )
    bare = tuple(linear._replace(lora_a=None, lora_b=None) for linear in linears)
    saved: dict[str, Any] = {"linears": bare, "factors": factors, "group_sizes": group_sizes}
    saved |= {"read": read, "summed": summed}
    if any(fields & {"weight", "lora_a"} for fields in wanted):
        saved["x"] = x
    outputs, t = _compute(x, linears, factors, group_sizes, read, summed, implementation)
    if any("lora_b" in fields for fields in wanted):
        saved["t"] = checkpoint_name(t, RANK_NAME)
    dtypes = tuple(
        tuple((field, getattr(linear, field).dtype) for field in sorted(fields))
        for linear, fields in zip(linears, wanted, strict=True)
    )
    return outputs, (
        saved,
        launch.Static((wanted_x, dtypes, x.dtype, (row_count(x, _index(read)), x.shape[1]))),
    )


def _grouped_linears_backward(scales, implementation, residuals, cotangents):
    saved, static = residuals
    wanted_x, dtypes, dtype, shape = static.value
    wanted = [dict(fields) for fields in dtypes]
    linears, sizes, factors = saved["linears"], saved["group_sizes"], saved["factors"]
    ranks = factors.ranks()
    dys = [instantiate(dy) for dy in cotangents]
    if any(is_quantized(linear.weight) for linear in linears):
        # Or XLA would find the forward's dequantised weight equal to this one, and keep it alive in between.
        linears, dys = jax.lax.optimization_barrier((linears, dys))
    of_x, of_dy = _index(saved["read"]), _index(saved["summed"])
    sums = functools.partial(over_rows, implementation=implementation)
    columns = functools.partial(by_columns, index=of_dy, implementation=implementation)

    g: Any = None
    if any(ranks) and (wanted_x or any("lora_a" in fields for fields in wanted)):
        parts = [columns(dy, b, sizes) for dy, b in zip(dys, factors.bs, strict=True) if b is not None]
        g = jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    dx: Any = _input_gradient(dys, g, factors.a, linears, sizes, shape, columns) if wanted_x else None
    if dx is not None and saved["read"] is not None:
        dx = saved["read"].sum(dx)
    with_a = any("lora_a" in fields for fields in wanted)
    da: Any = sums(g, saved["x"], sizes, b_index=of_x) if with_a else None

    gradients = []
    for index, (dy, linear, scale, fields) in enumerate(zip(dys, linears, scales, wanted, strict=True)):
        found: dict[str, Any] = dict.fromkeys(LinearWeights._fields)
        if "lora_a" in fields:
            first = sum(ranks[:index])
            found["lora_a"] = da[:, first : first + ranks[index]]
        if "lora_b" in fields:
            found["lora_b"] = scale * sums(dy, _columns(saved["t"], index, ranks), sizes, a_index=of_dy)
        if "weight" in fields:
            # bf16 out of bf16 operands: the product rounds once, and no fp32 copy of the weight's size exists.
            product_dtype = jnp.promote_types(dtype, linear.weight.dtype)
            found["weight"] = sums(dy, saved["x"], sizes, a_index=of_dy, b_index=of_x, dtype=product_dtype)
        if "bias" in fields:
            found["bias"] = sums(dy, jnp.ones((shape[0], 1), dtype), sizes, a_index=of_dy)[..., 0]
        for field, master_dtype in fields.items():
            found[field] = found[field].astype(master_dtype)
        gradients.append(LinearWeights(**found))
    return dx, tuple(gradients), None, None, None


def _input_gradient(dys, g, a, linears, sizes, shape, columns):
    """dX [rows, in] by `columns`: of all layers at once where their matrices may exist at once, or one by one."""
    rows, dtype = shape[0], dys[0].dtype
    alike = len({linear.weight.shape for linear in linears}) == 1
    if alike and rows >= sizes.shape[0] and _worth_together(linears, shape, dtype):
        pairs = [
            (dy, dense(linear.weight, linear.weight.dtype).astype(dtype))
            for dy, linear in zip(dys, linears, strict=True)
        ]
        lowrank = None if g is None else LowRank(g, a)
        return columns(*pairs[0], sizes, lowrank, more=pairs[1:])
    total: Any = None
    for dy, linear in zip(dys, linears, strict=True):
        if total is not None and is_quantized(linear.weight):
            (dy, total), weight = jax.lax.optimization_barrier(((dy, total), linear.weight))
            linear = linear._replace(weight=weight)
        matrices, some, some_a = _of_groups(rows, sizes, linear.weight, a if total is None else None)
        lowrank = None if some_a is None else LowRank(g, some_a)
        product = columns(dy, matrices.astype(dtype), some, lowrank)
        total = product if total is None else total + product
    return total


def _worth_together(linears, shape, dtype):
    """Whether the matrices that would exist besides the first take at most twice the bytes of dX that are not moved."""
    itemsize = jnp.dtype(dtype).itemsize
    more = [linear.weight for linear in linears[1:] if is_quantized(linear.weight)]
    extra = sum(weight.shape[0] * weight.shape[1] * weight.shape[2] * itemsize for weight in more)
    spared = 2 * (len(linears) - 1) * shape[0] * shape[1] * itemsize
    return extra <= 2 * spared


_grouped_linears.defvjp(_grouped_linears_forward, _grouped_linears_backward, symbolic_zeros=True)
