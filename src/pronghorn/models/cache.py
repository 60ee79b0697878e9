"""Keys and values kept for generation, and the forward pass of one layer over them.

A token at position p of a row lives in slot p of that row, so nothing has to remember how full a row is: a query at
position p sees the slots p - window + 1 .. p, and whatever an earlier, longer padded call left in later slots is
overwritten before it can be seen. Position -1 marks padding: nothing is written for it, its output means nothing.

Of latent attention the vectors are kept that keys and values of every head are expanded from
(`models/latent_decoding.py`).

Keys are stored rotated, except where the frequencies depend on the length (dynamic, longrope): there they are stored
as projected and rotated with every call, so that queries and keys always share one set of frequencies. Hidden states
computed before a change of frequencies are not computed again: they equal those of one full call only if the
frequencies have not changed since, so after a change of longrope's factors prefill the row again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pronghorn.models import rope
from pronghorn.models.blocks import (
    add_attention,
    add_mixed,
    behind_rope,
    feed_forward,
    project_qkv,
    scaled_queries,
)
from pronghorn.models.config import STATE_SPACE_KINDS, DecoderConfig, LayerKind, LayerRope
from pronghorn.models.delta_net import cached_delta_net, empty_state
from pronghorn.models.extras import Carried, around_attention
from pronghorn.models.latent_decoding import latent_slots_attention, project_for_cache
from pronghorn.models.layers import DecoderLayer, value_or_none
from pronghorn.models.mamba import cached_mamba, empty_mamba_state
from pronghorn.models.short_convolution import convolution_inputs, weighted_taps
from pronghorn.models.state_cache import StateCache


class LayerCache(NamedTuple):
    """Keys and values, each `[batch, max_length, kv_heads, head_dim]`; stacked layers have a leading axis.

    Latent attention keeps its latent vectors as keys, `[batch, max_length, 1, position_dim + rank]`, and no values. A
    convolution keeps what it runs over as keys, `[batch, max_length, 1, d]`, and no values.
    """

    keys: jax.Array
    values: jax.Array


class HybridCache(NamedTuple):
    """Of a layer that attends and has a state-space mixer beside it."""

    attention: LayerCache
    state: StateCache


class Rotation(NamedTuple):
    """cos and sin of the queries; and of every slot, or None where keys are stored rotated. Two Nones: no rope."""

    query: tuple[jax.Array, jax.Array] | tuple[None, None]
    slots: tuple[jax.Array, jax.Array] | tuple[None, None] | None
    query_scale: jax.Array | None = None


def empty_cache(
    config: DecoderConfig,
    batch: int,
    max_length: int,
    *,
    dtype: Any,
    leading: tuple = (),
    kind: LayerKind = "full",
) -> LayerCache | StateCache | HybridCache | tuple[()]:
    """Zeros for one layer, or for a stack of `leading[0]` layers; nothing for one that looks at no other token."""
    if kind == "mlp":
        return ()
    if kind in STATE_SPACE_KINDS:
        assert config.state_space is not None
        state = empty_mamba_state(config.state_space, batch, dtype=dtype, leading=leading)
        if kind == "mamba":
            return state
        heads = empty_cache(config, batch, max_length, dtype=dtype, leading=leading)
        assert isinstance(heads, LayerCache)
        return HybridCache(heads, state)
    if kind == "linear":
        return empty_state(config, batch, dtype=dtype, leading=leading)
    if kind == "conv":
        shape = (*leading, batch, max_length, 1, config.hidden_size)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros((*shape[:-1], 0), dtype))
    if config.latent is not None:
        width = config.latent.position_dim + config.latent.rank
        keys = jnp.zeros((*leading, batch, max_length, 1, width), dtype)
        return LayerCache(keys, keys[..., :0])
    reads = config.extras is not None and config.extras.key_values == "read"
    shape = (
        *leading,
        batch,
        max_length,
        0 if reads else config.num_kv_heads,
    )  # or those of another layer's cache
    shape = (*shape, config.head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def max_length(cache: Any) -> int:
    """The slots of a model's cache: a state has none, and no model is of states alone."""
    kept = (layer for segment in cache for layer in segment)
    kept = (layer.attention if isinstance(layer, HybridCache) else layer for layer in kept)
    return int(next(layer.keys.shape[-3] for layer in kept if isinstance(layer, LayerCache)))


