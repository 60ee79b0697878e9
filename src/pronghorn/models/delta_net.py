"""A layer's gated delta net, in place of attention (Yang et al. 2024, arXiv:2412.06464; as Qwen3-Next and Qwen3.5 have
it).

With n = norm(x), and for every value head the numbers A_log and dt_bias,

    [q, k, v] = silu(conv(W_qkv n)),  z = W_z n,  β = sigmoid(W_b n),  g = −exp(A_log) softplus(W_a n + dt_bias)
    o = gated_delta_rule(q / |q|, k / |k|, v, g, β)          x + W_out (rms_norm(o) * silu(z))

The convolution is each feature's own, over its last `conv_width` tokens. It and the state are cut where segments are.

Saved: x, W_qkv n, z, W_b n, W_a n, o, and what the rule names (T of its chunks). The convolution, the activations and
the norms run again in the backward pass.

Decoding keeps the state and W_qkv n of the last tokens (`models/state_cache.py`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pronghorn.models.config import DecoderConfig
from pronghorn.models.layers import DecoderLayer, DeltaNet, RMSNorm
from pronghorn.models.projections import added_linear, normalized_linears
from pronghorn.models.short_convolution import taps_of, weighted_taps
from pronghorn.models.state_cache import NewTokens, StateCache
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.convolved_heads import convolved_heads, fits
from pronghorn.pallas_kernels.gated_delta_rule import (
    INVERSE_NAME,
    continue_gated_delta_rule,
    gated_delta_rule,
)
from pronghorn.pallas_kernels.lora_linear import RANK_NAME

_LENGTH_EPS = 1e-6  # as in the release of the models: under the root, added to the squared length


def empty_state(config: DecoderConfig, batch: int, *, dtype: Any, leading: tuple = ()) -> StateCache:
    """Zeros for one layer, or for a stack of `leading[0]` layers."""
    heads, key_dim, value_dim = config.linear_value_heads, config.linear_key_dim, config.linear_value_dim
    features = 2 * config.linear_key_heads * key_dim + heads * value_dim
    return StateCache(
        jnp.zeros((*leading, batch, config.conv_width - 1, features), dtype),
        jnp.zeros((*leading, batch, heads, key_dim, value_dim), jnp.float32),
    )


def add_delta_net(
    layer: DecoderLayer,
    x: jax.Array,
    segment_ids: jax.Array | None,
    *,
    config: DecoderConfig,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(x + what the layer's delta net makes of it, x to be read on from), `[batch, seq, d]`; named for memory
    policies."""
    module = layer.linear_attn
    x, (wide, z, b, a) = _projected(layer, x, config, dropout_key)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(INVERSE_NAME))
    def mix(wide, b, a):
        heads = _heads(module, wide, segment_ids, config)
        return gated_delta_rule(*heads, *_gates(module, b, a), segment_ids=segment_ids)

    heads = checkpoint_name(mix(wide, b, a), "attention_out")
    return checkpoint_name(_add_output(module, heads, z, x, dropout_key), "stream_after_attention"), x


