"""The modules a decoder is made of, named as in Hugging Face, and the forward pass of one layer.

Modules only declare parameters; the maths is in free functions over them, and those are a few ops whose hand-derived
gradients choose what a layer saves: its input, q, k and v, attention's output and logsumexp, the residual stream after
attention, gate and up, and a few numbers a token. Weights keep the Hugging Face orientation
`[out, in]`. With `leading=(layers,)` every parameter of a module is stacked on a leading axis, to be scanned over.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.pallas_kernels import gated_mlp as gated_mlp_op
from pronghorn.pallas_kernels.flash_attention import flash_attention
from pronghorn.pallas_kernels.lora_linear import lora_linear
from pronghorn.pallas_kernels.norm_linears import Dropout, norm_linears
from pronghorn.pallas_kernels.residual_linear import residual_linear
from pronghorn.pallas_kernels.rms_norm import rms_norm
from pronghorn.pallas_kernels.rope import apply_rope
from pronghorn.pallas_kernels.stacked_linears import LinearWeights

INITIALIZER_RANGE = 0.02

# A dropout mask of its own for every linear of a layer: the layer's key is folded with this number.
_DROPOUT_STREAM = {
    "q_proj": 0, "k_proj": 1, "v_proj": 2, "o_proj": 3, "gate_proj": 4, "up_proj": 5, "down_proj": 6
}  # fmt: skip


class LoRAParam(nnx.Param):
    """A trainable low-rank factor, always fp32; the type that tells adapters from base weights."""


def _param(values: Any, axes: tuple[str, ...], leading: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(values, logical_axes=("layers",) * len(leading) + axes)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (INITIALIZER_RANGE * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


class Linear(nnx.Module):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ, through `pallas_kernels.lora_linear`.

    Attributes:
      weight: `[out, in]` in the model's dtype, or a quantised weight (anything with `.shape` and `.dequantize()`).
      bias: `[out]` or None.
      lora_A, lora_B: fp32 `[r, in]` and `[out, r]`, or None.
      lora_scale: s, static.
      lora_dropout: share of x that is dropped in front of A, static; only with a dropout key.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str, str],
        bias: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
        leading: tuple[int, ...] = (),
    ):
        self.weight = _param(_normal(rngs, (*leading, out_features, in_features), dtype), axes, leading)
        self.bias = nnx.data(
            _param(jnp.zeros((*leading, out_features), dtype), axes[:1], leading) if bias else None
        )
        self.lora_A = nnx.data(None)  # nnx.data: a parameter may take the place of None later
        self.lora_B = nnx.data(None)
        self.lora_scale = 1.0
        self.lora_dropout = 0.0

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """`[..., in]` -> `[..., out]`, in the dtype of x."""
        return lora_linear(
            x,
            self.weight.get_value(),
            value_or_none(self.lora_A),
            value_or_none(self.lora_B),
            scale=self.lora_scale,
            bias=value_or_none(self.bias),
            dropout_rate=self.lora_dropout if dropout_key is not None else 0.0,
            dropout_key=dropout_key if self.lora_dropout else None,
        )


class Embedding(nnx.Module):
    """y = W[ids] + s Aᵀ[ids] Bᵀ.

    Attributes:
      weight: `[vocab, d]` in the model's dtype.
      lora_embedding_A, lora_embedding_B: fp32 `[r, vocab]` and `[d, r]` (the names PEFT uses), or None.
      lora_scale: s, static.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: Any, rngs: nnx.Rngs):
        self.weight = _param(_normal(rngs, (vocab_size, hidden_size), dtype), ("vocab", "hidden"), ())
        self.lora_embedding_A = nnx.data(None)
        self.lora_embedding_B = nnx.data(None)
        self.lora_scale = 1.0
        self.lora_dropout = (
            0.0  # PEFT drops nothing in front of an embedding; kept so that every target has it
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int `[batch, seq]` -> `[batch, seq, d]`. An id outside of the vocabulary gives NaN, not its neighbour."""
        weight = self.weight.get_value()
        x = jnp.take(weight, ids, axis=0, mode="fill", fill_value=jnp.nan)
        if self.lora_embedding_A is not None:
            a = jnp.take(self.lora_embedding_A.get_value().astype(x.dtype), ids, axis=1, mode="fill")
            b = self.lora_embedding_B.get_value().astype(x.dtype)
            delta = jnp.einsum("rbs,dr->bsd", a, b, preferred_element_type=jnp.float32)
            x = x + (self.lora_scale * delta).astype(x.dtype)
        return x


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + weight), computed in fp32 (Zhang and Sennrich 2019)."""

    def __init__(
        self, size: int, config: DecoderConfig, *, dtype: Any, axis: str = "hidden", leading: tuple = ()
    ):
        # The scale that is applied starts at one, whatever the offset.
        start = jnp.full((*leading, size), 1.0 - config.norm_weight_offset, dtype)
        self.weight = _param(start, (axis,), leading)
        self.eps = config.rms_norm_eps
        self.weight_offset = config.norm_weight_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight.get_value(), eps=self.eps, weight_offset=self.weight_offset)