def rotation(config: DecoderConfig, positions: jax.Array, max_length: int) -> dict[LayerRope, Rotation]:
    """What the layers of one call need, by their rope: positions int `[batch, tokens]`, -1 for padding."""
    length = jnp.max(positions) + 1
    query = rope.layer_angles(config, positions, length=length)
    every = jnp.arange(max_length)[None]
    slots = rope.layer_angles(config, every, length=length)  # compiled away where nothing reads it
    return {
        kind: Rotation(
            query[kind],
            slots[kind]
            if kind != "none" and rope.depends_on_length(rope.with_rope(config, kind).rope)
            else None,
            rope.query_scale(config, positions) if kind in config.query_scale_ropes else None,
        )
        for kind in query
    }


def cached_attention(
    q: jax.Array,
    cache: LayerCache,
    positions: jax.Array,
    *,
    sliding_window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
    scale: float,
    chunk: int | None = None,
) -> jax.Array:
    """softmax(scale q Kᵀ) V over the visible slots, in fp32.

    Args:
      q: `[batch, tokens, heads, head_dim]`, rotated. Keys of the cache are rotated too.
      positions: int `[batch, tokens]`.
      sinks: `[heads]` logits that take part in the softmax and have no value, or None.
      chunk: positions of a chunk, of which a query sees its own; None for no chunks.

    Returns:
      `[batch, tokens, heads, value_dim]` in the dtype of q; zeros for padding.
    """
    batch, tokens, heads, head_dim = q.shape
    max_length, kv_heads = cache.keys.shape[1:3]
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    logits = scale * jnp.einsum("btkgd,blkd->bkgtl", grouped, cache.keys, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    slots, at = jnp.arange(max_length), positions[..., None]
    visible = slots <= at
    if sliding_window is not None:
        visible &= slots > at - sliding_window
    if chunk is not None:
        visible &= slots >= at // chunk * chunk
    visible = visible[:, None, None]
    logits = jnp.where(visible, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    sink = None
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        top = jnp.maximum(top, sink)
    top = jnp.where(jnp.isfinite(top), top, 0.0)  # a padded row sees nothing
    weights = jnp.where(visible, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - top)
    weights = (weights / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).astype(cache.values.dtype)
    out = jnp.einsum("bkgtl,blkd->btkgd", weights, cache.values, preferred_element_type=jnp.float32)
    return out.reshape(batch, tokens, heads, -1).astype(q.dtype)


def _rotated(x: jax.Array, cos_sin: tuple) -> jax.Array:
    cos, sin = cos_sin
    return x if cos is None else rope.rotate(x, cos, sin)


def _cached_convolution(
    layer: DecoderLayer, x: jax.Array, cache: LayerCache, positions: jax.Array, *, config: DecoderConfig
) -> tuple[jax.Array, LayerCache]:
    module = layer.conv
    gated, gate = convolution_inputs(module.in_proj(layer.input_layernorm(x)))
    slots = _stored(cache.keys, gated[:, :, None], positions)
    rows, taps = jnp.arange(x.shape[0])[:, None], []
    for ago in range(config.conv_width - 1, -1, -1):
        found = slots[rows, jnp.maximum(positions - ago, 0), 0]
        taps.append(jnp.where((positions >= ago)[..., None], found, 0).astype(gated.dtype))
    mixed = x + module.out_proj(gate * weighted_taps(module.conv, taps))
    return mixed, cache._replace(keys=slots)


def _stored(slots: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """The slots `[batch, max_length, ..]` with new values `[batch, tokens, ..]` at their positions."""
    rows = jnp.arange(new.shape[0])[:, None]
    # An index past the end is dropped; a negative one would wrap round.
    at = jnp.where(positions < 0, slots.shape[1], positions)
    return slots.at[rows, at].set(new.astype(slots.dtype), mode="drop")


def cached_decoder_layer(
    layer: DecoderLayer,
    x: jax.Array,
    cache: Any,
    angles: Rotation,
    positions: jax.Array,
    *,
    config: DecoderConfig,
    kind: LayerKind,
) -> tuple[jax.Array, Any]:
    """`layers.decoder_layer` for tokens that follow those in the cache; returns the cache with them in it.

    Args:
      x: `[batch, tokens, d]`.
      cache: of this layer.
      positions: int `[batch, tokens]`, increasing in each row, -1 for padding.
    """
    if kind == "mlp":
        return feed_forward(layer, x, x, config=config), cache
    attended, x, cache = _cached_attention_part(layer, x, cache, angles, positions, config=config, kind=kind)
    if config.block == "single":
        return attended, cache
    read = x if config.block == "parallel" else attended
    return feed_forward(layer, read, attended, config=config), cache


def _cached_attention_part(
    layer: DecoderLayer,
    x: jax.Array,
    cache: Any,
    angles: Rotation,
    positions: jax.Array,
    *,
    config: DecoderConfig,
    kind: LayerKind,
) -> tuple[jax.Array, jax.Array, Any]:
    """(the stream after attention, or what stands in its place, the stream in front of it, the cache with the new
    tokens in it) of `cached_decoder_layer`'s arguments."""
    if kind == "conv":
        attended, cache = _cached_convolution(layer, x, cache, positions, config=config)
        return attended, x, cache
    if kind == "linear":
        attended, cache = cached_delta_net(layer, x, cache, positions, config=config)
        return attended, x, cache
    if kind == "mamba":
        mixed, cache = cached_mamba(layer, x, cache, positions, config=config)
        return add_mixed(x, mixed, config), x, cache
    if kind == "hybrid":
        mixed, state = cached_mamba(layer, x, cache.state, positions, config=config)
        given = (cache.attention, angles, positions)
        x, heads, gate, kept, _ = cached_heads(layer, x, *given, config=config, kind=kind)
        attended = add_attention(layer, add_mixed(x, mixed, config), heads, gate, config=config)
        return attended, x, HybridCache(kept, state)
    x, heads, gate, cache, _ = cached_heads(layer, x, cache, angles, positions, config=config, kind=kind)
    return add_attention(layer, x, heads, gate, config=config), x, cache


def cached_heads(
    layer: DecoderLayer,
    x: jax.Array,
    cache: LayerCache,
    angles: Rotation,
    positions: jax.Array,
    *,
    config: DecoderConfig,
    kind: LayerKind,
    read: LayerCache | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, LayerCache, LayerCache]:
    """(x, what attention's heads see, their gate, the cache with the new tokens in it, keys as they are compared with
    and values) of `cached_decoder_layer`'s arguments.

    Args:
      read: the last of these of another layer, for one that has no keys and values of its own.
    """
    attention = layer.self_attn
    gate: jax.Array | None = None
    if config.latent is not None:
        x, q, k = project_for_cache(layer, x, config=config)
        v = k[..., :0]
    else:
        x, q, k, v, gate = project_qkv(layer, x, config=config)
    rotated = angles.query[0] is not None
    q, _ = behind_rope(attention, _rotated(q, angles.query), None, config, rotated=rotated)
    if k is not None:
        if angles.slots is None:
            _, k = behind_rope(attention, None, _rotated(k, angles.query), config, rotated=rotated)
        read = cache = LayerCache(_stored(cache.keys, k, positions), _stored(cache.values, v, positions))
        if angles.slots is not None:
            _, keys = behind_rope(
                attention, None, _rotated(cache.keys, angles.slots), config, rotated=rotated
            )
            read = cache._replace(keys=keys)
    assert read is not None

    def attend(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return cached_attention(
            q,
            LayerCache(keys, values),
            positions,
            sliding_window=config.sliding_window if kind == "sliding" else None,
            chunk=config.attention_chunk if kind == "chunked" else None,
            softcap=config.attention_softcap,
            sinks=value_or_none(getattr(attention, "sinks", None)),
            scale=config.attention_multiplier,
        )

    if config.latent is not None:
        heads = latent_slots_attention(attention, q, read.keys, attend, config=config)
    else:
        heads = attend(scaled_queries(q, angles.query_scale), read.keys, read.values)
    return x, heads, gate, cache, read


def cached_extended_layer(
    layer: DecoderLayer,
    carried: Carried,
    layer_input: jax.Array | None,
    cache: LayerCache,
    angles: Rotation,
    positions: jax.Array,
    *,
    config: DecoderConfig,
    kind: LayerKind,
) -> tuple[Carried, LayerCache]:
    """`extras.extended_layer` for tokens that follow those in the cache; the keys and values that `carried` has are a
    `LayerCache` each."""
    filled = cache

    def attend(x: jax.Array) -> tuple[jax.Array, LayerCache]:
        nonlocal filled
        x, heads, gate, filled, read = cached_heads(
            layer, x, cache, angles, positions, config=config, kind=kind, read=carried.keys_values.get(kind)
        )
        return add_attention(layer, x, heads, gate, config=config), read

    carried = around_attention(layer, carried, layer_input, attend, config=config, kind=kind)
    return carried, filled
