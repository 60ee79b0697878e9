"""The modules a decoder is made of, named as in Hugging Face. The forward pass of a layer is in `models/blocks.py`.

Modules declare parameters, as the configuration asks for them. Weights keep the Hugging Face orientation `[out, in]`.
With `leading=(layers,)` every parameter of a module is stacked on a leading axis, to be scanned over.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pronghorn.models.config import ATTENDING_KINDS, STATE_SPACE_KINDS, DecoderConfig, LayerKind
from pronghorn.models.extras_config import ExtrasConfig
from pronghorn.pallas_kernels.dora import dora_linear
from pronghorn.pallas_kernels.layer_norm import layer_norm, layer_norm_reference
from pronghorn.pallas_kernels.lora_linear import lora_linear
from pronghorn.pallas_kernels.rms_norm import rms_norm

INITIALIZER_RANGE = 0.02


class LoRAParam(nnx.Param):
    """A trainable low-rank factor, always fp32; the type that tells adapters from base weights."""


class Constant(nnx.Variable):
    """An array of the checkpoint that is never trained."""


class WideConstant(Constant):
    """One that is fp32 whatever the dtype of the model is: no cast is for it."""


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
      lora_new_rows: of a head: see `Embedding`. `Decoder.head` applies them.
      lora_magnitude_vector: fp32 `[out]`, the lengths of rows that DoRA trains, or None.
      lora_start_A, lora_start_B: frozen factors of a start that is part of the weight already, or None: what is added
        is s (B A - B0 A0).
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
        self.lora_new_rows = nnx.data(None)
        self.lora_magnitude_vector = nnx.data(None)
        self.lora_start_A = nnx.data(None)
        self.lora_start_B = nnx.data(None)
        self.lora_scale = 1.0
        self.lora_dropout = 0.0

    def adapter(self) -> tuple[Any, Any]:
        """A and B as the products take them, with the frozen start's in them; (None, None) without an adapter."""
        a, b = value_or_none(self.lora_A), value_or_none(self.lora_B)
        if self.lora_start_A is not None:
            a = jnp.concatenate([a, self.lora_start_A.get_value()], axis=-2)
            b = jnp.concatenate([b, -self.lora_start_B.get_value()], axis=-1)
        return a, b

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """`[..., in]` -> `[..., out]`, in the dtype of x."""
        a, b = self.adapter()
        options: dict[str, Any] = {
            "scale": self.lora_scale,
            "bias": value_or_none(self.bias),
            "dropout_rate": self.lora_dropout if dropout_key is not None else 0.0,
            "dropout_key": dropout_key if self.lora_dropout else None,
        }
        magnitude = value_or_none(self.lora_magnitude_vector)
        if magnitude is not None:
            return dora_linear(x, self.weight.get_value(), a, b, magnitude, **options)
        return lora_linear(x, self.weight.get_value(), a, b, **options)


