"""What the forward pass of a layer leaves for its backward pass, and where: the memory policies, from fast to small.

Bytes a token and layer in bf16, with d the hidden size, q and kv the widths of queries and of keys and values, f the
feed-forward width (Llama-3.1-8B: d = q = 4096, kv = 1024, f = 14336), and what the backward pass computes again:

    keep                   2 (3 d + 2 q + 2 kv + 2 f) = 94 KB    nothing
    attention              2 (2 d + q)                = 25 KB    q, k, v; gate and up
    layer_inputs           2 d                        =  8 KB    the layer
    offload_projections    2 (2 d + 2 q + 2 kv)       = 37 KB    gate and up              in pinned host memory
    offload_attention      2 (2 d + q)                = 25 KB    q, k, v; gate and up     in pinned host memory
    offload                2 d                        =  8 KB    the layer                in pinned host memory

An H100 needs about 0.7 us a token and layer for the forward pass of that model at 4,096 tokens a row, 1.1 us at 32,768,
and its bus moves 35 and 55 KB in that time: so much can leave without being waited for.
"""

import dataclasses
from typing import Any

from pronghorn.pallas_kernels.cudnn_attention import FORWARD_PRIMITIVES
from pronghorn.pallas_kernels.lora_linear import RANK_NAME

# A few numbers a token: always worth more than computing them again.
_SMALL = ("attention_logsumexp", RANK_NAME, "rms_norm_inverse_rms")
_ATTENTION = ("attention_out", "stream_after_attention", *_SMALL)
_HEADS = ("attention_q", "attention_k", "attention_v")
_PROJECTIONS = (*_HEADS, *_ATTENTION)
LATENTS = "attention_latents"


@dataclasses.dataclass(frozen=True)
class MemoryPolicy:
    """One policy.

    Attributes:
      saved: names of the arrays that are kept on top of the layer's input; everything else is computed again. None
        keeps all that the hand gradients ask for.
      offloaded: whether they, and the layer's input, wait in pinned host memory.
    """

    saved: tuple[str, ...] | None
    offloaded: bool = False

    def of_latents(self) -> "MemoryPolicy":
        """The same where heads are expanded from latent vectors: these are saved in the place of heads."""
        if self.saved is None or not set(_HEADS) <= set(self.saved):
            return self
        others = (name for name in self.saved if name not in _HEADS)
        return dataclasses.replace(self, saved=(LATENTS, *others))

    def saveable(self, primitive: Any, *_: Any, **parameters: Any) -> bool:
        """A policy for `jax.checkpoint`.

        Attention is recognised whichever implementation runs: ours by its names, cuDNN's by its primitive, whose
        outputs no name can reach.
        """
        saved = self.saved or ()
        if primitive.name == "name":
            return parameters["name"] in saved
        return primitive.name in FORWARD_PRIMITIVES and "attention_out" in saved


POLICIES = {
    "keep": MemoryPolicy(None),
    "attention": MemoryPolicy(_ATTENTION),
    "layer_inputs": MemoryPolicy(()),
    "offload_projections": MemoryPolicy(_PROJECTIONS, offloaded=True),
    "offload_attention": MemoryPolicy(_ATTENTION, offloaded=True),
    "offload": MemoryPolicy((), offloaded=True),
}
MEMORY_POLICIES = tuple(POLICIES)
