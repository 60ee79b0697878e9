"""Queries, keys and values of a delta net: a convolution of a few tokens, silu, and q and k of length one, in one pass.

With x `[batch, seq, features]`, weights `[features, width]`, and x of other segments and in front of the row zero,

    c_t = Σ_i weights[:, width − 1 − i] x_{t−i},    m = silu(c) = c σ(c)
    q = m_q / |m_q|,    k = m_k / |m_k|,    v = m_v        |m|² = Σ m² + ε of a head

c and m are rounded to the dtype of x, all else is fp32. Backward, with r = 1 / |m| and y = r m of q and k:

    dm = r (dy − y (y·dy)),    dc = dm σ(c) (1 + c (1 − σ(c))),    dx_t = Σ_i weights[:, width − 1 − i] dc_{t+i}

one kernel up to dc, which is rounded, and one for dx; XLA's sum over tokens for the weights', where it is asked for.

Saved: x, the weights and the segments.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.pallas_kernels import launch

TOKENS = 64  # a program, of one head
WARPS = 8


def fits(key_dim: int, value_dim: int) -> bool:
    """Whether the kernels take heads of these sizes."""
    return key_dim == value_dim and key_dim == launch.next_power_of_2(key_dim)


def convolved_heads(
    x: jax.Array,
    weight: jax.Array,
    *,
    key_heads: int,
    dim: int,
    eps: float,
    segment_ids: jax.Array | None = None,
    implementation: launch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q, k, v) of a convolution's inputs.

    Args:
      x: [batch, seq, (2 key_heads + value_heads) dim], of q, of k and of v; bf16, fp16 or fp32.
      weight: [the same features, width], the token itself last.
      key_heads: heads of q, and of k.
      dim: of every head; kernels take those of `fits`.
      eps: ε, added to the squared length.
      segment_ids: int [batch, seq]; a token sees those of its own id. None: each row is one segment.
      implementation: "pallas", "xla" or None for the platform's default.

    Returns:
      [batch, seq, key_heads, dim] twice and [batch, seq, value_heads, dim], in the dtype of x.
    """
    if launch.resolve(implementation) == "xla" or x.size == 0:
        sizes: dict[str, Any] = {"key_heads": key_heads, "dim": dim, "eps": eps}
        return convolved_heads_reference(x, weight, **sizes, segment_ids=segment_ids)
    segmented = segment_ids is not None
    ids = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    # By taps, so that neighbouring threads read neighbouring weights.
    return _convolved_heads(key_heads, dim, eps, segmented, x, weight.T, ids)