class Embedding(nnx.Module):
    """y = W[ids] + s Aᵀ[ids] Bᵀ.

    Attributes:
      weight: `[vocab, d]` in the model's dtype.
      lora_embedding_A, lora_embedding_B: fp32 `[r, vocab]` and `[d, r]` (the names PEFT uses), or None.
      lora_scale: s, static.
      lora_new_rows: fp32 `[n, d]`, trained rows that stand in the place of rows `first_new` and following, or None.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: Any, rngs: nnx.Rngs):
        self.weight = _param(_normal(rngs, (vocab_size, hidden_size), dtype), ("vocab", "hidden"), ())
        self.lora_embedding_A = nnx.data(None)
        self.lora_embedding_B = nnx.data(None)
        self.lora_new_rows = nnx.data(None)
        self.first_new = 0
        self.lora_scale = 1.0
        self.lora_dropout = (
            0.0  # PEFT drops nothing in front of an embedding; kept so that every target has it
        )

    def adapter(self) -> tuple[Any, Any]:
        """A and B, or (None, None)."""
        return value_or_none(self.lora_embedding_A), value_or_none(self.lora_embedding_B)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int `[batch, seq]` -> `[batch, seq, d]`. An id outside of the vocabulary gives NaN, not its neighbour."""
        weight = self.weight.get_value()
        x = jnp.take(weight, ids, axis=0, mode="fill", fill_value=jnp.nan)
        if self.lora_new_rows is not None:
            rows = self.lora_new_rows.get_value().astype(x.dtype)
            place = ids - self.first_new
            is_new = (place >= 0) & (place < rows.shape[0])
            x = jnp.where(is_new[..., None], jnp.take(rows, place, axis=0, mode="clip"), x)
        if self.lora_embedding_A is not None:
            a = jnp.take(self.lora_embedding_A.get_value().astype(x.dtype), ids, axis=1, mode="fill")
            b = self.lora_embedding_B.get_value().astype(x.dtype)
            delta = jnp.einsum("rbs,dr->bsd", a, b, preferred_element_type=jnp.float32)
            x = x + (self.lora_scale * delta).astype(x.dtype)
        return x


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + weight), computed in fp32 (Zhang and Sennrich 2019)."""

    def __init__(
        self,
        size: int,
        config: DecoderConfig,
        *,
        dtype: Any,
        axis: str = "hidden",
        leading: tuple = (),
        weight_offset: float | None = None,
        eps: float | None = None,
    ):
        self.eps = config.rms_norm_eps if eps is None else eps
        self.weight_offset = config.norm_weight_offset if weight_offset is None else weight_offset
        # The scale that is applied starts at one, whatever the offset.
        self.weight = _param(jnp.full((*leading, size), 1.0 - self.weight_offset, dtype), (axis,), leading)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight.get_value(), eps=self.eps, weight_offset=self.weight_offset)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * (offset + weight) + bias, in fp32 (Ba et al. 2016).

    The weight may have more axes than the last, which is the one that is normalised: `[heads, head_dim]`. It is None
    where the configuration has no norm_weight.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        config: DecoderConfig,
        *,
        bias: bool,
        dtype: Any,
        axes: tuple[str, ...],
        leading: tuple = (),
    ):
        start = jnp.full((*leading, *shape), 1.0 - config.norm_weight_offset, dtype)
        self.weight = nnx.data(_param(start, axes, leading) if config.norm_weight else None)
        self.bias = nnx.data(_param(jnp.zeros((*leading, *shape), dtype), axes, leading) if bias else None)
        self.eps = config.rms_norm_eps
        self.weight_offset = config.norm_weight_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        weight, bias = value_or_none(self.weight), value_or_none(self.bias)
        if weight is None:
            weight = jnp.full(x.shape[-1:], 1.0 - self.weight_offset, x.dtype)
        if weight.ndim == 1:
            return layer_norm(x, weight, bias, eps=self.eps, weight_offset=self.weight_offset)
        reference = functools.partial(layer_norm_reference, eps=self.eps, weight_offset=self.weight_offset)
        return jax.checkpoint(reference)(x, weight, bias)  # of small heads: nothing but x is saved


def hidden_norm(config: DecoderConfig, *, dtype: Any, leading: tuple = ()) -> RMSNorm | LayerNorm:
    """The norm of the residual stream that the configuration asks for."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config, dtype=dtype, leading=leading)
    size = (config.hidden_size,)
    return LayerNorm(size, config, bias=config.norm_bias, dtype=dtype, axes=("hidden",), leading=leading)


def _heads_norm(
    config: DecoderConfig, heads: int, axis: str, *, dtype: Any, leading: tuple
) -> RMSNorm | LayerNorm | None:
    if not config.qk_norm:
        return None
    over, size = config.qk_norm_over, config.head_dim
    if config.norm == "layer":
        shape, axes = ((heads, size), (axis, "head_dim")) if over == "heads" else ((size,), ("head_dim",))
        return LayerNorm(shape, config, bias=False, dtype=dtype, axes=axes, leading=leading)
    if over == "width":
        return RMSNorm(heads * size, config, dtype=dtype, axis=axis, leading=leading)
    return RMSNorm(size, config, dtype=dtype, axis="head_dim", leading=leading)


