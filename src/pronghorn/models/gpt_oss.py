"""gpt-oss (20B, 120B).

Special: every layer's feed-forward network is a mixture whose router has a bias and takes its softmax over the chosen;
experts have biases and compute `clamped_swiglu`. Every head has a sink; layers alternate between a window and all
tokens; q, k, v and o have biases; yarn's ramp is not rounded to whole dims. A file holds the experts' gate and up
element by element in one tensor, `[experts, in, 2 width]`, and down as `[experts, in, out]`.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    flag,
    number,
    positive,
    read_common,
    read_layer_types,
    read_rope,
    write_common,
    write_layer_types,
    write_rope,
)
from pronghorn.models.experts_json import EXPERT_KEYS, read_experts, write_experts
from pronghorn.models.tensor_names import InterleavedTensor, llama_tensor_names

_KEYS = frozenset({"attention_bias", "layer_types", "sliding_window", "swiglu_alpha", "swiglu_limit"})
# Where a config.json has no rope of its own.
_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_THETA = 150000.0


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"head_dim": 64, "rope_theta": _THETA} | {
        key: value for key, value in hf.items() if value is not None
    }
    if not hf.get("rope_scaling") and not hf.get("rope_parameters"):
        hf["rope_parameters"] = _ROPE
    bias = flag(hf, "attention_bias", True)
    layers = positive(hf, "num_hidden_layers")
    alternating: tuple[LayerKind, ...] = tuple("full" if i % 2 else "sliding" for i in range(layers))
    rope = read_rope(hf, head_dim=positive(hf, "head_dim"))
    chosen = positive(hf, "num_experts_per_tok", 4)
    return read_common(
        hf,
        family="gpt_oss",
        known=EXPERT_KEYS | _KEYS,
        default_kv_heads=8,
        # Second names that published files have for two of the numbers.
        neutral={
            "experts_per_token": (chosen,),
            "initial_context_length": (rope.original_max_position_embeddings,),
        },
        qkv_bias=bias,
        output_bias=bias,
        attention_sinks=True,
        sliding_window=positive(hf, "sliding_window", 128),
        layer_kinds=read_layer_types(hf, alternating),
        rope=rope,
        rms_norm_eps=number(hf, "rms_norm_eps", 1e-5),
        experts=read_experts(
            hf,
            count=128,
            chosen=4,
            coefficient=0.001,
            width=positive(hf, "intermediate_size"),
            router="softmax_after_top_k",
            router_bias=True,
            bias=True,
            swiglu_limit=number(hf, "swiglu_limit", 7.0),
            swiglu_alpha=number(hf, "swiglu_alpha", 1.702),
        ),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    assert config.experts is not None
    return (
        write_common(config, "gpt_oss", "GptOssForCausalLM")
        | write_experts(config, "num_local_experts")
        | {
            # Without it transformers would take yarn.
            "rope_scaling": write_rope(config.rope),
            "attention_bias": config.qkv_bias,
            "layer_types": write_layer_types(config),
            "sliding_window": config.sliding_window,
            "swiglu_limit": config.experts.swiglu_limit,
            "swiglu_alpha": config.experts.swiglu_alpha,
        }
    )


def interleaved_tensors(config: DecoderConfig) -> dict[str, InterleavedTensor]:
    """The experts' tensors of every layer."""
    found = {}
    for index in range(config.num_layers):
        experts = f"model.layers.{index}.mlp.experts."
        for name, projections in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            for suffix, leaf in (("", "weight"), ("_bias", "bias")):
                parts = tuple(f"{experts}{projection}.{leaf}" for projection in projections)
                weight = leaf == "weight"
                found[f"{experts}{name}{suffix}"] = InterleavedTensor(parts, transposed=weight, marked=weight)
    return found


FAMILY = Family(
    "gpt_oss",
    ("gpt_oss",),
    config_from_hf,
    config_to_hf,
    lambda config: llama_tensor_names(config, {"mlp.gate": "mlp.router"}),
    interleaved_tensors=interleaved_tensors,
)