class Attention(nnx.Module):
    """Parameters of grouped-query attention: `{q,k,v,o}_proj`, and per head_dim `{q,k}_norm` and `sinks` or None."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()):
        hidden, head_dim = config.hidden_size, config.head_dim
        query, key_value = config.num_heads * head_dim, config.num_kv_heads * head_dim
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "leading": leading}
        bias = config.qkv_bias
        self.q_proj = Linear(hidden, query, axes=("heads", "hidden"), bias=bias, **common)
        self.k_proj = Linear(hidden, key_value, axes=("kv_heads", "hidden"), bias=bias, **common)
        self.v_proj = Linear(hidden, key_value, axes=("kv_heads", "hidden"), bias=bias, **common)
        self.o_proj = Linear(query, hidden, axes=("hidden", "heads"), bias=config.output_bias, **common)
        norm: dict[str, Any] = {"dtype": dtype, "axis": "head_dim", "leading": leading}
        self.q_norm = nnx.data(RMSNorm(head_dim, config, **norm) if config.qk_norm else None)
        self.k_norm = nnx.data(RMSNorm(head_dim, config, **norm) if config.qk_norm else None)
        sinks = jnp.zeros((*leading, config.num_heads), dtype) if config.attention_sinks else None
        self.sinks = nnx.data(None if sinks is None else _param(sinks, ("heads",), leading))


class MLP(nnx.Module):
    """Parameters of the gated feed-forward network: `{gate,up,down}_proj`."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()):
        hidden, ffn = config.hidden_size, config.intermediate_size
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "leading": leading, "bias": config.mlp_bias}
        self.gate_proj = Linear(hidden, ffn, axes=("ffn", "hidden"), **common)
        self.up_proj = Linear(hidden, ffn, axes=("ffn", "hidden"), **common)
        self.down_proj = Linear(ffn, hidden, axes=("hidden", "ffn"), **common)


