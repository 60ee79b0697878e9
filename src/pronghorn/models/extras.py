"""Layers that read more than one residual stream, of Gemma 3n and 4 (`models/extras_config.py` has the switches).

  keys and values   the last layers have none of their own and read another's (Brandon et al. 2024, arXiv:2405.12981)
  inputs            every layer has an input `[batch, seq, p]` of its own for the tokens, a table's row beside a product
                    of the embedding:

                        i_l  = (norm(W x / sqrt(d))_l + sqrt(p) E[token]_l) / sqrt(2)
                        x   += norm(W_project (act(W_gate x) * i_l))

  streams           `models/altup.py`

What goes from layer to layer is `Carried`; a layer's own input is handed to it beside its weights, since it is one
array a layer just as these are.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pronghorn.models import altup, rope
from pronghorn.models.blocks import add_attention, feed_forward, project_qkv
from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.layers import (
    Constant,
    DecoderLayer,
    Embedding,
    Linear,
    RMSNorm,
    hidden_norm,
)
from pronghorn.models.projections import one_linear
from pronghorn.pallas_kernels.flash_attention import flash_attention
from pronghorn.pallas_kernels.gated_activation import gated_activation
from pronghorn.pallas_kernels.rope import apply_rope


class Carried(NamedTuple):
    """What goes from layer to layer.

    Attributes:
      stream: `[batch, seq, d]`, or `[streams, batch, seq, d]`.
      keys_values: of each kind of layer that others read, the keys and values of the last layer that had them, zeros
        before it: (keys, values), rotated and normalised, or a `LayerCache`.
    """

    stream: jax.Array
    keys_values: dict[LayerKind, Any]


class ModelExtras(nnx.Module):
    """Parameters outside of the layers, each under its name in transformers: the table, projection and norm of the
    layers' inputs, and the projections that make streams and join them."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        extras = config.extras
        assert extras is not None
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        hidden, width = config.hidden_size, config.num_layers * extras.input_width
        if width:
            self.embed_tokens_per_layer = Embedding(extras.input_vocab, width, **common)
            self.per_layer_model_projection = Linear(hidden, width, axes=("ffn", "hidden"), **common)
            self.per_layer_projection_norm = RMSNorm(extras.input_width, config, dtype=dtype, axis="one")
        if extras.altup is not None:
            others = range(extras.altup.streams - 1)
            square: dict[str, Any] = {"axes": ("hidden", "hidden"), **common}
            self.altup_projections = nnx.List([Linear(hidden, hidden, **square) for _ in others])
            self.altup_unembed_projections = nnx.List([Linear(hidden, hidden, **square) for _ in others])

    def layer_inputs(
        self,
        input_ids: jax.Array,
        x: jax.Array,
        *,
        config: DecoderConfig,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array | None:
        """The inputs of all layers, `[layers, batch, seq, p]`, or None where there are none.

        Args:
          input_ids: int `[batch, seq]`; one past the end of the table takes its first row.
          x: what the first layer reads, `[batch, seq, d]`.
        """
        extras = config.extras
        assert extras is not None
        if not extras.input_width:
            return None
        shape = (*input_ids.shape, config.num_layers, extras.input_width)
        found = self.embed_tokens_per_layer(jnp.where(input_ids < extras.input_vocab, input_ids, 0))
        found = (found * jnp.asarray(math.sqrt(extras.input_width), found.dtype)).reshape(shape)
        made = one_linear(self, "per_layer_model_projection", x, dropout_key)
        made = (made * jnp.asarray(config.hidden_size**-0.5, made.dtype)).reshape(shape)
        both = self.per_layer_projection_norm(made) + found
        return jnp.moveaxis(both * jnp.asarray(2.0**-0.5, both.dtype), -2, 0)


def add_modules(
    layer: DecoderLayer, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()
) -> None:
    """Give a layer the parameters that its extras need, in place; `config` is the layer's own."""
    extras = config.extras
    if extras is None:
        return
    hidden, width = config.hidden_size, extras.input_width
    common: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "leading": leading}
    if width:
        layer.per_layer_input_gate = Linear(hidden, width, axes=("ffn", "hidden"), **common)
        layer.per_layer_projection = Linear(width, hidden, axes=("hidden", "ffn"), **common)
        layer.post_per_layer_input_norm = hidden_norm(config, dtype=dtype, leading=leading)
    if extras.layer_scalar:
        axes = ("layers",) * len(leading) + ("one",)
        layer.layer_scalar = Constant(jnp.ones((*leading, 1), dtype), logical_axes=axes)
    if extras.altup is not None:
        layer.altup = altup.AltUp(config, **common)
        layer.laurel = altup.Laurel(config, **common)


