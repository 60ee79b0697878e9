"""Attention through cuDNN, by way of `jax.nn.dot_product_attention`: what it supports, and the call.

cuDNN has causal attention, grouped heads and a left window in fp16 and bf16. It has no softcap and no sinks, and packed
rows only through private API of jax (wrong with grouped heads on 0.10.2): those calls are the Pallas kernels'.
"""

import jax
import jax.numpy as jnp

from pronghorn.pallas_kernels.launch import on_gpu
from pronghorn.pallas_kernels.tuned import device_kind_and_capability

# The primitive whose outputs are cuDNN's o and logsumexp. `checkpoint_name` cannot reach inside jax's own gradient
# rule, so a memory policy that saves attention has to recognise it by name (see `attention_saveable`).
FORWARD_PRIMITIVES = ("dot_product_attention_fwd_wrapper", "dot_product_attention_fwd")


def unsupported_reason(
    q: jax.Array,
    *,
    segment_ids: jax.Array | None,
    softcap: float | None,
    sinks: jax.Array | None,
) -> str | None:
    """Why cuDNN cannot compute this call on this machine, or None where it can."""
    if not on_gpu():
        return "there is no NVIDIA GPU here"
    major = int(device_kind_and_capability()[1].split(".")[0])
    largest = 256 if major >= 9 else 128
    if major < 8:
        return "cuDNN's flash attention needs compute capability 8.0"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's flash attention takes bfloat16 and float16, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > largest:
        return f"cuDNN's flash attention takes head dims that are multiples of 8 up to {largest}, not {q.shape[3]}"
    if q.shape[1] % 2:
        # jax checks this for a bias, and passes an empty one where there is none.
        return f"jax refuses the gradient of cuDNN's flash attention for an odd sequence length, {q.shape[1]}"
    for name, value in (("segment_ids", segment_ids), ("softcap", softcap), ("sinks", sinks)):
        if value is not None:
            return f"cuDNN's flash attention has no {name}"
    return None


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, sliding_window: int | None
) -> jax.Array:
    """Causal attention through cuDNN; shapes as in `flash_attention`."""
    # The window's left reach does not count the token itself. Without is_causal it would look ahead.
    window = None if sliding_window is None else (sliding_window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=window, implementation="cudnn"
    )
