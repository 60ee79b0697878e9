"""Decoding with latent attention: attention over the latent vectors themselves, heads never being expanded.

Of a token and layer the cache keeps `[k_position, c]`, the position key as it meets queries and the normalised
compressed vector: `position_dim + rank` numbers, for DeepSeek-V3 576 in the place of the 40,960 of every head's keys
and values. With W_k and W_v the rows of W_kvb that give a head its keys and its values, slots l and weights p:

    q · k_l   = q_position · k_position_l + q_content · (W_k c_l) = [q_position, W_kᵀ q_content] · [k_position_l, c_l]
    Σ p_l v_l = Σ p_l W_v c_l = W_v (Σ p_l c_l)

So queries of all heads meet one key of `position_dim + rank` dims, and that same vector is the value. An adapter of
W_kvb keeps its low rank: W_k + s B_k A is applied as W_kᵀ q + Aᵀ (s B_kᵀ q). DoRA scales rows, which are dims of
q_content and of the output. A quantised W_kvb is dequantised, its products being of single heads; FP8 rounds no
activations in them.

An absorbed query has more dims than a head, so that with many new tokens in a call, a prefill, it is less work to
expand the heads of every slot once. `absorbs` counts both. Expanded heads are held for one layer at a time.

Source: DeepSeek-V2, 2024, section 2.1.2, https://arxiv.org/abs/2405.04434.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pronghorn.models.config import DecoderConfig
from pronghorn.models.latent_attention import halves, latent_queries, project_latents
from pronghorn.models.layers import DecoderLayer, LatentAttention, Linear, value_or_none
from pronghorn.models.projections import one_linear
from pronghorn.pallas_kernels.dora import row_norms
from pronghorn.pallas_kernels.lora_linear import dense


def project_for_cache(
    layer: DecoderLayer, x: jax.Array, *, config: DecoderConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, q `[batch, tokens, heads, head_dim]`, what is kept `[batch, tokens, 1, position_dim + rank]`), of the stream
    `[batch, tokens, d]`; dims of positions first, in halves and not rotated."""
    latent, attention = config.latent, layer.self_attn
    assert latent is not None
    x, of_q, of_kv = project_latents(layer, x, config=config)
    q = jnp.concatenate(latent_queries(attention, of_q, config=config), axis=-1)
    compressed, k_position = jnp.split(of_kv, (latent.rank,), axis=-1)
    if config.rope_interleaved:
        k_position = halves(k_position)
    kept = jnp.concatenate([k_position, attention.kv_a_layernorm(compressed)], axis=-1)
    return x, q, kept[:, :, None]


def absorbs(config: DecoderConfig, tokens: int, slots: int) -> bool:
    """Whether attention of so many new tokens of a row over so many slots takes fewer multiplications on latent vectors
    than on expanded heads."""
    latent = config.latent
    assert latent is not None
    width = latent.content_dim + latent.value_dim
    absorbed = tokens * 2 * latent.rank * width + tokens * slots * 2 * (latent.position_dim + latent.rank)
    expanded = slots * latent.rank * width + tokens * slots * (latent.position_dim + width)
    return absorbed < expanded


