"""`DecoderConfig`: the whole truth about an architecture, in one frozen dataclass.

A family file (`models/<family>.py`) maps a Hugging Face `config.json` to it; the one decoder reads nothing else.
"""

import dataclasses
import functools
from typing import Any, Literal

from pronghorn.models.experts_config import ExpertsConfig
from pronghorn.models.extras_config import ExtrasConfig
from pronghorn.models.latent_config import LatentConfig
from pronghorn.models.state_space_config import StateSpaceConfig

Activation = Literal["silu", "gelu_tanh", "gelu", "relu2", "xielu"]
GATED_ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
LayerKind = Literal["full", "sliding", "chunked", "conv", "linear", "mamba", "hybrid", "mlp"]
ATTENDING_KINDS: tuple[LayerKind, ...] = ("full", "sliding", "chunked", "hybrid")
STATE_SPACE_KINDS: tuple[LayerKind, ...] = ("mamba", "hybrid")
LayerRope = Literal["global", "local", "none"]
Block = Literal["pre", "post", "sandwich", "parallel", "single"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and its scaling to longer contexts.

    Attributes:
      base: theta, the base of the geometric series of wavelengths.
      kind: which scaling; the other attributes are read only by the kinds named with them.
      factor: how much longer than the original context (all but default).
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
    """Architecture of a decoder. Sizes are counts of elements; nothing here says how it is run or trained.

    A plain Llama sets nothing below `max_position_embeddings`. What a family may switch:

      block: where a layer normalises, a = attention and f = feed-forward (names of the norms are those of Gemma):
        "pre"       x + a(input(x)),                    then x + f(post_attention(x))
        "post"      x + post_attention(a(x)),           then x + post_feedforward(f(x))                 (OLMo 2)
        "sandwich"  x + post_attention(a(input(x))),    then x + post_feedforward(f(pre_feedforward(x)))  (Gemma 2)
        "parallel"  x + a(input(x)) + f(input(x))                                                       (Cohere)
        "single"    x + a(input(x)), or x + f(input(x)) in layers of kind "mlp"                         (Nemotron-H)
      norm: "rms", or "layer" (mean and variance), with norm_bias or without, and that one also without norm_weight
        (OLMo 1); norm_weight_offset is added to the weight;
        rms_norm_eps is the epsilon of either.
      gated_mlp: down(act(gate(x)) * up(x)), or else down(act(up(x))).
      qk_norm: queries and keys are normalised, one weight for the dims of every head ("head"), each head by itself with
        weights of its own ("heads"), or all heads as one vector ("width"); in front of rope, or after it.
      embedding_scale, residual_scale, logit_scale: factors on the embedding, on what each half of a layer adds, and on
        the logits (before their softcap).
      attention_input_scale, attention_output_scale, key_scale: factors on what attention reads behind its norm, on what
        it adds, and on its keys; gate_scale, mlp_output_scale: on the gate in front of its activation, and on what the
        feed-forward network adds.
      layer_kinds: what each layer sees: all before it, a window, or the last conv_width tokens through a gated
        convolution in place of attention ("conv", LFM 2; conv_bias gives it and its linears biases), or all before it
        through the state of a gated delta net ("linear", `models/delta_net.py`; linear_*, and conv_width of its own
        convolution), or in its chunk of attention_chunk positions ("chunked": from the last multiple of it on), or all
        before it through a state-space mixer in place of attention ("mamba", `models/mamba.py`) or beside one that
        reads the same norm ("hybrid").
      layer_ropes: which positions each layer is told: those of `rope`, of `local_rope`, or none. Empty means all alike.
      linear_by_key_head: a delta net has two projections in front, with the rows of one key head after the other.
      qkv_clip: what the projections of queries, keys and values are clipped to, either sign; None for nothing.
      attention_gate: q_proj also projects a gate for every head, behind its query: what attention puts out is
        multiplied by the gate's sigmoid.
      rope_interleaved: pairs are neighbours (2i, 2i + 1) in the checkpoint, not (i, i + R/2).
      state_space: sizes of the mixers of "mamba" and "hybrid" layers, or None.
      latent: multi-head latent attention in place of grouped heads; qkv_bias is then of its first projections, and rope
        of its dims of positions.
      experts: a mixture of experts in place of the feed-forward network, in all layers but those it names.
      extras: keys and values that layers share, inputs of their own, sizes that differ by layer and more, or None.
      unit_heads: queries and keys are divided by their root mean square behind rope, in layers that have one.
      query_scale_beta: queries at position p are multiplied by 1 + beta log(1 + floor((p + query_scale_first) /
        query_scale_context)), the rope's original context by default, in layers with a rope of query_scale_ropes.
    """

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
    block: Block = "pre"
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_weight: bool = True
    gated_mlp: bool = True
    qk_norm_over: Literal["head", "heads", "width"] = "head"
    qk_norm_after_rope: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_input_scale: float = 1.0
    attention_output_scale: float = 1.0
    key_scale: float = 1.0
    gate_scale: float = 1.0
    mlp_output_scale: float = 1.0
    layer_ropes: tuple[LayerRope, ...] = ()
    local_rope: RopeConfig | None = None
    rope_interleaved: bool = False
    query_scale_beta: float = 0.0
    query_scale_context: int | None = None
    query_scale_first: int = 0
    query_scale_ropes: tuple[LayerRope, ...] = ("global", "local", "none")
    attention_chunk: int | None = None
    unit_heads: bool = False
    conv_width: int = 0
    conv_bias: bool = False
    qkv_clip: float | None = None
    attention_gate: bool = False
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_key_dim: int = 0
    linear_value_dim: int = 0
    linear_by_key_head: bool = False
    state_space: StateSpaceConfig | None = None
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    extras: ExtrasConfig | None = None

    def __post_init__(self) -> None:
        if not self.layer_kinds:
            object.__setattr__(self, "layer_kinds", ("full",) * self.num_layers)
        if len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"layer_kinds has {len(self.layer_kinds)} entries for {self.num_layers} layers")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if "sliding" in self.layer_kinds and self.sliding_window is None:
            raise ValueError("layer_kinds has 'sliding' and sliding_window is None")
        if "chunked" in self.layer_kinds and self.attention_chunk is None:
            raise ValueError("layer_kinds has 'chunked' and attention_chunk is None")
        for kind in ("conv", "linear"):
            if kind in self.layer_kinds and self.conv_width < 1:
                raise ValueError(f"layer_kinds has {kind!r} and conv_width is 0")
        if "linear" in self.layer_kinds:
            if (
                min(
                    self.linear_key_heads, self.linear_value_heads, self.linear_key_dim, self.linear_value_dim
                )
                < 1
            ):
                raise ValueError("layer_kinds has 'linear' and heads or sizes of linear attention are 0")
            if self.linear_value_heads % self.linear_key_heads:
                raise ValueError(
                    f"linear_value_heads {self.linear_value_heads} is no multiple of linear_key_heads "
                    f"{self.linear_key_heads}"
                )
        if set(self.layer_kinds) <= {"linear", "mamba", "mlp"}:
            raise ValueError("no layer attends, and at least one has to: the others have a state alone")
        if set(self.layer_kinds) & set(STATE_SPACE_KINDS):
            self._check_state_space()
        if "mlp" in self.layer_kinds and self.block != "single":
            raise ValueError("layers of kind 'mlp' are blocks of one part")
        if self.block == "single" and (self.experts or self.extras or self.latent):
            raise ValueError("blocks of one part have no experts, extras or latent attention")
        if self.layer_ropes and len(self.layer_ropes) != self.num_layers:
            raise ValueError(f"layer_ropes has {len(self.layer_ropes)} entries for {self.num_layers} layers")
        if set(self.layer_ropes) <= {"global"}:
            object.__setattr__(self, "layer_ropes", ())
        if "local" in self.layer_ropes and self.local_rope is None:
            raise ValueError("layer_ropes has 'local' and local_rope is None")
        if self.gated_mlp and self.activation not in GATED_ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} has no gated form")
        if self.experts is not None and (not self.gated_mlp or self.mlp_bias or self.block == "parallel"):
            raise ValueError("experts are gated, have no bias, and read the stream after attention")
        if self.latent is not None:
            self._check_latent(self.latent)
        factors = (self.attention_input_scale, self.attention_output_scale, self.gate_scale)
        if factors != (1.0, 1.0, 1.0) and (
            self.experts is not None
            or self.latent is not None
            or self.extras is not None
            or not self.gated_mlp
            or self.block == "post"
        ):
            raise ValueError(
                "factors of attention and of the gate go with plain heads behind a norm, and gated networks"
            )
        if not self.norm_weight and (self.norm == "rms" or self.norm_bias or self.qk_norm):
            raise ValueError("norms without a weight are layer norms without a bias, and not of heads")
        if self.rope_interleaved and self.qk_norm_after_rope:
            raise ValueError("heads that are normalised after rope keep the order of their dims")
        if self.extras is not None:
            self._check_extras(self.extras)

    def _check_state_space(self) -> None:
        if self.state_space is None:
            raise ValueError("layer_kinds has 'mamba' or 'hybrid' and state_space is None")
        if self.block not in ("pre", "single") or self.norm != "rms":
            raise ValueError("state-space mixers read an RMS norm in front of them")

    def _check_extras(self, extras: ExtrasConfig) -> None:
        extras.check(self.layer_kinds)
        if self.experts is not None or self.block != "sandwich" or self.norm != "rms" or not self.gated_mlp:
            raise ValueError(
                "extras go with gated feed-forward networks between norms, no experts among them"
            )
        if self.unit_heads or self.qk_norm_after_rope or self.query_scale_beta or self.attention_sinks:
            raise ValueError("extras go with heads as they are behind rope, and no sinks")
        if self.num_heads % (extras.sliding_kv_heads or 1):
            raise ValueError(
                f"num_heads {self.num_heads} is no multiple of {extras.sliding_kv_heads} sliding ones"
            )
        local = tuple(rope == "local" for _, rope in self.layer_pattern)
        if extras.sliding_head_dim and local != tuple(kind == "sliding" for kind in self.layer_kinds):
            raise ValueError("sliding layers with heads of another size need a rope of their own")

    def of_layer(self, index: int) -> "DecoderConfig":
        """The configuration as one layer has it: with its own sizes, and equal for layers that are alike."""
        return self if self.extras is None else _of_layer(self, index)

    def _check_latent(self, latent: LatentConfig) -> None:
        if self.head_dim != latent.content_dim + latent.position_dim:
            raise ValueError(
                f"head_dim {self.head_dim} is not the sum of {latent.content_dim} and {latent.position_dim}, as latent "
                "heads have them"
            )
        if self.num_kv_heads != self.num_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} is not num_heads, and attention is latent")
        if (
            set(self.layer_kinds) != {"full"}
            or self.block != "pre"
            or self.norm != "rms"
            or self.query_scale_beta
        ):
            raise ValueError("latent attention sees all before it, behind an RMS norm")
        if self.qk_norm or self.attention_gate or self.attention_sinks or self.attention_softcap is not None:
            raise ValueError("latent attention has no norm of heads, gate, sinks or cap")

    @property
    def value_dim(self) -> int:
        """Dims of a head of values."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def attention_multiplier(self) -> float:
        """The factor of q kᵀ."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale * self.key_scale

    @property
    def layer_pattern(self) -> tuple[tuple[LayerKind, LayerRope], ...]:
        """(kind, rope) of every layer."""
        if not self.layer_ropes:
            return tuple((kind, "global") for kind in self.layer_kinds)
        return tuple(zip(self.layer_kinds, self.layer_ropes, strict=True))

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def layer_structure(self) -> tuple[Any, ...]:
        """(pattern, has experts, sizes of its own) of every layer: layers of which it is equal can be scanned over."""
        sizes = [None if self.extras is None else self.of_layer(i) for i in range(self.num_layers)]
        return tuple((pattern, self.is_sparse(i), sizes[i]) for i, pattern in enumerate(self.layer_pattern))


@functools.lru_cache(maxsize=4096)
def _of_layer(config: DecoderConfig, index: int) -> DecoderConfig:
    extras = config.extras
    assert extras is not None
    changes: dict[str, Any] = {"extras": extras.of_layer(index, config.layer_kinds)}
    if config.layer_kinds[index] == "sliding":
        changes["head_dim"] = extras.sliding_head_dim or config.head_dim
        changes["num_kv_heads"] = extras.sliding_kv_heads or config.num_kv_heads
    if extras.layer_widths:
        changes["intermediate_size"] = extras.layer_widths[index]
    return dataclasses.replace(config, **changes)