def first_carried(
    config: DecoderConfig,
    modules: ModelExtras,
    x: jax.Array,
    *,
    dropout_key: jax.Array | None = None,
    empty: Callable[[DecoderConfig], Any] | None = None,
) -> Carried:
    """What the first layer is handed, of x `[batch, seq, d]`.

    Args:
      empty: a layer's configuration -> zeros in place of keys and values that are still to come; None for those of x.
    """
    extras = config.extras
    assert extras is not None

    def zeros(of_layer: DecoderConfig) -> Any:
        shape = (*x.shape[:2], of_layer.num_kv_heads, of_layer.head_dim)
        return jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype)

    kinds = (
        config.layer_kinds[: config.num_layers - extras.shared_kv_layers] if extras.shared_kv_layers else ()
    )
    keys_values = {
        kind: (empty or zeros)(config.of_layer(config.layer_kinds.index(kind))) for kind in sorted(set(kinds))
    }
    if extras.altup is not None:
        x = altup.streams_of(modules.altup_projections, x, dropout_key)
    return Carried(x, keys_values)


def last_stream(
    config: DecoderConfig, modules: ModelExtras, carried: Carried, dropout_key: jax.Array | None = None
) -> jax.Array:
    """`[batch, seq, d]` in front of the final norm."""
    extras = config.extras
    assert extras is not None
    if extras.altup is None:
        return carried.stream
    return altup.joined(modules.altup_unembed_projections, carried.stream, dropout_key)


def extended_layer(
    layer: DecoderLayer,
    carried: Carried,
    layer_input: jax.Array | None,
    cos: jax.Array | None,
    sin: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    config: DecoderConfig,
    kind: LayerKind,
    dropout_key: jax.Array | None = None,
    tile_tokens: int | None = None,
) -> Carried:
    """`blocks.decoder_layer` for layers with extras.

    Args:
      layer: parameters of one layer, not stacked.
      layer_input: `[batch, seq, p]`, or None where layers have no input of their own.
      cos, sin, segment_ids, kind, dropout_key, tile_tokens: as there.
      config: the layer's own.
    """

    def attend(x: jax.Array) -> tuple[jax.Array, Any]:
        x, q, k, v, gate = project_qkv(layer, x, config=config, dropout_key=dropout_key)
        if k is None:
            k, v = carried.keys_values[kind]
            q = q if cos is None or sin is None else rope.rotate(q, cos, sin)
        elif cos is not None and sin is not None:
            q, k = apply_rope(q, k, cos, sin)
        heads = flash_attention(
            q,
            k,
            v,
            segment_ids=segment_ids,
            sliding_window=config.sliding_window if kind == "sliding" else None,
            softcap=config.attention_softcap,
            scale=config.attention_multiplier,
        )
        return add_attention(layer, x, heads, gate, config=config, dropout_key=dropout_key), (k, v)

    with jax.named_scope("extended_layer"):
        return around_attention(
            layer,
            carried,
            layer_input,
            attend,
            config=config,
            kind=kind,
            dropout_key=dropout_key,
            tile_tokens=tile_tokens,
        )


def around_attention(
    layer: DecoderLayer,
    carried: Carried,
    layer_input: jax.Array | None,
    attend: Callable[[jax.Array], tuple[jax.Array, Any]],
    *,
    config: DecoderConfig,
    kind: LayerKind,
    dropout_key: jax.Array | None = None,
    tile_tokens: int | None = None,
) -> Carried:
    """A layer, given its attention: attend(x) is the stream after it, and its keys and values."""
    extras = config.extras
    assert extras is not None
    options: dict[str, Any] = {"config": config, "dropout_key": dropout_key}
    stream, predicted = carried.stream, None
    if extras.altup is None:
        x, keys_values = attend(stream)
    else:
        predicted = altup.predict(layer.altup, stream, extras.altup, dropout_key)
        active = predicted[extras.altup.active]
        x, keys_values = attend(active)
        x = altup.add_laurel(layer.laurel, x, layer.input_layernorm(active), dropout_key)
    x = feed_forward(layer, x, x, tile_tokens=tile_tokens, **options)
    if predicted is not None and extras.altup is not None:
        x = altup.correct(layer.altup, predicted, x, extras.altup, dropout_key)
        read = x[extras.altup.active]
        if extras.altup.scale_corrected:
            read = read * layer.altup.correct_output_scale.get_value()
        if layer_input is not None:
            x = x.at[1:].add(_from_input(layer, read, layer_input, **options))
    elif layer_input is not None:
        x = x + _from_input(layer, x, layer_input, **options)
    if extras.layer_scalar:
        x = x * layer.layer_scalar.get_value()
    if extras.key_values == "stored":
        carried = carried._replace(keys_values={**carried.keys_values, kind: keys_values})
    return carried._replace(stream=x)


def _from_input(layer, x, layer_input, *, config, dropout_key):
    """norm(W_project (act(W_gate x) * i)), `[batch, seq, d]`."""
    gate = one_linear(layer, "per_layer_input_gate", x, dropout_key)
    hidden = gated_activation(gate, layer_input, activation=config.activation)
    return layer.post_per_layer_input_norm(one_linear(layer, "per_layer_projection", hidden, dropout_key))
