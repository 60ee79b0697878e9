"""The forward pass of one layer: free functions over the modules of `models/layers.py`, switched by the configuration.

Where a family is plain these are a few ops whose hand-derived gradients choose what a layer saves: its input, q, k and
v, attention's output and logsumexp, the residual stream after attention, gate and up, and a few numbers a token. What
has no such op (layer norm, MLPs that are not gated, norms on outputs) is put together from smaller ones under
`jax.checkpoint`, so that it saves no more: the elementwise parts run again in the backward pass, the products do not.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from pronghorn.models.altup import cut_off
from pronghorn.models.config import STATE_SPACE_KINDS, DecoderConfig, LayerKind
from pronghorn.models.delta_net import add_delta_net
from pronghorn.models.expert_layers import SparseMLP
from pronghorn.models.experts import sparse_mlp
from pronghorn.models.latent_attention import halves, latent_heads
from pronghorn.models.layers import MLP, XIELU, Attention, DecoderLayer, RMSNorm, value_or_none
from pronghorn.models.mamba import mamba
from pronghorn.models.projections import (
    added_linear,
    normalized_linears,
    one_linear,
    operands,
    row_lengths_trained,
)
from pronghorn.models.short_convolution import add_convolution
from pronghorn.models.token_tiles import in_token_tiles
from pronghorn.pallas_kernels import gated_mlp as gated_mlp_op
from pronghorn.pallas_kernels.flash_attention import flash_attention
from pronghorn.pallas_kernels.gated_activation import gated_activation
from pronghorn.pallas_kernels.rms_norm import rms_norm
from pronghorn.pallas_kernels.rope import apply_rope


def _scaled_sum(x: jax.Array, out: jax.Array, scale: float) -> jax.Array:
    """x + scale out."""
    return x + (out if scale == 1.0 else out * jnp.asarray(scale, out.dtype))


def add_mixed(x: jax.Array, mixed: jax.Array, config: DecoderConfig) -> jax.Array:
    """The stream and what a state-space mixer makes of it."""
    return _scaled_sum(x, mixed, config.residual_scale)


def project_qkv(
    layer: DecoderLayer, x: jax.Array, *, config: DecoderConfig, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Any, Any, jax.Array | None]:
    """The residual stream `[batch, seq, d]` -> itself, queries `[batch, seq, heads, head_dim]`, keys and values
    `[.., kv_heads, head_dim]` (None where the layer has none of its own), and what gates attention's output, like the
    queries, or None.

    The stream has to be read on from the array that is returned, so that its gradient is added where this op's is
    computed. Heads are normalised where the family does so in front of rope; nothing is rotated yet.
    """
    attention = layer.self_attn
    norm = None if config.block == "post" else layer.input_layernorm
    names = tuple(name for name in ("q_proj", "k_proj", "v_proj") if getattr(attention, name) is not None)
    x, projected = normalized_linears(
        norm,
        attention,
        names,
        x,
        dropout_key,
        joined=config.block != "parallel",
        input_scale=config.attention_input_scale,
    )
    if config.qkv_clip is not None:
        projected = [jnp.clip(y, -config.qkv_clip, config.qkv_clip) for y in projected]
    found: dict[str, Any] = dict(zip(names, projected, strict=True))
    q, k, v = found["q_proj"], found.get("k_proj"), found.get("v_proj")
    if config.qk_norm_over == "width":
        q, k = normalize_heads(attention, q, k)
    batch, seq, _ = x.shape
    gate = None
    q = q.reshape(batch, seq, config.num_heads, -1)
    if config.attention_gate:
        q, gate = jnp.split(q, 2, axis=-1)
    if k is not None:
        k = k.reshape(batch, seq, config.num_kv_heads, config.head_dim)
        v = k if v is None else v.reshape(batch, seq, config.num_kv_heads, config.head_dim)
        if config.extras is not None and config.extras.value_norm:
            v = _unit(v, config.rms_norm_eps)
    if config.qk_norm_over != "width" and not config.qk_norm_after_rope:
        q, k = normalize_heads(attention, q, k)
    if config.rope_interleaved:
        q, k = _halves(q, config), None if k is None else _halves(k, config)
    return x, q, k, v, gate


def normalize_heads(attention: Attention, q: Any, k: Any) -> tuple[Any, Any]:
    """q and k after their norms, as they are where there is none; None stays None."""
    if attention.q_norm is not None and q is not None:
        q = attention.q_norm(q)
    if attention.k_norm is not None and k is not None:
        k = attention.k_norm(k)
    return q, k


def behind_rope(
    attention: Attention, q: Any, k: Any, config: DecoderConfig, *, rotated: bool
) -> tuple[Any, Any]:
    """q and k as they meet: normalised where the family does so behind rope; None stays None."""
    if config.qk_norm_after_rope:
        q, k = normalize_heads(attention, q, k)
    if config.unit_heads and rotated:
        q, k = (None if x is None else _unit(x, config.rms_norm_eps) for x in (q, k))
    return q, k


def _unit(x: jax.Array, eps: float) -> jax.Array:
    return rms_norm(x, jnp.ones(x.shape[-1], x.dtype), eps=eps)


def scaled_queries(q: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Queries `[batch, seq, heads, head_dim]` times their factor, rounded to their dtype as in transformers."""
    return q if scale is None else q * scale.astype(q.dtype)[..., None, None]


