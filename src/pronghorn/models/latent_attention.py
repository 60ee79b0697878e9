"""Multi-head latent attention: what a layer of it computes (`LatentConfig` has the formula).

Saved: the layer's input, W_qa n (or W_q n) and W_kva n, attention's output and logsumexp. Queries, keys and values of
all heads are expanded again in the backward pass, out of the two latent vectors: for DeepSeek-V3 2,112 numbers a token
and layer are kept in the place of 73,728.

Values of a head are narrower than queries and keys (or wider), and attention takes heads of one size. The smaller are
padded with zeros and the output is cut, which changes no number: a zero adds nothing to q kᵀ, and columns of zeros in v
are columns of zeros in the output. The cost, for 128 dims of values beside 192: half as much again for the product with
v and its gradients, and an output that is kept padded for attention's own backward pass.

Decoding keeps the latent vectors and attends over them (`models/latent_decoding.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pronghorn.models.config import DecoderConfig
from pronghorn.models.layers import DecoderLayer, LatentAttention
from pronghorn.models.memory_policies import LATENTS, POLICIES
from pronghorn.models.projections import normalized_linears
from pronghorn.pallas_kernels.flash_attention import flash_attention
from pronghorn.pallas_kernels.rope import apply_rope


def project_latents(
    layer: DecoderLayer, x: jax.Array, *, config: DecoderConfig, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The stream `[batch, seq, d]` -> itself, to be read on from, W_qa n `[.., query_rank]` (or W_q n
    `[.., heads head_dim]`) and W_kva n `[.., rank + position_dim]`."""
    latent = config.latent
    assert latent is not None
    names = ("q_a_proj" if latent.query_rank else "q_proj", "kv_a_proj_with_mqa")
    x, (of_q, of_kv) = normalized_linears(layer.input_layernorm, layer.self_attn, names, x, dropout_key)
    return x, checkpoint_name(of_q, LATENTS), checkpoint_name(of_kv, LATENTS)


def expand_latents(
    attention: LatentAttention,
    of_q: jax.Array,
    of_kv: jax.Array,
    angles: tuple[Any, Any],
    *,
    config: DecoderConfig,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys `[batch, seq, heads, head_dim]`, their dims of positions first and these in halves, and values
    `[batch, seq, heads, value_dim]`, from what `project_latents` gives.

    Args:
      angles: cos and sin, fp32 `[batch, seq, position_dim / 2]`, that the dims of positions are rotated by; or two
        Nones.
    """
    latent = config.latent
    assert latent is not None
    q_position, q_content = latent_queries(attention, of_q, config=config, dropout_key=dropout_key)
    compressed, k_position = jnp.split(of_kv, (latent.rank,), axis=-1)
    norm = attention.kv_a_layernorm
    _, (expanded,) = normalized_linears(norm, attention, ("kv_b_proj",), compressed, dropout_key)
    expanded = expanded.reshape(*expanded.shape[:2], config.num_heads, -1)
    k_content, v = jnp.split(expanded, (latent.content_dim,), axis=-1)
    k_position = k_position[:, :, None]
    if config.rope_interleaved:
        k_position = halves(k_position)
    cos, sin = angles
    if cos is not None:
        q_position, k_position = apply_rope(q_position, k_position, cos, sin)
    k_position = jnp.broadcast_to(k_position, q_position.shape)
    q = jnp.concatenate([q_position, q_content], axis=-1)
    return q, jnp.concatenate([k_position, k_content], axis=-1), v


def latent_queries(
    attention: LatentAttention,
    of_q: jax.Array,
    *,
    config: DecoderConfig,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Queries from what `project_latents` gives: their dims of positions `[batch, seq, heads, position_dim]`, in halves
    and not rotated, and of contents `[.., content_dim]`."""
    latent = config.latent
    assert latent is not None
    if latent.query_rank:
        _, (of_q,) = normalized_linears(attention.q_a_layernorm, attention, ("q_b_proj",), of_q, dropout_key)
    q = of_q.reshape(*of_q.shape[:2], config.num_heads, config.head_dim)
    content, position = jnp.split(q, (latent.content_dim,), axis=-1)
    return halves(position) if config.rope_interleaved else position, content


def halves(x: jax.Array) -> jax.Array:
    """Neighbouring pairs of the last axis to two halves, the order that our rope takes.

    It is never undone: what follows rope is q kᵀ, which is the same for any one order of the dims of both.
    """
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    return jnp.swapaxes(pairs, -1, -2).reshape(x.shape)


def latent_heads(
    layer: DecoderLayer,
    x: jax.Array,
    angles: tuple[Any, Any],
    segment_ids: jax.Array | None,
    *,
    config: DecoderConfig,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(the stream to be read on from, attention's output `[batch, seq, heads, value_dim]`), for the stream
    `[batch, seq, d]`."""
    latent = config.latent
    assert latent is not None
    widest = max(config.head_dim, latent.value_dim)
    x, of_q, of_kv = project_latents(layer, x, config=config, dropout_key=dropout_key)

    def attend(of_q, of_kv):
        q, k, v = expand_latents(layer.self_attn, of_q, of_kv, angles, config=config, dropout_key=dropout_key)
        q, k, v = (_padded(heads, widest) for heads in (q, k, v))
        heads = flash_attention(q, k, v, segment_ids=segment_ids, scale=config.attention_multiplier)
        return heads[..., : latent.value_dim]

    # Attention's output and logsumexp are kept, so that its kernel does not run again.
    kept = POLICIES["attention"].saveable
    return x, jax.checkpoint(attend, policy=kept)(of_q, of_kv)


def _padded(heads: jax.Array, width: int) -> jax.Array:
    missing = width - heads.shape[-1]
    return heads if not missing else jnp.pad(heads, ((0, 0), (0, 0), (0, 0), (0, missing)))