class Attention(nnx.Module):
    """Parameters of grouped-query attention: `{q,k,v,o}_proj`, and `{q,k}_norm` and `sinks` or None. With
    `attention_gate` q_proj is twice as wide: of every head the query, then the gate. A layer that reads another's keys
    and values has no `k_proj`, `v_proj` and `k_norm`, one whose keys are its values no `v_proj`."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()):
        hidden, head_dim = config.hidden_size, config.head_dim
        query, key_value = config.num_heads * head_dim, config.num_kv_heads * head_dim
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "leading": leading}
        bias = config.qkv_bias
        wide = 2 * query if config.attention_gate else query
        self.q_proj = Linear(hidden, wide, axes=("heads", "hidden"), bias=bias, **common)
        extras = config.extras or ExtrasConfig()
        if extras.key_values == "read":
            self.k_proj = self.v_proj = nnx.data(None)
        else:
            self.k_proj = Linear(hidden, key_value, axes=("kv_heads", "hidden"), bias=bias, **common)
            self.v_proj = nnx.data(None)
            if not extras.keys_as_values:
                self.v_proj = Linear(hidden, key_value, axes=("kv_heads", "hidden"), bias=bias, **common)
        self.o_proj = Linear(query, hidden, axes=("hidden", "heads"), bias=config.output_bias, **common)
        norm: dict[str, Any] = {"dtype": dtype, "leading": leading}
        self.q_norm = nnx.data(_heads_norm(config, config.num_heads, "heads", **norm))
        reads = extras.key_values == "read"
        self.k_norm = nnx.data(
            None if reads else _heads_norm(config, config.num_kv_heads, "kv_heads", **norm)
        )
        sinks = jnp.zeros((*leading, config.num_heads), dtype) if config.attention_sinks else None
        self.sinks = nnx.data(None if sinks is None else _param(sinks, ("heads",), leading))


class LatentAttention(nnx.Module):
    """Parameters of multi-head latent attention (`LatentConfig`): `q_a_proj`, `q_a_layernorm` and `q_b_proj`, or else
    `q_proj`; `kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj`, whose rows are of every head those of keys, then
    those of values; and `o_proj`."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()):
        latent = config.latent
        assert latent is not None
        hidden, heads = config.hidden_size, config.num_heads
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "leading": leading}
        norm: dict[str, Any] = {"dtype": dtype, "axis": "latent", "leading": leading, "eps": latent.norm_eps}
        first: dict[str, Any] = {"axes": ("latent", "hidden"), "bias": config.qkv_bias, **common}
        queries, expanded = heads * config.head_dim, heads * (latent.content_dim + latent.value_dim)
        if latent.query_rank:
            self.q_a_proj = Linear(hidden, latent.query_rank, **first)
            self.q_a_layernorm = RMSNorm(latent.query_rank, config, **norm)
            self.q_b_proj = Linear(latent.query_rank, queries, axes=("heads", "latent"), **common)
        else:
            self.q_proj = Linear(hidden, queries, axes=("heads", "hidden"), **common)
        self.kv_a_proj_with_mqa = Linear(hidden, latent.rank + latent.position_dim, **first)
        self.kv_a_layernorm = RMSNorm(latent.rank, config, **norm)
        self.kv_b_proj = Linear(latent.rank, expanded, axes=("heads", "latent"), **common)
        values, bias = heads * latent.value_dim, config.output_bias
        self.o_proj = Linear(values, hidden, axes=("hidden", "heads"), bias=bias, **common)


class Taps(nnx.Module):
    """Weights of a convolution along the tokens, each feature by itself: `[d, 1, width]`, and a bias `[d]` or None."""

    def __init__(
        self, size: int, width: int, *, bias: bool, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()
    ):
        shape = (*leading, size, 1, width)
        self.weight = _param(_normal(rngs, shape, dtype), ("hidden", "one", "taps"), leading)
        zeros = jnp.zeros((*leading, size), dtype) if bias else None
        self.bias = nnx.data(None if zeros is None else _param(zeros, ("hidden",), leading))