def _halves(x: jax.Array, config: DecoderConfig) -> jax.Array:
    """`halves` of the dims of a head that are rotated."""
    rotated = int(config.head_dim * config.rope.partial_rotary_factor)
    if rotated == x.shape[-1]:
        return halves(x)
    return jnp.concatenate([halves(x[..., :rotated]), x[..., rotated:]], axis=-1)


def add_attention(
    layer: DecoderLayer,
    x: jax.Array,
    heads: jax.Array,
    gate: jax.Array | None = None,
    *,
    config: DecoderConfig,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """x `[batch, seq, d]` + W_o heads, of heads `[batch, seq, heads, head_dim]`, times the sigmoid of the gate where
    there is one; normalised and scaled where the family does so. Named for memory policies."""
    if gate is not None:
        heads = jax.checkpoint(_gated)(heads, gate)
    return checkpoint_name(
        _add_attention(layer, x, heads, config=config, dropout_key=dropout_key), "stream_after_attention"
    )


def _gated(heads: jax.Array, gate: jax.Array) -> jax.Array:
    """heads * sigmoid(gate), in fp32, rounded once."""
    return (heads.astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(heads.dtype)


def _add_attention(layer, x, heads, *, config, dropout_key):
    attention = layer.self_attn
    normalized = config.block in ("post", "sandwich")
    scale = config.residual_scale * config.attention_output_scale
    if not normalized and scale == 1.0:
        return added_linear(attention, "o_proj", heads, x, dropout_key)
    out = one_linear(attention, "o_proj", heads.reshape(*x.shape[:2], -1), dropout_key)
    if normalized:
        out = layer.post_attention_layernorm(out)
    return _scaled_sum(x, out, scale)


def feed_forward(
    layer: DecoderLayer,
    x: jax.Array,
    residual: jax.Array,
    *,
    config: DecoderConfig,
    dropout_key: jax.Array | None = None,
    tile_tokens: int | None = None,
) -> jax.Array:
    """residual + mlp(norm(x)), `[batch, seq, d]`; the MLP's output normalised and scaled where the family does so.

    `residual` is x, but for parallel blocks, where x is what attention read. With `tile_tokens` no more tokens than
    that are computed at once; a dropout mask is then drawn for each tile.
    """
    if tile_tokens is None:
        return _feed_forward(layer, x, residual, config=config, dropout_key=dropout_key)
    split: Any = nnx.split(layer, lambda path, _: path[0] == "mlp" or path[0].endswith("layernorm"), ...)
    graph, operands, others = split
    unread = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), others)

    def one_tile(operands, rows, tile):
        state, key = operands
        x, residual = rows[0][None], rows[-1][None]
        if key is not None:
            key = jax.random.fold_in(key, tile)
        return _feed_forward(nnx.merge(graph, state, unread), x, residual, config=config, dropout_key=key)[0]

    return in_token_tiles(
        one_tile,
        (operands, dropout_key),
        (x,) if residual is x else (x, residual),
        tile_tokens=tile_tokens,
        prepare=_dense_weights,
    )