def _projected(
    layer: DecoderLayer, x: jax.Array, config: DecoderConfig, dropout_key: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """(x, (W_qkv n, W_z n, W_b n, W_a n)), x to be read on from."""
    names = [
        f"in_proj_{name}"
        for name in (("qkvz", "ba") if config.linear_by_key_head else ("qkv", "z", "b", "a"))
    ]
    norm = layer.input_layernorm
    x, projected = normalized_linears(norm, layer.linear_attn, tuple(names), x, dropout_key)
    if not config.linear_by_key_head:
        return x, tuple(projected)
    # Of every key head: its q, its k, v and z of its value heads; and b and a of these. Neither array is kept.
    heads, key_dim = config.linear_key_heads, config.linear_key_dim
    each = config.linear_value_heads // heads
    qkvz, ba = (array.reshape(*x.shape[:2], heads, -1) for array in projected)
    q, k, v, z = jnp.split(
        qkvz, (key_dim, 2 * key_dim, 2 * key_dim + each * config.linear_value_dim), axis=-1
    )
    q, k, v, z, b, a = (part.reshape(*x.shape[:2], -1) for part in (q, k, v, z, *jnp.split(ba, 2, axis=-1)))
    return x, (jnp.concatenate([q, k, v], axis=-1), z, b, a)


def _heads(
    module: DeltaNet, wide: jax.Array, segment_ids: jax.Array | None, config: DecoderConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q, k, v) of `gated_delta_rule` from W_qkv n."""
    dim, conv = config.linear_key_dim, module.conv1d
    if launch.resolve(None) != "pallas" or conv.bias is not None or not fits(dim, config.linear_value_dim):
        return _heads_of_taps(module, taps_of(wide, config.conv_width, segment_ids), config)
    sizes: dict[str, Any] = {"key_heads": config.linear_key_heads, "dim": dim, "eps": _LENGTH_EPS}
    return convolved_heads(wide, conv.weight.get_value()[:, 0], **sizes, segment_ids=segment_ids)


def _heads_of_taps(
    module: DeltaNet, taps: list[jax.Array], config: DecoderConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q, k, v) from the taps of W_qkv n: what `convolved_heads` computes where its kernels run."""
    mixed = weighted_taps(module.conv1d, taps)
    mixed = jax.nn.silu(mixed.astype(jnp.float32)).astype(mixed.dtype)
    keys = config.linear_key_heads * config.linear_key_dim
    q, k, v = jnp.split(mixed, (keys, 2 * keys), axis=-1)
    batch, seq, _ = mixed.shape
    q, k = (_unit_length(x.reshape(batch, seq, config.linear_key_heads, -1)) for x in (q, k))
    return q, k, v.reshape(batch, seq, config.linear_value_heads, -1)


def _gates(module: DeltaNet, b: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(g, beta) of `gated_delta_rule` from W_b n and W_a n."""
    rate = jnp.exp(module.A_log.get_value().astype(jnp.float32))
    step = jax.nn.softplus(a.astype(jnp.float32) + module.dt_bias.get_value().astype(jnp.float32))
    return -rate * step, jax.nn.sigmoid(b.astype(jnp.float32))


def _unit_length(x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    square = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(square + _LENGTH_EPS)).astype(x.dtype)


def _add_output(
    module: DeltaNet, heads: jax.Array, z: jax.Array, x: jax.Array, dropout_key: jax.Array | None
) -> jax.Array:
    """x + W_out (rms_norm(heads) * silu(z)); saved: heads and z."""

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(RANK_NAME))
    def narrow(heads, z, x):
        gated = _gated_norm(module.norm, heads, z.reshape(heads.shape))
        return added_linear(module, "out_proj", gated, x, dropout_key)

    return narrow(heads, z, x)


def _gated_norm(norm: RMSNorm, heads: jax.Array, z: jax.Array) -> jax.Array:
    gate = jax.nn.silu(z.astype(jnp.float32))
    return (norm(heads).astype(jnp.float32) * gate).astype(heads.dtype)


def cached_delta_net(
    layer: DecoderLayer, x: jax.Array, cache: StateCache, positions: jax.Array, *, config: DecoderConfig
) -> tuple[jax.Array, StateCache]:
    """`add_delta_net` of tokens `[batch, tokens, d]` that follow those in the cache, and the cache with them in it."""
    module, new = layer.linear_attn, NewTokens.at(positions)
    x, (wide, z, b, a) = _projected(layer, x, config, None)
    wide, b, a = (new.in_front(values) for values in (wide, b, a))
    taps, recent = new.taps(cache, wide)
    g, beta = (jnp.where(new.real, values, 0.0) for values in _gates(module, b, a))
    q, k, v = _heads_of_taps(module, taps, config)
    heads, state = continue_gated_delta_rule(q, k, v, g, beta, cache.states(new))
    return _add_output(module, new.in_place(heads), z, x, None), StateCache(recent, state)
