"""Rotary position embedding of queries and keys, both in one launch.

The first R of D dimensions are rotated in the rotate-half convention of Hugging Face: dimension i pairs with i + R/2,
and with c = cos(position · frequency_i), s = sin(position · frequency_i)

    y[i]       = x[i] c − x[i + R/2] s
    y[i + R/2] = x[i + R/2] c + x[i] s          i < R/2
    y[j]       = x[j]                           j >= R

Backward is the rotation by −θ: the same kernel with −s. Saved: cos and sin, nothing else. The products are fp32,
rounded once.

Source: Su et al., RoFormer, 2021, section 3.2, https://arxiv.org/abs/2104.09864; partial rotation as in GPT-NeoX.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch, tuned

# What `tuned` may replace: pairs of values a program (at least one whole token, more where tokens are small), pairs a
# thread.
BLOCK = (4096, 32)
MOST_TOKENS = 16


def apply_rope(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    implementation: launch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Rotate queries and keys by their positions.

    Args:
      q: [batch, seq, heads, head_dim]; bf16, fp16 or fp32.
      k: [batch, seq, kv_heads, head_dim], the dtype of q.
      cos, sin: [batch, seq, R/2] fp32, with any attention scaling already in them; a batch of 1 serves every row.
        They are data: no gradient reaches them.
      implementation: "pallas", "xla" or None for the platform's default.

    Returns:
      (q, k) rotated, in their shapes and dtypes.

    Raises:
      InputError: when the angles do not fit the tokens, or rotate more dimensions than a head has.
    """
    _check_shapes(q, k, cos, sin)
    cos, sin = jax.lax.stop_gradient(cos), jax.lax.stop_gradient(sin)
    if launch.resolve(implementation) == "xla" or q.size == 0:
        return apply_rope_reference(q, k, cos, sin)
    angles = (*q.shape[:2], cos.shape[-1])
    return _apply_rope(q, k, jnp.broadcast_to(cos, angles), jnp.broadcast_to(sin, angles))


def _check_shapes(q, k, cos, sin):
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise InputError(
            f"apply_rope: q {q.shape} and k {k.shape} must be [batch, seq, heads, head_dim], alike but for the heads."
        )
    if (
        cos.shape != sin.shape
        or cos.ndim != 3
        or cos.shape[0] not in (1, q.shape[0])
        or cos.shape[1] != q.shape[1]
    ):
        raise InputError(
            f"apply_rope: cos {cos.shape} and sin {sin.shape} must be [batch, seq, rotated / 2] for q {q.shape}."
        )
    if 2 * cos.shape[2] > q.shape[3]:
        raise InputError(
            f"apply_rope: cos has {cos.shape[2]} angles, too many for a head of {q.shape[3]} dimensions; "
            "pass at most head_dim / 2."
        )


def apply_rope_reference(
    q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The oracle of `apply_rope`, in plain jax.numpy."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]

    def rotate(x):
        x32 = x.astype(jnp.float32)
        first, second, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
        rotated = [first * cos - second * sin, second * cos + first * sin, rest]
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)

    return rotate(q), rotate(k)


def _kernel(q_ref, k_ref, cos_ref, sin_ref, q_out_ref, k_out_ref, *, tokens_per_block, inverse):
    tokens = pl.program_id(0) * tokens_per_block + jnp.arange(tokens_per_block)
    half = cos_ref.shape[1]
    pairs = jnp.arange(launch.next_power_of_2(half))
    angle = (tokens[:, None], pairs[None, :])
    angle_mask = launch.in_bounds(cos_ref.shape, *angle)
    cos = triton.load(cos_ref.at[angle], mask=angle_mask, other=0.0)[:, None, :]
    sin = triton.load(sin_ref.at[angle], mask=angle_mask, other=0.0)[:, None, :]
    if inverse:
        sin = -sin

    for x_ref, out_ref in ((q_ref, q_out_ref), (k_ref, k_out_ref)):
        num_tokens, num_heads, head_dim = x_ref.shape
        heads = jnp.arange(launch.next_power_of_2(num_heads))[None, :, None]
        first = (tokens[:, None, None], heads, pairs[None, None, :])
        second = (tokens[:, None, None], heads, half + pairs[None, None, :])
        # One mask for both halves, of the pairs: the second half of what lies past them may be another dimension.
        mask = launch.in_bounds((num_tokens, num_heads, half), *first)
        x1 = triton.load(x_ref.at[first], mask=mask, other=0.0).astype(jnp.float32)
        x2 = triton.load(x_ref.at[second], mask=mask, other=0.0).astype(jnp.float32)
        triton.store(out_ref.at[first], (x1 * cos - x2 * sin).astype(out_ref.dtype), mask=mask)
        triton.store(out_ref.at[second], (x2 * cos + x1 * sin).astype(out_ref.dtype), mask=mask)
        if head_dim > 2 * half:
            columns = 2 * half + jnp.arange(launch.next_power_of_2(head_dim - 2 * half))
            rest = (tokens[:, None, None], heads, columns[None, None, :])
            rest_mask = launch.in_bounds(x_ref.shape, *rest)
            copied = triton.load(x_ref.at[rest], mask=rest_mask, other=0.0)
            triton.store(out_ref.at[rest], copied, mask=rest_mask)


def _rotate(q, k, cos, sin, *, inverse):
    batch, seq, num_heads, head_dim = q.shape
    tokens, num_kv_heads, half = batch * seq, k.shape[2], cos.shape[-1]
    pairs = launch.next_power_of_2(max(num_heads, num_kv_heads)) * launch.next_power_of_2(half)
    most_pairs, per_thread = tuned.choice("rope", q.dtype, pairs) or BLOCK
    tokens_per_block = min(max(1, most_pairs // pairs), MOST_TOKENS, launch.next_power_of_2(tokens))
    q_out, k_out = launch.pallas_call(
        functools.partial(_kernel, tokens_per_block=tokens_per_block, inverse=inverse),
        name="rope_inverse" if inverse else "rope",
        grid=(launch.cdiv(tokens, tokens_per_block),),
        out_shape=(
            jax.ShapeDtypeStruct((tokens, num_heads, head_dim), q.dtype),
            jax.ShapeDtypeStruct((tokens, num_kv_heads, head_dim), k.dtype),
        ),
        num_warps=launch.warps_for(tokens_per_block * pairs, per_thread=per_thread),
    )(
        q.reshape(tokens, num_heads, head_dim),
        k.reshape(tokens, num_kv_heads, head_dim),
        cos.reshape(tokens, half).astype(jnp.float32),
        sin.reshape(tokens, half).astype(jnp.float32),
    )
    return q_out.reshape(q.shape), k_out.reshape(k.shape)


@jax.custom_vjp
def _apply_rope(q, k, cos, sin):
    return _rotate(q, k, cos, sin, inverse=False)


def _apply_rope_forward(q, k, cos, sin):
    return _rotate(q, k, cos, sin, inverse=False), (cos, sin)


def _apply_rope_backward(angles, gradients):
    dq, dk = _rotate(*gradients, *angles, inverse=True)
    return dq, dk, None, None


_apply_rope.defvjp(_apply_rope_forward, _apply_rope_backward)