class ShortConv(nnx.Module):
    """Parameters of LFM 2's gated convolution: `{in,out}_proj`, and `conv` between them."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()):
        hidden = config.hidden_size
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "leading": leading}
        self.in_proj = Linear(hidden, 3 * hidden, axes=("ffn", "hidden"), bias=config.conv_bias, **common)
        self.conv = Taps(hidden, config.conv_width, bias=config.conv_bias, **common)
        self.out_proj = Linear(hidden, hidden, axes=("hidden", "ffn"), bias=config.conv_bias, **common)


class DeltaNet(nnx.Module):
    """Parameters of a gated delta net (`models/delta_net.py`): `in_proj_{qkv,z,b,a}` (or, with `linear_by_key_head`,
    `in_proj_{qkvz,ba}`), the convolution `conv1d`, of every value head `A_log` and `dt_bias`, the `norm` of a head, and
    `out_proj`."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()):
        hidden, heads = config.hidden_size, config.linear_value_heads
        keys, values = config.linear_key_heads * config.linear_key_dim, heads * config.linear_value_dim
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "leading": leading}
        self.conv1d = Taps(2 * keys + values, config.conv_width, bias=False, **common)
        rows = {"qkv": 2 * keys + values, "z": values, "b": heads, "a": heads}
        if config.linear_by_key_head:
            rows = {"qkvz": 2 * keys + 2 * values, "ba": 2 * heads}
        for name, count in rows.items():
            setattr(self, f"in_proj_{name}", Linear(hidden, count, axes=("heads", "hidden"), **common))
        self.A_log = _param(_log_rates(heads, dtype, leading), ("heads",), leading)
        self.dt_bias = _param(jnp.ones((*leading, heads), dtype), ("heads",), leading)
        # Its weight is the scale itself, whatever the other norms of the model store.
        norm: dict[str, Any] = {"axis": "head_dim", "leading": leading, "weight_offset": 0.0}
        self.norm = RMSNorm(config.linear_value_dim, config, dtype=dtype, **norm)
        self.out_proj = Linear(values, hidden, axes=("hidden", "heads"), **common)


class Mamba(nnx.Module):
    """Parameters of a state-space mixer (`models/mamba.py`): `in_proj`, the convolution `conv1d`, of every head
    `A_log`, `D` and `dt_bias`, the `norm` of the width or None, and `out_proj`."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()):
        sizes, hidden = config.state_space, config.hidden_size
        assert sizes is not None
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "leading": leading}
        rows, bias = sizes.projected, sizes.input_bias
        self.in_proj = Linear(hidden, rows, axes=("heads", "hidden"), bias=bias, **common)
        self.conv1d = Taps(sizes.conv_features, sizes.conv_width, bias=sizes.conv_bias, **common)
        self.A_log = _param(_log_rates(sizes.heads, dtype, leading), ("heads",), leading)
        self.D = _param(jnp.ones((*leading, sizes.heads), dtype), ("heads",), leading)
        self.dt_bias = _param(jnp.ones((*leading, sizes.heads), dtype), ("heads",), leading)
        # Its weight is the scale itself, whatever the other norms of the model store.
        norm: dict[str, Any] = {"dtype": dtype, "axis": "heads", "leading": leading, "weight_offset": 0.0}
        plain = sizes.gated_norm == "none"
        self.norm = nnx.data(None if plain else RMSNorm(sizes.width, config, **norm))
        self.out_proj = Linear(
            sizes.width, hidden, axes=("hidden", "heads"), bias=sizes.output_bias, **common
        )


def _log_rates(heads: int, dtype: Any, leading: tuple[int, ...]) -> jax.Array:
    """As Mamba 2 starts: a head forgets at a rate of its own, from 1 to 16 times its step."""
    rates = jnp.broadcast_to(jnp.linspace(1.0, 16.0, heads, dtype=jnp.float32), (*leading, heads))
    return jnp.log(rates).astype(dtype)


class XIELU(nnx.Module):
    """Parameters of xIELU (Huang and Schlag 2024, arXiv:2411.13010): two trained numbers, and two that are not."""

    def __init__(self, *, dtype: Any, leading: tuple[int, ...] = ()):
        start = jnp.log(jnp.expm1(jnp.asarray([0.8, 0.8 - 0.5], jnp.float32))).astype(dtype)
        self.alpha_p = _param(jnp.full((*leading, 1), start[0]), ("one",), leading)
        self.alpha_n = _param(jnp.full((*leading, 1), start[1]), ("one",), leading)
        axes = ("layers",) * len(leading)
        self.beta = Constant(jnp.full(leading, 0.5, dtype), logical_axes=axes)
        self.eps = Constant(jnp.full(leading, -1e-6, dtype), logical_axes=axes)


class MLP(nnx.Module):
    """Parameters of the feed-forward network: `{gate,up,down}_proj`; gate_proj is None where nothing is gated, and
    act_fn where the activation has no parameters."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: Any,
        rngs: nnx.Rngs,
        leading: tuple[int, ...] = (),
        width: int | None = None,
    ):
        hidden, ffn = config.hidden_size, width or config.intermediate_size
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "leading": leading, "bias": config.mlp_bias}
        gate = Linear(hidden, ffn, axes=("ffn", "hidden"), **common) if config.gated_mlp else None
        self.gate_proj = nnx.data(gate)
        self.up_proj = Linear(hidden, ffn, axes=("ffn", "hidden"), **common)
        self.down_proj = Linear(ffn, hidden, axes=("hidden", "ffn"), **common)
        xielu = config.activation == "xielu"
        self.act_fn = nnx.data(XIELU(dtype=dtype, leading=leading) if xielu else None)


