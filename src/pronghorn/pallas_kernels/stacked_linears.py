"""The products of linear layers with adapters that read one input, forward and backward; rank-r products are stacked.

With n [tokens, in], W_i [out_i, in], A_i [r_i, in], B_i [out_i, r_i], scales s_i, A = [A_1; A_2; ..] [Σr, in], and B̂_i
[out_i, Σr] the matrix s_i B_i in its own columns, zeros in those of the others:

    T = n Aᵀ           y_i = n W_iᵀ + T B̂_iᵀ + b_i
    G = Σ dY_i B̂_i     dn  = G A + Σ dY_i W_i
    dA = Gᵀ n          dB_i = s_i dY_iᵀ T (its columns)     dW_i = dY_iᵀ n     db_i = Σ dY_i

So n is read once for all the A and once for all their gradients, and dn is summed up once for all of them. The zeros
cost nothing: a product with an inner side of 16 or 64 takes as long as its memory traffic, and without them XLA would
copy slices of T and concatenate G. Where Σr grows past `MOST_SHARED_RANK` each layer reads its own columns instead.

Products of 16-bit arrays leave in 16 bits, summed in fp32 inside; sums of products are written product + product, which
cuBLAS adds while it writes. G is fp32, for it is small and rounded twice otherwise. These are parts of an op, not ops:
`norm_linears`, `gated_mlp` and `residual_linear` hold them, and say what is saved.

Source: Hu et al., LoRA, 2021, section 4.1, https://arxiv.org/abs/2106.09685.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.lora_linear import (
    check_arguments,
    differentiated,
    is_quantized,
    over_tokens,
    project,
    project_back,
    rounds_operands,
    times,
    times_transposed,
)

# An inner side up to this is free beside the memory that a product of that shape reads and writes.
MOST_SHARED_RANK = 128


class LinearWeights(NamedTuple):
    """The arrays of one linear layer, as `lora_linear` takes them.

    Attributes:
      weight: [out, in], an array of any float dtype or a `QuantizedWeight`, which is never trained.
      lora_a, lora_b: fp32 [r, in] and [out, r], or None.
      bias: [out] or None.
    """

    weight: Any
    lora_a: jax.Array | None = None
    lora_b: jax.Array | None = None
    bias: jax.Array | None = None


class _Columns(NamedTuple):
    """A layer's place in T and G: it reads [start, stop), and `rank` columns from start + offset are its own."""

    start: int
    stop: int
    offset: int
    rank: int


def check_linears(op: str, inputs: int, linears: Sequence[LinearWeights], scales: Sequence[float]) -> None:
    """Raise InputError where shapes do not fit x [..., inputs], or there is not one scale a layer."""
    if len(linears) != len(scales):
        raise InputError(
            f"{op}: {len(linears)} linear layers and {len(scales)} scales; give one scale a layer."
        )
    for linear in linears:
        check_arguments(op, inputs, *linear)


def wanted_fields(op: str, linear: LinearWeights) -> frozenset[str]:
    """The fields that are differentiated, of a layer as a `symbolic_zeros` forward rule sees it."""
    return differentiated(op, linear._asdict())