def _dense_weights(tree: Any) -> Any:
    """The same with every quantised weight as an array, but for those that products can take as they are."""

    def dense(variable):
        value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        if not hasattr(value, "dequantize") or hasattr(value, "times_transposed"):
            return variable
        return variable.replace(value.dequantize())

    return jax.tree.map(dense, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def feed_forward_norm(layer: DecoderLayer, config: DecoderConfig) -> Any:
    """The norm in front of a layer's feed-forward network, or None."""
    norms: dict[str, Any] = {
        "pre": "post_attention_layernorm",
        "sandwich": "pre_feedforward_layernorm",
        "parallel": "input_layernorm",
        "single": "input_layernorm",
    }
    return getattr(layer, norms[config.block]) if config.block in norms else None


@jax.named_scope("mlp")
def _feed_forward(layer, x, residual, *, config, dropout_key):
    norm, scale = feed_forward_norm(layer, config), config.residual_scale * config.mlp_output_scale
    if isinstance(layer.mlp, SparseMLP):
        linear = functools.partial(one_linear, dropout_key=dropout_key)
        out = sparse_mlp(layer.mlp, x, norm, config=config, linear=linear)
        if config.block in ("post", "sandwich"):
            out = layer.post_feedforward_layernorm(out)
        return _scaled_sum(residual, out, scale)
    names = ("gate_proj", "up_proj", "down_proj")
    joined = config.gated_mlp and not row_lengths_trained(layer.mlp, names)
    joined = joined and not _gate_sparsity(config) and config.gate_scale == 1.0
    if isinstance(norm, RMSNorm) and joined:
        plain = config.block == "pre" and scale == 1.0
        linears, scales, dropout = operands(layer.mlp, names, dropout_key)
        out = gated_mlp_op(
            x,
            norm.weight.get_value(),
            *linears,
            scales=scales,
            eps=norm.eps,
            weight_offset=norm.weight_offset,
            activation=config.activation,
            residual=plain,
            dropout=dropout,
        )
        if plain:
            return out
    else:
        out = mlp(layer.mlp, x, norm, config=config, dropout_key=dropout_key)
    if config.block in ("post", "sandwich"):
        out = layer.post_feedforward_layernorm(out)
    return _scaled_sum(residual, out, scale)


def mlp(
    module: MLP, x: jax.Array, norm: Any, *, config: DecoderConfig, dropout_key: jax.Array | None = None
) -> jax.Array:
    """W_down (f(W_gate n) * W_up n) (Shazeer 2020), or W_down f(W_up n), `[batch, seq, d]` -> the same; n is x after
    the norm, or x where there is none.

    Saved: x, and W_up n (and W_gate n). What is elementwise is computed again, the products never are.
    """
    names = ("gate_proj", "up_proj") if config.gated_mlp else ("up_proj",)

    @jax.checkpoint
    def widen(x):
        n = x if norm is None else norm(x)
        return [one_linear(module, name, n, dropout_key) for name in names]

    @jax.checkpoint
    def narrow(wide):
        if config.gated_mlp:
            activation: Any = config.activation
            gate, up = wide
            if config.gate_scale != 1.0:
                gate = gate * jnp.asarray(config.gate_scale, gate.dtype)
            if sparsity := _gate_sparsity(config):
                gate = cut_off(gate, sparsity)
            hidden = gated_activation(gate, up, activation=activation)
        else:
            (up,) = wide
            hidden = _activation(up, config.activation, _xielu(module.act_fn))
        return one_linear(module, "down_proj", hidden, dropout_key)

    return narrow(widen(x))


def _gate_sparsity(config: DecoderConfig) -> float:
    """The share of the gate that a layer cuts off."""
    return (
        config.extras.gate_sparsity[0] if config.extras is not None and config.extras.gate_sparsity else 0.0
    )


def _xielu(module: XIELU | None) -> tuple[jax.Array, ...] | None:
    if module is None:
        return None
    return tuple(v.get_value() for v in (module.alpha_p, module.alpha_n, module.beta, module.eps))


def _activation(x: jax.Array, name: str, parameters: tuple[jax.Array, ...] | None) -> jax.Array:
    """An activation that stands alone, in fp32, back in the dtype of x.

    relu2 is relu(x)²; xIELU, with p = softplus(alpha_p) and n = beta + softplus(alpha_n), is p x² + beta x over zero
    and n (expm1(min(x, eps)) - x) + beta x below.
    """
    x32 = x.astype(jnp.float32)
    if name == "relu2":
        y = jnp.square(jax.nn.relu(x32))
    elif name == "xielu":
        assert parameters is not None
        alpha_p, alpha_n, beta, eps = (p.astype(jnp.float32) for p in parameters)
        positive = jax.nn.softplus(alpha_p) * x32 * x32 + beta * x32
        below = (jnp.expm1(jnp.minimum(x32, eps)) - x32) * (beta + jax.nn.softplus(alpha_n)) + beta * x32
        y = jnp.where(x32 > 0, positive, below)
    elif name == "silu":
        y = jax.nn.silu(x32)
    else:
        y = jax.nn.gelu(x32, approximate=name == "gelu_tanh")
    return y.astype(x.dtype)


def decoder_layer(
    layer: DecoderLayer,
    x: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    config: DecoderConfig,
    kind: LayerKind,
    query_scale: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    tile_tokens: int | None = None,
) -> jax.Array:
    """One layer: `DecoderConfig.block` has its formula.

    Args:
      layer: parameters of one layer, not stacked.
      x: `[batch, seq, d]`, the residual stream in the model's dtype.
      cos, sin: fp32 `[batch, seq, rotated / 2]`; None where the layer is told no positions.
      segment_ids: int `[batch, seq]`, or None for one segment a row.
      query_scale: fp32 `[batch, seq]`, a factor of every query; None for none.
      kind: "full", "sliding" for a window of config.sliding_window tokens, "chunked", whose chunks are `segment_ids`,
        "conv", "linear", "mamba", "hybrid" or "mlp".
      dropout_key: of this layer; None drops nothing.
      tile_tokens: as in `feed_forward`.
    """
    tiled: dict[str, Any] = {"config": config, "dropout_key": dropout_key, "tile_tokens": tile_tokens}
    if kind == "mlp":
        return feed_forward(layer, x, x, **tiled)
    attended, x = attention_part(
        layer,
        x,
        cos,
        sin,
        segment_ids,
        config=config,
        kind=kind,
        query_scale=query_scale,
        dropout_key=dropout_key,
    )
    if config.block == "single":
        return attended
    return feed_forward(layer, x if config.block == "parallel" else attended, attended, **tiled)


def attention_part(
    layer: DecoderLayer,
    x: jax.Array,
    cos: jax.Array | None,
    sin: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    config: DecoderConfig,
    kind: LayerKind,
    query_scale: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(the stream after attention, or what stands in its place, the stream in front of it), of `decoder_layer`'s
    arguments."""
    if kind == "conv":
        with jax.named_scope("conv"):
            return add_convolution(layer, x, segment_ids, config=config, dropout_key=dropout_key), x
    if kind == "linear":
        with jax.named_scope("linear_attention"):
            return add_delta_net(layer, x, segment_ids, config=config, dropout_key=dropout_key)
    mixed = None
    if kind in STATE_SPACE_KINDS:
        with jax.named_scope("state_space"):
            mixed, x = mamba(layer, x, segment_ids, config=config, dropout_key=dropout_key)
        if kind == "mamba":
            return checkpoint_name(add_mixed(x, mixed, config), "stream_after_attention"), x
    options: dict[str, Any] = {"config": config, "dropout_key": dropout_key}
    if config.latent is not None:
        with jax.named_scope("attention"):
            x, heads = latent_heads(layer, x, (cos, sin), segment_ids, **options)
            return add_attention(layer, x, heads, **options), x
    attention = layer.self_attn
    with jax.named_scope("attention"):
        x, q, k, v, gate = project_qkv(layer, x, config=config, dropout_key=dropout_key)
        if cos is not None and sin is not None:
            q, k = apply_rope(q, k, cos, sin)
        q, k = behind_rope(attention, q, k, config, rotated=cos is not None)
        q = scaled_queries(q, query_scale)
        heads = flash_attention(
            q,
            k,
            v,
            segment_ids=segment_ids,
            sliding_window=config.sliding_window if kind == "sliding" else None,
            softcap=config.attention_softcap,
            sinks=value_or_none(attention.sinks),
            scale=config.attention_multiplier,
        )
        stream = x if mixed is None else add_mixed(x, mixed, config)
        return add_attention(layer, stream, heads, gate, config=config, dropout_key=dropout_key), x
