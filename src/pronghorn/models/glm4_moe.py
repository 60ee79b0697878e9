"""GLM 4.5, 4.6 and 4.7 (355B-A32B; Air, 106B-A12B).

Special: half of each head is rotated, here with pairs (i, i + R/2); a bias on q, k and v, and none on o; heads may be
normalised (`use_qk_norm`). DeepSeek-V3's mixture: scores by sigmoid, a correction that moves the choice, groups, one
network that every token goes through, and dense layers in front. The layers that predict further tokens
(`num_nextn_predict_layers`) are left out, as in transformers.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, read_common, write_common
from pronghorn.models.experts_json import (
    ROUTED_EXPERT_KEYS,
    predicting_layers,
    read_routed_experts,
    write_routed_experts,
)
from pronghorn.models.tensor_names import SHARED_EXPERTS, expert_tensors, llama_tensor_names

_DEFAULTS = {"intermediate_size": 10944, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
_EXPERTS = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    return read_common(
        _DEFAULTS | dict(hf),
        family="glm4_moe",
        known=ROUTED_EXPERT_KEYS | {"attention_bias", "use_qk_norm"},
        default_kv_heads=8,
        partial_rotary=0.5,
        qkv_bias=flag(hf, "attention_bias"),
        qk_norm=flag(hf, "use_qk_norm"),
        experts=read_routed_experts(
            hf, _EXPERTS, router="sigmoid", correction_bias=True, normalizer_epsilon=1e-20
        ),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return (
        write_common(config, "glm4_moe", "Glm4MoeForCausalLM")
        | write_routed_experts(config)
        | {
            "attention_bias": config.qkv_bias,
            "partial_rotary_factor": config.rope.partial_rotary_factor,
            "use_qk_norm": config.qk_norm,
        }
    )


FAMILY = Family(
    "glm4_moe",
    ("glm4_moe",),
    config_from_hf,
    config_to_hf,
    lambda config: llama_tensor_names(config, SHARED_EXPERTS),
    stacked_tensors=expert_tensors,
    left_out=predicting_layers,
)
