"""Convolutions of a few tokens, each feature by itself, and LFM 2's layer that has one in place of attention."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pronghorn.models.config import DecoderConfig
from pronghorn.models.layers import DecoderLayer, Taps
from pronghorn.models.projections import one_linear


def add_convolution(
    layer: DecoderLayer,
    x: jax.Array,
    segment_ids: jax.Array | None,
    *,
    config: DecoderConfig,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """x `[batch, seq, d]` + W_out (c * conv(b * h)), with b, c and h the thirds of W_in norm(x) (Liquid AI 2025).

    The convolution is each feature's own, over its last `conv_width` tokens. Saved: x and W_in norm(x).
    """

    @jax.checkpoint
    def widen(x):
        return one_linear(layer.conv, "in_proj", layer.input_layernorm(x), dropout_key)

    @jax.checkpoint
    def narrow(wide):
        gated, gate = convolution_inputs(wide)
        taps = taps_of(gated, config.conv_width, segment_ids)
        return one_linear(layer.conv, "out_proj", gate * weighted_taps(layer.conv.conv, taps), dropout_key)

    return x + narrow(widen(x))


def convolution_inputs(wide: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what is convolved, what the outcome is multiplied by), each `[batch, seq, d]`."""
    b, c, h = jnp.split(wide, 3, axis=-1)
    return b * h, c


def weighted_taps(conv: Taps, taps: Sequence[jax.Array]) -> jax.Array:
    """The sum of the taps `[batch, seq, d]`, the token itself last, each feature with its own weights; in fp32."""
    weight = conv.weight.get_value()[:, 0].astype(jnp.float32)
    total = sum(tap.astype(jnp.float32) * weight[:, i] for i, tap in enumerate(taps))
    if conv.bias is not None:
        total = total + conv.bias.get_value().astype(jnp.float32)
    return _narrow_gradient(jnp.asarray(total, taps[-1].dtype))


@jax.custom_vjp
def _narrow_gradient(y: jax.Array) -> jax.Array:
    """y, whose gradient is an array of its dtype: XLA would write it in fp32 for the taps to read."""
    return y


_narrow_gradient.defvjp(lambda y: (y, None), lambda _, dy: (jax.lax.optimization_barrier(dy),))


def taps_of(values: jax.Array, width: int, segment_ids: jax.Array | None) -> list[jax.Array]:
    """What a convolution over `width` tokens weighs at every token, the token itself last."""
    return [earlier_tokens(values, ago, segment_ids) for ago in range(width - 1, -1, -1)]


def earlier_tokens(values: jax.Array, ago: int, segment_ids: jax.Array | None) -> jax.Array:
    """Values `[batch, seq, d]` of `ago` tokens before, zero where that is in front of the row or of the segment."""
    if ago == 0:
        return values
    earlier = jnp.pad(values, ((0, 0), (ago, 0), (0, 0)))[:, : values.shape[1]]
    if segment_ids is None:
        return earlier
    same = jnp.pad(segment_ids, ((0, 0), (ago, 0)), constant_values=-1)[:, : values.shape[1]] == segment_ids
    return jnp.where(same[..., None], earlier, 0)