def convolved_heads_reference(
    x: jax.Array,
    weight: jax.Array,
    *,
    key_heads: int,
    dim: int,
    eps: float,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The oracle of `convolved_heads`: one tap after the other, in plain jax.numpy."""
    seq, width = x.shape[1], weight.shape[1]
    total = jnp.zeros(x.shape, jnp.float32)
    for ago in range(width):
        tap = jnp.pad(x, ((0, 0), (ago, 0), (0, 0)))[:, :seq]
        if segment_ids is not None:
            earlier = jnp.pad(segment_ids, ((0, 0), (ago, 0)), constant_values=-1)[:, :seq]
            tap = jnp.where((earlier == segment_ids)[..., None], tap, 0)
        total += tap.astype(jnp.float32) * weight[:, width - 1 - ago].astype(jnp.float32)
    mixed = jax.nn.silu(total.astype(x.dtype).astype(jnp.float32)).astype(x.dtype).astype(jnp.float32)
    q, k, v = jnp.split(mixed.reshape(*x.shape[:2], -1, dim), (key_heads, 2 * key_heads), axis=2)
    q, k = (y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + eps) for y in (q, k))
    return q.astype(x.dtype), k.astype(x.dtype), v.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _convolved_heads(key_heads, dim, eps, segmented, x, weight, ids):
    def heads(first, count, *, unit):
        (out,) = _launch(
            functools.partial(_forward_kernel, segmented=segmented, eps=eps if unit else None),
            "convolved_heads",
            (_columns(x, dim, first), _weights(weight, dim, first), _ids(ids)),
            (_heads((*x.shape[:2], count, dim), x.dtype),),
        )
        return out

    return tuple(heads(first, count, unit=unit) for first, count, unit in _parts(x, key_heads, dim))


def _forward(key_heads, dim, eps, segmented, x, weight, ids):
    return _convolved_heads(key_heads, dim, eps, segmented, x, weight, ids), (x, weight, ids)


def _backward(key_heads, dim, eps, segmented, saved, gradients):
    x, weight, ids = saved
    parts = _parts(x, key_heads, dim)

    def of_sums(first, unit, gradient):
        (out,) = _launch(
            functools.partial(_backward_kernel, segmented=segmented, eps=eps if unit else None),
            "convolved_heads_backward",
            (
                _columns(x, dim, first),
                _weights(weight, dim, first),
                _ids(ids),
                _heads(gradient.shape, gradient.dtype, gradient),
            ),
            (_columns(jax.ShapeDtypeStruct((*x.shape[:2], gradient.shape[2] * dim), x.dtype), dim, 0),),
        )
        return out

    d_sums = [of_sums(first, unit, d) for (first, _, unit), d in zip(parts, gradients, strict=True)]
    starts = tuple((first, count) for first, count, _ in parts)
    (dx,) = _launch(
        functools.partial(_taps_kernel, segmented=segmented, parts=starts),
        "convolution_backward",
        (
            _weights(weight, dim, 0),
            _ids(ids),
            *(_columns(d, dim, -first, count) for d, (first, count) in zip(d_sums, starts, strict=True)),
        ),
        (_columns(jax.ShapeDtypeStruct(x.shape, x.dtype), dim, 0),),
    )
    return dx, _weight_gradient(x, weight, ids, jnp.concatenate(d_sums, axis=-1)), None


_convolved_heads.defvjp(_forward, _backward)


def _parts(x, key_heads, dim):
    """(first head, heads, whether of length one) of q, k and v."""
    values = x.shape[2] // dim - 2 * key_heads
    return (0, key_heads, True), (key_heads, key_heads, True), (2 * key_heads, values, False)


def _weight_gradient(x, weight, ids, d_sums):
    """Σ_t dc_t x_{t−i}, [width, features]."""
    width, seq = weight.shape[0], x.shape[1]

    def of_tap(ago):
        same = (ids[:, ago:] == ids[:, : seq - ago])[..., None]
        pairs = d_sums[:, ago:].astype(jnp.float32) * x[:, : seq - ago].astype(jnp.float32)
        return jnp.sum(jnp.where(same, pairs, 0.0), axis=(0, 1))

    taps = [of_tap(min(ago, seq)) for ago in range(width - 1, -1, -1)]
    return jnp.stack(taps).astype(weight.dtype)


def _columns(x: Any, dim: int, first: int, count: int | None = None) -> tuple[pl.BlockSpec, Any]:
    """All tokens of a program's head in [batch, seq, features]; head 0 of the launch is the array's `first`. With
    `count` heads in the array, programs of others see one of these and leave it alone."""

    def place(h, t, b):
        head = h + first
        return b, 0, head if count is None else jnp.clip(head, 0, count - 1)

    return pl.BlockSpec((None, x.shape[1], dim), place), x


def _heads(shape: tuple[int, ...], dtype: Any, x: Any = None) -> tuple[pl.BlockSpec, Any]:
    """All tokens of a program's head in [batch, seq, heads, dim]; without x, an output."""
    spec = pl.BlockSpec((None, shape[1], None, shape[3]), lambda h, t, b: (b, 0, h, 0))
    return spec, jax.ShapeDtypeStruct(shape, dtype) if x is None else x


def _weights(weight: jax.Array, dim: int, first: int) -> tuple[pl.BlockSpec, Any]:
    return pl.BlockSpec((weight.shape[0], dim), lambda h, t, b: (0, h + first)), weight


def _ids(ids: jax.Array) -> tuple[pl.BlockSpec, Any]:
    return pl.BlockSpec((None, ids.shape[1]), lambda h, t, b: (b, 0)), ids


def _launch(kernel: Any, name: str, inputs: tuple, outputs: tuple) -> Any:
    """One program for every head of the output, `TOKENS` tokens and row."""
    (spec, out), *_ = outputs
    heads = out.shape[2] if len(out.shape) == 4 else out.shape[2] // spec.block_shape[-1]
    return launch.pallas_call(
        kernel,
        name=name,
        grid=(heads, launch.cdiv(out.shape[1], TOKENS), out.shape[0]),
        in_specs=[spec for spec, _ in inputs],
        out_specs=[spec for spec, _ in outputs],
        out_shape=[array for _, array in outputs],
        num_warps=WARPS,
    )(*(array for _, array in inputs))


def _here() -> jax.Array:
    return pl.program_id(1) * TOKENS + jnp.arange(TOKENS)


def _tile(ref, tokens) -> tuple[Any, Any]:
    """(where in ref [seq, dim], which of it is there)."""
    mask = (tokens >= 0) & (tokens < ref.shape[0])
    return ref.at[tokens[:, None], jnp.arange(ref.shape[1])[None, :]], mask[:, None]


def _load(ref, here, ids_ref, away: int, *, segmented: bool) -> jax.Array:
    """The tokens of ref [seq, dim] that are `away` from `here`, fp32; zero where there is none, or one of another
    segment."""
    view, mask = _tile(ref, here + away)
    if segmented and away:
        mask &= (_load_ids(ids_ref, here + away) == _load_ids(ids_ref, here))[:, None]
    shape = (here.shape[0], ref.shape[1])
    return triton.load(view, mask=jnp.broadcast_to(mask, shape), other=0.0).astype(jnp.float32)


def _load_ids(ids_ref, tokens) -> jax.Array:
    return triton.load(ids_ref.at[tokens], mask=(tokens >= 0) & (tokens < ids_ref.shape[0]), other=-1)


def _store(ref, here, value) -> None:
    view, mask = _tile(ref, here)
    triton.store(view, value.astype(ref.dtype), mask=jnp.broadcast_to(mask, value.shape))


def _over_taps(ref, here, weight_ref, ids_ref, direction: int, *, segmented: bool) -> jax.Array:
    """Σ_i weights[width − 1 − i] ref[t + direction i], fp32 [TOKENS, dim]."""
    width = weight_ref.shape[0]
    total = jnp.zeros((TOKENS, ref.shape[1]), jnp.float32)
    for i in range(width):
        tap = _load(ref, here, ids_ref, direction * i, segmented=segmented)
        total += weight_ref[width - 1 - i, :].astype(jnp.float32)[None, :] * tap
    return total


def _activated(x_ref, here, weight_ref, ids_ref, *, segmented):
    """(c, σ(c), m) as they are rounded, fp32."""
    sums = _over_taps(x_ref, here, weight_ref, ids_ref, -1, segmented=segmented)
    sums = sums.astype(x_ref.dtype).astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(sums)
    return sums, sigmoid, (sums * sigmoid).astype(x_ref.dtype).astype(jnp.float32)


def _inverse_length(mixed: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.sum(mixed * mixed, axis=1) + eps)[:, None]


def _forward_kernel(x_ref, weight_ref, ids_ref, out_ref, *, segmented, eps):
    here = _here()
    _, _, mixed = _activated(x_ref, here, weight_ref, ids_ref, segmented=segmented)
    _store(out_ref, here, mixed if eps is None else mixed * _inverse_length(mixed, eps))


def _backward_kernel(x_ref, weight_ref, ids_ref, gradient_ref, d_sums_ref, *, segmented, eps):
    here = _here()
    sums, sigmoid, mixed = _activated(x_ref, here, weight_ref, ids_ref, segmented=segmented)
    d_mixed = _load(gradient_ref, here, ids_ref, 0, segmented=False)
    if eps is not None:
        inverse = _inverse_length(mixed, eps)
        unit = inverse * mixed
        along = jnp.sum(unit * d_mixed, axis=1)[:, None]
        d_mixed = inverse * (d_mixed - unit * along)
    _store(d_sums_ref, here, d_mixed * sigmoid * (1.0 + sums * (1.0 - sigmoid)))


def _taps_kernel(weight_ref, ids_ref, *refs, segmented, parts):
    *parts_refs, dx_ref = refs
    head, here = pl.program_id(0), _here()
    for ref, (first, count) in zip(parts_refs, parts, strict=True):

        @pl.when((head >= first) & (head < first + count))
        def _(ref=ref):
            _store(dx_ref, here, _over_taps(ref, here, weight_ref, ids_ref, 1, segmented=segmented))
