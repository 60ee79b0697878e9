"""Prefill, the decode loop, and sampling."""

from pronghorn.generation.generate import (
    default_stop_tokens,
    generate,
    generate_batch,
    generate_tokens,
    sampler,
)
from pronghorn.generation.sampling import Sampling

__all__ = ["Sampling", "default_stop_tokens", "generate", "generate_batch", "generate_tokens", "sampler"]
