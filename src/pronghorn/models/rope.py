"""Rotary position embedding: the frequencies of every scaling, and cos and sin for given positions.

    angle[p, i] = p * f[i],   f[i] = base^(-2i / R),   R = head_dim * partial_rotary_factor

A scaling changes f, and for yarn and longrope multiplies cos and sin by an attention factor:

    linear    f / factor                                                          (kaiokendev 2023)
    dynamic   base * (factor * L / M - (factor - 1))^(R / (R - 2)), L = max(length, M), M the original context
              (NTK-aware, bloc97 and emozilla 2023)
    llama3    f / factor for wavelengths over M / low, f under M / high, a blend between   (Llama 3.1, Meta 2024)
    yarn      f / factor for the slow dimensions, f for the fast, a ramp between           (Peng et al. 2023)
    proportional  f with R = head_dim for the first of its pairs, the partial rotary factor's share, and 0 for the
              others                                                                     (Gemma 4, Google 2026)
    longrope  f / short[i] up to M tokens and f / long[i] beyond                           (Ding et al. 2024)

The semantics are those of transformers' `modeling_rope_utils`: dynamic and longrope look at the length of the whole
call, max(positions) + 1, which is traced. Source (Su et al. 2021) RoFormer, arXiv:2104.09864.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.models.config import DecoderConfig, LayerRope, RopeConfig


def depends_on_length(rope: RopeConfig) -> bool:
    """Whether the frequencies change with the length of the call, so that rotated keys cannot be kept."""
    return rope.kind in ("dynamic", "longrope")


def rotated_dims(config: DecoderConfig) -> int:
    """R: how many of the first dims of a head are rotated."""
    if config.latent is not None:
        return config.latent.position_dim
    if config.rope.kind == "proportional":
        return config.head_dim  # some of them by nothing
    return int(config.head_dim * config.rope.partial_rotary_factor)


def attention_factor(config: DecoderConfig) -> float:
    """The factor on cos and sin: given, or derived from how far the context was stretched."""
    rope = config.rope
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    if rope.kind == "longrope":
        if rope.factor <= 1.0:
            return 1.0
        return math.sqrt(1 + math.log(rope.factor) / math.log(_original_context(config)))
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor)


def inverse_frequencies(
    config: DecoderConfig, length: jax.Array | int | None = None
) -> jax.Array | np.ndarray:
    """f, fp32 `[R / 2]`.

    Args:
      length: tokens of the call, a scalar that may be traced; read by dynamic and longrope, which take None for the
        original context.

    Returns:
      A numpy constant, unless the kind depends on the length.
    """
    rope, dims = config.rope, rotated_dims(config)
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    if rope.kind == "dynamic":
        original = _original_context(config)
        stretched = jnp.maximum(original if length is None else length, original).astype(jnp.float32)
        growth = rope.factor * stretched / original - (rope.factor - 1)
        base = rope.base * growth ** (dims / (dims - 2))
        return 1.0 / base**exponents
    # A power rounded once and then fp32, as in torch, bit for bit: position 100,000 magnifies the last bit of f.
    wavelengths = (np.float64(rope.base) ** exponents).astype(np.float32)
    if rope.kind == "longrope":
        short = 1.0 / (np.asarray(rope.short_factor, np.float32) * wavelengths)
        long = 1.0 / (np.asarray(rope.long_factor, np.float32) * wavelengths)
        original = _original_context(config)
        return jnp.where((original if length is None else length) > original, long, short)
    frequencies = np.float32(1.0) / wavelengths
    if rope.kind == "proportional":
        rotated = np.arange(dims // 2) < int(rope.partial_rotary_factor * dims // 2)
        return np.where(rotated, frequencies, np.float32(0.0)) / np.float32(rope.factor)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(frequencies, config)
    if rope.kind == "yarn":
        return _yarn(frequencies, config)
    return frequencies


def cos_sin(
    config: DecoderConfig, positions: jax.Array, *, length: jax.Array | int | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the angles, scaled by the attention factor.

    Args:
      positions: int `[batch, seq]`.
      length: tokens of the call; default max(positions) + 1.

    Returns:
      Two fp32 `[batch, seq, R / 2]`.
    """
    if length is None:
        length = jnp.max(positions) + 1
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config, length)
    factor = attention_factor(config)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def layer_angles(
    config: DecoderConfig, positions: jax.Array, *, length: jax.Array | int | None = None
) -> dict[LayerRope, tuple[jax.Array, jax.Array] | tuple[None, None]]:
    """`cos_sin` of every rope that a layer of the model uses: {"global": .., "local": .., "none": (None, None)}."""
    angles: dict[LayerRope, Any] = {}
    for kind in dict.fromkeys(kind for _, kind in config.layer_pattern):
        if kind == "none":
            angles[kind] = (None, None)
        else:
            angles[kind] = cos_sin(with_rope(config, kind), positions, length=length)
    return angles


def query_scale(config: DecoderConfig, positions: jax.Array) -> jax.Array | None:
    """The factor of every query, fp32 `[batch, seq]` (Nakanishi 2025, arXiv:2501.19399), or None for none."""
    if not config.query_scale_beta:
        return None
    context = config.query_scale_context or _original_context(config)
    contexts = jnp.floor((jnp.maximum(positions, 0) + config.query_scale_first) / context)
    return 1 + config.query_scale_beta * jnp.log1p(contexts)


def with_rope(config: DecoderConfig, kind: LayerRope) -> DecoderConfig:
    """The configuration with `rope` as layers of that kind have it."""
    if kind != "local":
        return config
    assert config.local_rope is not None
    head_dim = (config.extras.sliding_head_dim if config.extras else 0) or config.head_dim
    return dataclasses.replace(config, rope=config.local_rope, head_dim=head_dim)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first R dims of `[batch, seq, heads, head_dim]` (rotate-half), in fp32, back in x's dtype.

    For queries and keys that lie at different positions; `pallas_kernels.apply_rope` is for those that do not.
    """
    half = cos.shape[-1]
    c, s = cos[:, :, None], sin[:, :, None]
    first, second, rest = (
        x[..., :half].astype(jnp.float32),
        x[..., half : 2 * half].astype(jnp.float32),
        x[..., 2 * half :],
    )
    rotated = jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)


def _original_context(config: DecoderConfig) -> int:
    original = config.rope.original_max_position_embeddings
    return config.max_position_embeddings if original is None else original


def _mscale(scale: float, mscale: float = 1.0) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def _llama3(frequencies: np.ndarray, config: DecoderConfig) -> np.ndarray:
    rope, original = config.rope, _original_context(config)
    assert rope.low_freq_factor is not None and rope.high_freq_factor is not None
    low, high, factor = rope.low_freq_factor, rope.high_freq_factor, np.float32(rope.factor)
    wavelengths = np.float32(2 * math.pi) / frequencies
    # Llama 4 has no ramp: low and high are one number, and what is neither under nor over is by an accident.
    blend = (original / wavelengths - low) / max(high - low, 1e-30)
    between = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, between)
    return np.where(wavelengths < original / high, frequencies, scaled).astype(np.float32)


def _yarn(frequencies: np.ndarray, config: DecoderConfig) -> np.ndarray:
    rope, dims = config.rope, rotated_dims(config)

    def dimension(rotations: float) -> float:
        """The dimension that makes `rotations` turns over the original context."""
        return (
            dims * math.log(_original_context(config) / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))
        )

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = np.clip((np.arange(dims // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (frequencies / np.float32(rope.factor) * ramp + frequencies * (1 - ramp)).astype(np.float32)
