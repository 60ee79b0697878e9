"""A layer's state-space mixer, in place of attention or beside it (Mamba 2; Dao and Gu 2024, arXiv:2405.21060).

With n = norm(x), and for every head the numbers A_log, D and dt_bias,

    [z, u, t] = W_in n,  [x, b, c] = silu(conv(u)),  t = clamp(softplus(t + dt_bias))
    o = state_space(x, t, −exp(A_log), b, c, D)          W_out gated_norm(o, z)

gated_norm is rms_norm(o silu(z)) over groups of the width, or one of `StateSpaceConfig.gated_norm`. The convolution is
each feature's own, over its last `conv_width` tokens. It and the state are cut where segments are.

Saved: the layer's input, W_in n and o. The convolution, the activations and the norms run again in the backward pass.
Decoding keeps the state and u of the last tokens (`models/state_cache.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pronghorn.models.config import DecoderConfig
from pronghorn.models.layers import DecoderLayer, Mamba, RMSNorm
from pronghorn.models.projections import normalized_linears, one_linear
from pronghorn.models.short_convolution import taps_of, weighted_taps
from pronghorn.models.state_cache import NewTokens, StateCache
from pronghorn.models.state_space_config import StateSpaceConfig
from pronghorn.pallas_kernels.state_space import continue_state_space, state_space


def empty_mamba_state(config: StateSpaceConfig, batch: int, *, dtype: Any, leading: tuple = ()) -> StateCache:
    """Zeros for one layer, or for a stack of `leading[0]` layers."""
    return StateCache(
        jnp.zeros((*leading, batch, config.conv_width - 1, config.conv_features), dtype),
        jnp.zeros((*leading, batch, config.heads, config.state_dim, config.head_dim), jnp.float32),
    )


def mamba(
    layer: DecoderLayer,
    x: jax.Array,
    segment_ids: jax.Array | None,
    *,
    config: DecoderConfig,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(what the layer's mixer makes of x `[batch, seq, d]`, x to be read on from); o is named for memory policies."""
    module, sizes = layer.mamba, config.state_space
    assert sizes is not None
    x, wide = _projected(layer, x, sizes, dropout_key)

    @jax.checkpoint
    def mix(wide):
        _, convolved, step = _parts(wide, sizes)
        taps = taps_of(convolved, sizes.conv_width, segment_ids)
        return state_space(*_recurrence_inputs(module, taps, step, sizes), segment_ids=segment_ids)

    heads = checkpoint_name(mix(wide), "attention_out")
    return _output(module, heads, wide, sizes, dropout_key), x


def cached_mamba(
    layer: DecoderLayer, x: jax.Array, cache: StateCache, positions: jax.Array, *, config: DecoderConfig
) -> tuple[jax.Array, StateCache]:
    """`mamba` of tokens `[batch, tokens, d]` that follow those in the cache, and the cache with them in it."""
    module, sizes, new = layer.mamba, config.state_space, NewTokens.at(positions)
    assert sizes is not None
    x, wide = _projected(layer, x, sizes, None)
    _, convolved, step = _parts(new.in_front(wide), sizes)
    taps, recent = new.taps(cache, convolved)
    x_heads, step, rate, b, c, skip = _recurrence_inputs(module, taps, step, sizes)
    step = jnp.where(new.real, step, 0.0)  # what is behind the real tokens leaves the state alone
    heads, state = continue_state_space(x_heads, step, rate, b, c, skip, cache.states(new))
    return _output(module, new.in_place(heads), wide, sizes, None), StateCache(recent, state)


def _projected(
    layer: DecoderLayer, x: jax.Array, sizes: StateSpaceConfig, dropout_key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(x to be read on from, W_in n)."""
    x, (wide,) = normalized_linears(
        layer.input_layernorm, layer.mamba, ("in_proj",), x, dropout_key, input_scale=sizes.input_scale
    )
    return x, wide


def _parts(wide: jax.Array, sizes: StateSpaceConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(z, u, t) of W_in n, `[batch, seq, features]` each, with their factors."""
    directions = sizes.groups * sizes.state_dim
    widths = (sizes.width, sizes.width, directions, directions, sizes.heads)
    if any(scale != 1.0 for scale in sizes.part_scales):
        scales = jnp.repeat(
            jnp.asarray(sizes.part_scales, jnp.float32), jnp.asarray(widths), total_repeat_length=sum(widths)
        )
        wide = (wide.astype(jnp.float32) * scales).astype(wide.dtype)
    z, convolved, step = jnp.split(wide, (sizes.width, sizes.width + sizes.conv_features), axis=-1)
    return z, convolved, step


def _recurrence_inputs(
    module: Mamba, taps: list[jax.Array], step: jax.Array, sizes: StateSpaceConfig
) -> tuple[jax.Array, ...]:
    """(x, step, rate, b, c, skip) of `state_space` from the taps of u, and t."""
    mixed = weighted_taps(module.conv1d, taps)
    mixed = jax.nn.silu(mixed.astype(jnp.float32)).astype(mixed.dtype)
    x, b, c = jnp.split(mixed, (sizes.width, sizes.width + sizes.groups * sizes.state_dim), axis=-1)
    x = x.reshape(*x.shape[:2], sizes.heads, sizes.head_dim)
    b, c = (values.reshape(*values.shape[:2], sizes.groups, sizes.state_dim) for values in (b, c))
    step = jax.nn.softplus(step.astype(jnp.float32) + module.dt_bias.get_value().astype(jnp.float32))
    rate = -jnp.exp(module.A_log.get_value().astype(jnp.float32))
    return x, jnp.clip(step, *sizes.step_limits), rate, b, c, module.D.get_value()


def _output(
    module: Mamba,
    heads: jax.Array,
    wide: jax.Array,
    sizes: StateSpaceConfig,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """W_out gated_norm(o, z), with its factor; saved: o and W_in n."""

    @jax.checkpoint
    def narrow(heads, wide):
        z, _, _ = _parts(wide, sizes)
        gated = _gated_norm(module.norm, heads.reshape(z.shape), z, sizes)
        return one_linear(module, "out_proj", gated, dropout_key)

    out = narrow(heads, wide)
    return out if sizes.output_scale == 1.0 else out * jnp.asarray(sizes.output_scale, out.dtype)


def _gated_norm(norm: RMSNorm | None, o: jax.Array, z: jax.Array, sizes: StateSpaceConfig) -> jax.Array:
    """In fp32, rounded once."""
    gate, y = jax.nn.silu(z.astype(jnp.float32)), o.astype(jnp.float32)
    if sizes.gated_norm != "norm_first":
        y = y * gate
    if norm is not None:
        groups = y.reshape(*y.shape[:-1], sizes.groups, -1)
        square = jnp.mean(groups * groups, axis=-1, keepdims=True)
        groups = groups * jax.lax.rsqrt(square + norm.eps)
        y = groups.reshape(y.shape) * norm.weight.get_value().astype(jnp.float32)
    if sizes.gated_norm == "norm_first":
        y = y * gate
    return y.astype(o.dtype)