# The norms of a layer by where they stand (`DecoderConfig.block`), in the order they are applied.
LAYER_NORMS = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "parallel": ("input_layernorm",),
    "single": ("input_layernorm",),
}


class DecoderLayer(nnx.Module):
    """Parameters of one layer (or, stacked, of `leading[0]` like layers): `self_attn` (or `conv`, `linear_attn` or
    `mamba`, or `self_attn` and `mamba`), `mlp` (an `MLP` or a `SparseMLP`), and its LAYER_NORMS. A block of one part
    has one of these alone."""

    self_attn: Any  # Attention or LatentAttention
    conv: ShortConv
    linear_attn: DeltaNet
    mamba: Mamba
    mlp: Any  # MLP or SparseMLP

    input_layernorm: RMSNorm | LayerNorm
    post_attention_layernorm: RMSNorm | LayerNorm
    pre_feedforward_layernorm: RMSNorm | LayerNorm
    post_feedforward_layernorm: RMSNorm | LayerNorm

    # Of layers with extras (`models/extras.py`).
    per_layer_input_gate: Linear
    per_layer_projection: Linear
    post_per_layer_input_norm: RMSNorm | LayerNorm
    layer_scalar: Constant
    altup: Any
    laurel: Any

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: Any,
        rngs: nnx.Rngs,
        leading: tuple[int, ...] = (),
        kind: LayerKind = "full",
        mlp: Callable[..., Any] = MLP,
    ):
        for name in LAYER_NORMS[config.block]:
            setattr(self, name, hidden_norm(config, dtype=dtype, leading=leading))
        if kind == "conv":
            self.conv = ShortConv(config, dtype=dtype, rngs=rngs, leading=leading)
        elif kind == "linear":
            self.linear_attn = DeltaNet(config, dtype=dtype, rngs=rngs, leading=leading)
        if kind in STATE_SPACE_KINDS:
            self.mamba = Mamba(config, dtype=dtype, rngs=rngs, leading=leading)
        if kind in ATTENDING_KINDS:
            attention = Attention if config.latent is None else LatentAttention
            self.self_attn = attention(config, dtype=dtype, rngs=rngs, leading=leading)
        if config.block != "single" or kind == "mlp":
            self.mlp = mlp(config, dtype=dtype, rngs=rngs, leading=leading)


def value_or_none(variable: nnx.Variable | None) -> Any:
    """The array (or quantised weight) that a parameter holds."""
    return None if variable is None else variable.get_value()
