"""OLMoE (1B-7B).

Special: queries and keys are normalised as whole vectors in front of rope; every layer has experts, as wide as
`intermediate_size` says, whose weights add up to one only where `norm_topk_prob` says so.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    derived_head_dim,
    flag,
    positive,
    read_common,
    write_common,
)
from pronghorn.models.experts_json import EXPERT_KEYS, read_experts, write_experts
from pronghorn.models.tensor_names import expert_tensors, llama_tensor_names


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        {"rms_norm_eps": 1e-5} | {key: value for key, value in hf.items() if value is not None},
        family="olmoe",
        # clip_qkv is refused unless null: no published checkpoint clips.
        known=EXPERT_KEYS | {"attention_bias", "norm_topk_prob"},
        head_dim=derived_head_dim(hf),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
        qk_norm_over="width",
        experts=read_experts(
            hf,
            count=64,
            chosen=8,
            coefficient=0.01,
            width=positive(hf, "intermediate_size"),
            normalized=flag(hf, "norm_topk_prob"),
        ),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    assert config.experts is not None
    return (
        write_common(config, "olmoe", "OlmoeForCausalLM")
        | write_experts(config)
        | {"attention_bias": config.qkv_bias, "norm_topk_prob": config.experts.normalized}
    )


FAMILY = Family(
    "olmoe", ("olmoe",), config_from_hf, config_to_hf, llama_tensor_names, stacked_tensors=expert_tensors
)
