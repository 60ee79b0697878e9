"""`DecoderConfig`: the whole truth about an architecture, in one frozen dataclass.

A family file (`models/<family>.py`) maps a Hugging Face `config.json` to it; the one decoder reads nothing else.
"""

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu_tanh", "gelu"]
LayerKind = Literal["full", "sliding"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and its scaling to longer contexts.

    Attributes:
      base: theta, the base of the geometric series of wavelengths.
      kind: which scaling; the other attributes are read only by the kinds named with them.
      factor: how much longer than the original context (linear, dynamic, llama3, yarn, longrope).
      original_max_position_embeddings: context of pre-training (dynamic, llama3, yarn, longrope).
      low_freq_factor, high_freq_factor: llama3.
      beta_fast, beta_slow, mscale, mscale_all_dim, truncate: yarn.
      attention_factor: multiplies cos and sin (yarn, longrope); None derives it as transformers does.
      short_factor, long_factor: one divisor per frequency (longrope).
      partial_rotary_factor: share of head_dim that is rotated.
    """

    base: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    attention_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder. Sizes are counts of elements; nothing here says how it is run or trained."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    norm_weight_offset: float = 0.0
    activation: Activation = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    logit_softcap: float | None = None
    sliding_window: int | None = None
    layer_kinds: tuple[LayerKind, ...] = ()
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if not self.layer_kinds:
            object.__setattr__(self, "layer_kinds", ("full",) * self.num_layers)
        if len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"layer_kinds has {len(self.layer_kinds)} entries for {self.num_layers} layers")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if "sliding" in self.layer_kinds and self.sliding_window is None:
            raise ValueError("layer_kinds has 'sliding' and sliding_window is None")