def apply_linears(
    n: jax.Array,
    linears: Sequence[LinearWeights],
    scales: Sequence[float],
    *,
    add: jax.Array | None = None,
    largest: jax.Array | None = None,
    t: jax.Array | None = None,
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """((y_1, ..), T): y_i [..., out_i] and T [..., Σr] in the dtype of n [..., in]; T is None without any adapter.

    `add` [..., out_i], such as a residual stream, is added to every y_i: to the small product first, so that cuBLAS
    can add the sum to the large one. `largest` is as in `project`; `t` is T where that is known.
    """
    dtype, tokens = n.dtype, n.shape[:-1]
    if add is not None:
        n, add = n.reshape(-1, n.shape[-1]), add.reshape(-1, add.shape[-1])
    if t is not None:
        t = t.reshape(*n.shape[:-1], -1)
    elif any(adapter_ranks(linears)):
        t = times_transposed(n, stacked_a(linears, dtype), dtype)
    outputs: list[jax.Array] = []
    for linear, scale, columns in zip(linears, scales, _columns(linears), strict=True):
        if not rounds_operands(linear.weight):  # one that is dequantised
            (n, t, outputs), linear = _in_turn((n, t, outputs), linear)
        y = project(n, linear.weight, dtype, largest)
        other = add
        if columns is not None:
            low = times_transposed(_read(t, columns), placed_b(linear, scale, columns, dtype), dtype)
            other = low if other is None else other + low
        if other is not None:
            # Large product first: XLA lets the first of two products take the second as cuBLAS's addend.
            y = y + other
        if linear.bias is not None:
            y += linear.bias.astype(dtype)
        outputs.append(y)
    if add is not None:
        t = None if t is None else t.reshape(*tokens, -1)
        outputs = [y.reshape(*tokens, -1) for y in outputs]
    return tuple(outputs), t


def _in_turn(before: Any, linear: LinearWeights) -> tuple[Any, LinearWeights]:
    """The same, with a quantised weight that only exists once every array of `before` does.

    Nothing else keeps XLA from dequantising the weights of a whole model ahead of the first product, from gluing those
    of layers with one input together, and from holding forward's until backward needs the same.
    """
    if not is_quantized(linear.weight):
        return before, linear
    before, weight = jax.lax.optimization_barrier((before, linear.weight))
    return before, linear._replace(weight=weight)


def rank_gradient(dys: Sequence[jax.Array], linears: Sequence[LinearWeights], scales: Sequence[float]) -> Any:
    """G, fp32 [..., Σr], from dY_i [..., out_i]; None without any adapter."""
    parts = [
        times(dy, placed_b(linear, scale, columns, dy.dtype), jnp.float32)
        for dy, linear, scale, columns in zip(dys, linears, scales, _columns(linears), strict=True)
        if columns is not None
    ]
    if not parts:
        return None
    return sum(parts[1:], parts[0]) if share_rank_products(linears) else jnp.concatenate(parts, axis=-1)


def input_gradient(
    dys: Sequence[jax.Array], g: Any, linears: Sequence[LinearWeights], largest: Sequence[Any] | None = None
) -> jax.Array:
    """dn [..., in] in the dtype of dY_i; g: G, or None without any adapter; `largest` of each dY_i, as in `project`."""
    dtype = dys[0].dtype
    total: Any = None if g is None else times(g.astype(dtype), stacked_a(linears, dtype), dtype)
    for dy, linear, known in zip(dys, linears, largest or [None] * len(dys), strict=True):
        (dy, total), linear = _in_turn((dy, total), linear)
        product = project_back(dy, linear.weight, dtype, known)
        # The product that is already there comes second, as in `apply_linears`.
        total = product if total is None else product + total
    return total


def weight_gradients(
    dys: Sequence[jax.Array],
    da: Any,
    t: Any,
    n: Any,
    linears: Sequence[LinearWeights],
    scales: Sequence[float],
    wanted: Sequence[frozenset[str]],
) -> tuple[LinearWeights, ...]:
    """Gradients of the `wanted` fields of each layer, None for the others.

    Args:
      dys: dY_i [..., out_i].
      da: fp32 [Σr, in], where any A is wanted. t: T, where any B is. n: [..., in], where any weight is.
    """
    gradients, row = [], 0
    for dy, linear, scale, columns, fields in zip(
        dys, linears, scales, _columns(linears), wanted, strict=True
    ):
        found: dict[str, Any] = dict.fromkeys(LinearWeights._fields)
        rank = 0 if columns is None else columns.rank
        if "lora_a" in fields:
            found["lora_a"] = da[row : row + rank]
        if "lora_b" in fields:
            product = over_tokens(dy, _read(t, columns), jnp.float32)
            found["lora_b"] = scale * product[:, columns.offset : columns.offset + rank]
        if "weight" in fields:
            # bf16 out of bf16 operands: the product rounds once, and no fp32 copy of the weight's size exists.
            found["weight"] = over_tokens(dy, n, jnp.promote_types(dy.dtype, linear.weight.dtype))
        if "bias" in fields:
            found["bias"] = jnp.sum(dy.astype(jnp.float32), axis=tuple(range(dy.ndim - 1)))
        for field in fields:
            found[field] = found[field].astype(getattr(linear, field).dtype)
        gradients.append(LinearWeights(**found))
        row += rank
    return tuple(gradients)


def instantiate(cotangent: Any) -> jax.Array:
    """A cotangent as an array: that of an output which nothing depends on comes as a symbolic zero."""
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def adapter_ranks(linears: Sequence[LinearWeights]) -> list[int]:
    """r_i of each layer, 0 for one without an adapter; A may have an axis of experts in front."""
    return [0 if linear.lora_a is None else linear.lora_a.shape[-2] for linear in linears]


def share_rank_products(linears: Sequence[LinearWeights]) -> bool:
    """Whether every layer reads the whole of T."""
    return sum(adapter_ranks(linears)) <= MOST_SHARED_RANK


def _columns(linears) -> list[Any]:
    ranks, shared = adapter_ranks(linears), share_rank_products(linears)
    places: list[_Columns | None] = []
    first = 0
    for rank in ranks:
        place = _Columns(0, sum(ranks), first, rank) if shared else _Columns(first, first + rank, 0, rank)
        places.append(place if rank else None)
        first += rank
    return places


def _read(t, columns):
    whole = columns.start == 0 and columns.stop == t.shape[-1]
    return t if whole else t[..., columns.start : columns.stop]


def stacked_a(linears: Sequence[LinearWeights], dtype: Any) -> Any:
    """A [Σr, in], or [experts, Σr, in]; None without any adapter."""
    parts = [linear.lora_a.astype(dtype) for linear in linears if linear.lora_a is not None]
    return jnp.concatenate(parts, axis=-2) if parts else None


def shared_factors(linears: Sequence[LinearWeights], scales: Sequence[float], dtype: Any) -> list[jax.Array]:
    """B̂_i [out_i, Σr] of each layer, all zeros for one without an adapter; for layers that share T whole."""
    rank = sum(adapter_ranks(linears))
    return [
        jnp.zeros((linear.weight.shape[0], rank), dtype)
        if columns is None
        else placed_b(linear, scale, columns, dtype)
        for linear, scale, columns in zip(linears, scales, _columns(linears), strict=True)
    ]


def own_rows(
    db: jax.Array, index: int, linears: Sequence[LinearWeights], scales: Sequence[float]
) -> jax.Array:
    """dB of layer `index` [out, r] in its dtype, from the gradient of B̂ᵀ, fp32 [Σr, out], without the scale."""
    columns = _columns(linears)[index]
    own = db[columns.offset : columns.offset + columns.rank]
    lora_b: Any = linears[index].lora_b
    return (scales[index] * own.T).astype(lora_b.dtype)


def placed_b(linear, scale, columns, dtype):
    """s B̂ [out, stop - start]. The scale goes on the smallest matrix of the product, before the one rounding of B."""
    b = (scale * linear.lora_b).astype(dtype)
    before, after = columns.offset, columns.stop - columns.start - columns.offset - columns.rank
    return jnp.pad(b, ((0, 0), (before, after))) if before or after else b