class DecoderLayer(nnx.Module):
    """Parameters of one layer (or, stacked, of `leading[0]` like layers)."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()):
        self.input_layernorm = RMSNorm(config.hidden_size, config, dtype=dtype, leading=leading)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs, leading=leading)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, dtype=dtype, leading=leading)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs, leading=leading)


def value_or_none(variable: nnx.Variable | None) -> Any:
    """The array (or quantised weight) that a parameter holds."""
    return None if variable is None else variable.get_value()


def _operands(
    holder: nnx.Module, names: tuple[str, ...], dropout_key: jax.Array | None
) -> tuple[tuple[LinearWeights, ...], tuple[float, ...], Dropout | None]:
    """(arrays, scales, dropout) of some linear layers, as the ops take them."""
    linears = [getattr(holder, name) for name in names]
    arrays = tuple(
        LinearWeights(*(value_or_none(v) for v in (linear.weight, linear.lora_A, linear.lora_B, linear.bias)))
        for linear in linears
    )
    dropout = None
    if dropout_key is not None and any(linear.lora_dropout for linear in linears):
        keys = tuple(jax.random.fold_in(dropout_key, _DROPOUT_STREAM[name]) for name in names)
        dropout = Dropout(tuple(linear.lora_dropout for linear in linears), keys)
    return arrays, tuple(linear.lora_scale for linear in linears), dropout


def project_qkv(
    layer: DecoderLayer, x: jax.Array, *, config: DecoderConfig, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The residual stream `[batch, seq, d]` -> itself, queries `[batch, seq, heads, head_dim]`, keys and values
    `[.., kv_heads, head_dim]`.

    The stream has to be read on from the array that is returned, so that its gradient is added where this op's is
    computed. Heads are normalised where the family does so; nothing is rotated yet.
    """
    attention, norm = layer.self_attn, layer.input_layernorm
    linears, scales, dropout = _operands(attention, ("q_proj", "k_proj", "v_proj"), dropout_key)
    x, (q, k, v) = norm_linears(
        x,
        norm.weight.get_value(),
        linears,
        scales=scales,
        eps=norm.eps,
        weight_offset=norm.weight_offset,
        dropout=dropout,
    )
    batch, seq, _ = x.shape
    q = q.reshape(batch, seq, config.num_heads, config.head_dim)
    k = k.reshape(batch, seq, config.num_kv_heads, config.head_dim)
    v = v.reshape(batch, seq, config.num_kv_heads, config.head_dim)
    if attention.q_norm is not None:
        q = attention.q_norm(q)
    if attention.k_norm is not None:
        k = attention.k_norm(k)
    return x, q, k, v


def output_projection(
    attention: Attention, x: jax.Array, heads: jax.Array, dropout_key: jax.Array | None = None
) -> jax.Array:
    """x `[batch, seq, d]` + W_o heads, of heads `[batch, seq, heads, head_dim]`."""
    (linear,), (scale,), dropout = _operands(attention, ("o_proj",), dropout_key)
    return residual_linear(x, heads, linear, scale=scale, dropout=dropout)


def gated_mlp(
    layer: DecoderLayer, x: jax.Array, *, config: DecoderConfig, dropout_key: jax.Array | None = None
) -> jax.Array:
    """x + W_down (f(W_gate n) * W_up n) of n = norm(x) (Shazeer 2020), `[batch, seq, d]` -> the same."""
    norm = layer.post_attention_layernorm
    linears, scales, dropout = _operands(layer.mlp, ("gate_proj", "up_proj", "down_proj"), dropout_key)
    return gated_mlp_op(
        x,
        norm.weight.get_value(),
        *linears,
        scales=scales,
        eps=norm.eps,
        weight_offset=norm.weight_offset,
        activation=config.activation,
        dropout=dropout,
    )


def decoder_layer(
    layer: DecoderLayer,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    segment_ids: jax.Array | None,
    *,
    config: DecoderConfig,
    kind: LayerKind,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """One layer with normalisation in front: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
      layer: parameters of one layer, not stacked.
      x: `[batch, seq, d]`, the residual stream in the model's dtype.
      cos, sin: fp32 `[batch, seq, rotated / 2]`.
      segment_ids: int `[batch, seq]`, or None for one segment a row.
      kind: "full", or "sliding" for a window of config.sliding_window tokens.
      dropout_key: of this layer; None drops nothing.
    """
    attention = layer.self_attn
    with jax.named_scope("attention"):
        x, q, k, v = project_qkv(layer, x, config=config, dropout_key=dropout_key)
        q, k = apply_rope(q, k, cos, sin)
        heads = flash_attention(
            q,
            k,
            v,
            segment_ids=segment_ids,
            sliding_window=config.sliding_window if kind == "sliding" else None,
            softcap=config.attention_softcap,
            sinks=value_or_none(attention.sinks),
            scale=config.attention_scale,
        )
        x = output_projection(attention, x, heads, dropout_key)
    with jax.named_scope("mlp"):
        return gated_mlp(layer, x, config=config, dropout_key=dropout_key)