def latent_slots_attention(
    attention: LatentAttention,
    q: jax.Array,
    slots: jax.Array,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    *,
    config: DecoderConfig,
) -> jax.Array:
    """What every head sees of the cache, `[batch, tokens, heads, value_dim]`, in the dtype of q.

    Args:
      q: `[batch, tokens, heads, head_dim]`, dims of positions first and rotated.
      slots: `[batch, max_length, 1, position_dim + rank]`, dims of positions rotated.
      attend: attention of (q, keys, values), each `[batch, .., heads or kv_heads, dims]`.
    """
    latent = config.latent
    assert latent is not None
    q_position, q_content = jnp.split(q, (latent.position_dim,), axis=-1)
    if absorbs(config, q.shape[1], slots.shape[1]):
        expansion = _expansion(attention.kv_b_proj, q_content, config)
        q = jnp.concatenate([q_position, _absorbed(expansion, q_content, latent.value_dim)], axis=-1)
        # The positions' part of the output is dropped: values without it would be a copy of the cache.
        mixed = attend(q, slots, slots)[..., latent.position_dim :]
        return _expanded(expansion, mixed)[..., latent.content_dim :]
    k_position, compressed = jnp.split(slots, (latent.position_dim,), axis=-1)
    heads = one_linear(attention, "kv_b_proj", compressed[:, :, 0].astype(q.dtype), None)
    heads = heads.reshape(*heads.shape[:2], config.num_heads, -1)
    k_content, v = jnp.split(heads, (latent.content_dim,), axis=-1)
    k_position = jnp.broadcast_to(k_position, (*k_content.shape[:-1], latent.position_dim))
    return attend(q, jnp.concatenate([k_position, k_content], axis=-1), v)


class _Expansion(NamedTuple):
    """W_kvb head by head: y = lengths ∘ (W x + B A x), `d` standing for the content_dim + value_dim rows of a head.

    Attributes:
      weight: `[heads, d, rank]`.
      lora_a, lora_b: `[r, rank]` and s B `[heads, d, r]`, or None.
      row_factors: fp32 `[heads, d]` that DoRA scales rows by, or None.
    """

    weight: jax.Array
    lora_a: jax.Array | None
    lora_b: jax.Array | None
    row_factors: jax.Array | None


def _expansion(linear: Linear, x: jax.Array, config: DecoderConfig) -> _Expansion:
    """In the dtype of x, dequantised when x is there and not before: no loop over tokens keeps the matrix."""
    weight = linear.weight.get_value()
    if hasattr(weight, "dequantize"):
        weight, x = jax.lax.optimization_barrier((weight, x))
    matrix = dense(weight, x.dtype)
    by_head = (config.num_heads, -1)
    a, b = linear.adapter()
    if a is None:
        return _Expansion(matrix.reshape(*by_head, matrix.shape[-1]), None, None, None)
    factors, magnitude = None, value_or_none(linear.lora_magnitude_vector)
    if magnitude is not None:
        lengths = row_norms(matrix, a.astype(x.dtype), b.astype(x.dtype), linear.lora_scale)
        factors = (magnitude.astype(jnp.float32) / lengths).reshape(by_head)
    b = (linear.lora_scale * b).astype(x.dtype).reshape(*by_head, b.shape[-1])
    return _Expansion(matrix.reshape(*by_head, matrix.shape[-1]), a.astype(x.dtype), b, factors)


def _absorbed(expansion: _Expansion, q: jax.Array, value_dim: int) -> jax.Array:
    """W_kᵀ q, `[batch, tokens, heads, content_dim]` -> `[.., rank]`."""
    # The rows of values meet zeros: a part of every head's rows would be a copy of the matrix.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, value_dim)))
    if expansion.row_factors is not None:
        q = (q.astype(jnp.float32) * expansion.row_factors).astype(q.dtype)
    y = jnp.einsum("bthd,hdk->bthk", q, expansion.weight)
    if expansion.lora_a is not None:
        low = jnp.einsum("bthd,hdr->bthr", q, expansion.lora_b)
        y += jnp.einsum("bthr,rk->bthk", low, expansion.lora_a)
    return y


def _expanded(expansion: _Expansion, x: jax.Array) -> jax.Array:
    """W x of every head, `[batch, tokens, heads, rank]` -> `[.., content_dim + value_dim]`."""
    y = jnp.einsum("bthk,hdk->bthd", x, expansion.weight)
    if expansion.lora_a is not None:
        low = jnp.einsum("bthk,rk->bthr", x, expansion.lora_a)
        y += jnp.einsum("bthr,hdr->bthd", low, expansion.lora_b)
    if expansion.row_factors is not None:
        y = (y.astype(jnp.float32) * expansion.row_factors).astype(y.dtype)
    return y
