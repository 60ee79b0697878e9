"""Causal attention for training: o_t = Σ_k softmax_k(s_t)·v_k, s_tk = scale q_t·k_k, over the keys that t sees.

Grouped heads, packed segments, a sliding window, a soft cap on the logits and learned attention sinks; any length.
Forward and backward walk blocks and never hold a [seq, seq] array; backward saves q, k, v, o and the logsumexp and
recomputes the probabilities (formulas in flash_attention_kernels). Segments and windows are two integers a row
(attention_bounds), so packing costs no mask and skips whole blocks. Source: Dao, FlashAttention-2, arXiv:2307.08691;
sinks as in gpt-oss (one logit per head in the denominator), soft cap as in Gemma 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import flash_attention_kernels as kernels
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.attention_blocks import AttentionBlocks, attention_blocks, smallest_fits
from pronghorn.pallas_kernels.attention_bounds import interval_bounds
from pronghorn.pallas_kernels.attention_tiles import LOG2_E, AttentionSpec
from pronghorn.pallas_kernels.cudnn_attention import FORWARD_PRIMITIVES, cudnn_attention, unsupported_reason
from pronghorn.pallas_kernels.tuned import device_kind_and_capability

MAX_KERNEL_HEAD_DIM = 512
# What the gradient saves, by the name a memory policy knows it under.
RESIDUAL_NAMES = ("attention_q", "attention_k", "attention_v", "attention_out", "attention_logsumexp")


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    blocks: AttentionBlocks | None = None,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """Causal attention.

    Args:
      q: [batch, seq, heads, head_dim], bf16, fp16 or fp32.
      k, v: [batch, seq, kv_heads, head_dim] in q's dtype; query head h reads kv head h // (heads // kv_heads).
      segment_ids: integers [batch, seq], or None. A segment is a run of equal ids, and a token sees its own only.
      sliding_window: a token sees itself and the sliding_window - 1 tokens before it.
      softcap: logits become softcap * tanh(logits / softcap), after the scale.
      sinks: [heads], a learned logit per head that takes its share of every softmax and adds no value. It is neither
        scaled nor capped.
      scale: factor of q·k, positive; head_dim**-0.5 by default.
      blocks: block sizes of the Pallas kernels, for a tuner; chosen by device, dtype and head_dim by default.
      implementation: "xla" (the oracle, quadratic memory), "pallas" or "cudnn"; by default see
        `default_implementation`.

    Returns:
      [batch, seq, heads, head_dim] in q's dtype; logits, softmax and sums are fp32.

    Raises:
      InputError: for shapes or options that make no attention, and for an implementation that lacks them.
    """
    _check(q, k, v, segment_ids, sliding_window, softcap, sinks, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if sliding_window is not None and sliding_window >= q.shape[1]:
        sliding_window = None  # every token already sees the whole past
    chosen = _resolve(implementation, q, segment_ids=segment_ids, softcap=softcap, sinks=sinks)
    if chosen == "xla":
        return flash_attention_reference(
            q,
            k,
            v,
            segment_ids=segment_ids,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            scale=scale,
        )
    if chosen == "cudnn":
        q, k, v = _named(q, k, v)
        return cudnn_attention(q, k, v, scale=scale, sliding_window=sliding_window)
    if blocks is None:
        blocks = attention_blocks(q.shape[3], q.dtype, q.shape[1])
    window = sliding_window if segment_ids is None else None  # else it goes into the bounds
    spec = AttentionSpec(scale, softcap, window, blocks, native=not launch.interpreting())
    k_start, q_end = (None, None) if segment_ids is None else interval_bounds(segment_ids, sliding_window)
    return _attention(spec, q, k, v, sinks, k_start, q_end)


def default_implementation(
    q: jax.Array, *, segment_ids: jax.Array | None, softcap: float | None, sinks: jax.Array | None
) -> str:
    """The fastest implementation measured on a GPU that supports the call.

    One H100, jax 0.11.2, bf16, causal, batch 2, seq 4096, 32 heads (8 kv heads), head_dim 128: cuDNN 530 TFLOP/s
    forward and 399 backward, our kernels 464 and 388. So cuDNN where it supports the call. But for many heads of 64 in
    short rows, forward and backward: 32 heads, 4 rows of 2048 in 748 us against cuDNN's 837, 2 of 512 in 66 against 88,
    1 of 512 in 49 against 61 (one row of 4096: 850 against 741; 9 heads, 4 rows of 2048: 310 against 287).
    """
    _, seq, num_heads, head_dim = q.shape
    many_in_short_rows = head_dim == 64 and seq <= 2048 and num_heads >= 32
    with_kernels = _kernels_unsupported_reason(q) is None
    with_cudnn = unsupported_reason(q, segment_ids=segment_ids, softcap=softcap, sinks=sinks) is None
    if with_cudnn and not (with_kernels and many_in_short_rows):
        return "cudnn"
    return "pallas" if with_kernels else "xla"


def attention_saveable(primitive, *_, **parameters) -> bool:
    """A policy for `jax.checkpoint` that saves attention's residuals, so that its forward is not run again.

    Whichever implementation runs: ours by `RESIDUAL_NAMES`, cuDNN's o and logsumexp by its primitive.
    """
    return (
        parameters.get("name") in RESIDUAL_NAMES
        if primitive.name == "name"
        else primitive.name in FORWARD_PRIMITIVES
    )


def _kernels_unsupported_reason(q: jax.Array) -> str | None:
    capability = device_kind_and_capability()[1]
    if int(capability.split(".")[0]) < 8:
        return f"XLA compiles Triton kernels from compute capability 8.0 on, and this GPU has {capability}"
    if q.shape[3] > MAX_KERNEL_HEAD_DIM:
        return f"head dim {q.shape[3]} is over {MAX_KERNEL_HEAD_DIM}"
    if not smallest_fits(q.shape[3], q.dtype, capability):
        return f"head dim {q.shape[3]} in {q.dtype} takes more shared memory than this GPU has"
    return None


def _resolve(implementation: str | None, q: jax.Array, **options) -> str:
    reasons = {
        "cudnn": unsupported_reason(q, **options),
        "pallas": _kernels_unsupported_reason(q),
        "xla": None,
    }
    available = [name for name, reason in reasons.items() if reason is None]
    if implementation in reasons and implementation not in available:
        raise InputError(
            f"implementation={implementation!r}: {reasons[implementation]}; leave it out, or use one of "
            f"{', '.join(available)}."
        )
    return launch.resolve(
        implementation, default_gpu=default_implementation(q, **options), available=available
    )


def _check(q, k, v, segment_ids, sliding_window, softcap, sinks, scale) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3:] != q.shape[3:]:
        raise InputError(
            f"flash_attention: q {q.shape}, k {k.shape}, v {v.shape} must be [batch, seq, heads, head_dim] and twice "
            "[batch, seq, kv_heads, head_dim]."
        )
    if q.shape[2] % k.shape[2]:
        raise InputError(
            f"flash_attention: {q.shape[2]} heads cannot share {k.shape[2]} kv heads; use a multiple."
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise InputError(
            f"flash_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one of bfloat16, float16, "
            "float32."
        )
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise InputError(
            f"flash_attention: segment_ids {segment_ids.shape} must be [batch, seq] = {q.shape[:2]}."
        )
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise InputError(f"flash_attention: sinks {sinks.shape} must be [heads] = {q.shape[2:3]}.")
    if sliding_window is not None and sliding_window < 1:
        raise InputError(
            f"flash_attention: sliding_window={sliding_window} must be at least 1, the token itself."
        )
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is not None and not value > 0:
            raise InputError(
                f"flash_attention: {name}={value} must be positive; leave it out for the default."
            )


def flash_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """The oracle of `flash_attention`: the whole [seq, seq] softmax in fp32."""
    batch, seq_len, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    grouped = q.astype(jnp.float32).reshape(batch, seq_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    logits = scale * exact("btkgd,bskd->bkgts", grouped, k.astype(jnp.float32))
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)

    t, s = jnp.arange(seq_len)[:, None], jnp.arange(seq_len)[None, :]
    visible = (s <= t)[None]
    if sliding_window is not None:
        visible = visible & (t - s < sliding_window)
    if segment_ids is not None:
        changes = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        run = jnp.cumsum(changes, axis=1)
        visible = visible & (run[:, :, None] == run[:, None, :])
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)

    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, num_kv_heads, num_heads // num_kv_heads, 1, 1)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sink, (*logits.shape[:-1], 1))], axis=-1)
    probabilities = jax.nn.softmax(logits, axis=-1)[..., :seq_len]
    out = exact("bkgts,bskd->btkgd", probabilities, v.astype(jnp.float32))
    return out.reshape(q.shape).astype(q.dtype)


# ---- gradient ----


def _named(*tensors: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(checkpoint_name(x, name) for x, name in zip(tensors, RESIDUAL_NAMES, strict=False))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: AttentionSpec, q, k, v, sinks, k_start, q_end) -> jax.Array:
    return kernels.forward(q, k, v, k_start, sinks, spec)[0]


def _attention_forward(spec: AttentionSpec, q, k, v, sinks, k_start, q_end):
    out, logsumexp = kernels.forward(q, k, v, k_start, sinks, spec)
    # Named here and not by the caller: a name on the op's output would not keep the kernel from running again.
    q, k, v, out, logsumexp = _named(q, k, v, out, logsumexp)
    return out, (q, k, v, sinks, k_start, q_end, out, logsumexp)


def _attention_backward(spec: AttentionSpec, saved, do):
    # Two launches: dk and dv that nobody asks for are dead code and are dropped. The first also computes
    # delta_t = o_t · do_t, since it holds do.
    q, k, v, sinks, k_start, q_end, out, logsumexp = saved
    do = do.astype(q.dtype)
    dq, delta = kernels.backward_dq(q, k, v, out, do, logsumexp, k_start, spec)
    dk, dv = kernels.backward_dkdv(q, k, v, do, logsumexp, delta, q_end, spec)
    dsinks = None
    if sinks is not None:
        share = jnp.exp2(sinks.astype(jnp.float32)[None, :, None] * LOG2_E - logsumexp)
        dsinks = -jnp.sum(share * delta, axis=(0, 2)).astype(sinks.dtype)
    return dq, dk, dv, dsinks, None, None


_attention.defvjp(_attention_forward, _attention_backward)
