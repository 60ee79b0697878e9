"""Qwen 3.5 with a mixture of experts, text models (35B-A3B, 122B-A10B, 397B-A17B).

Special: Qwen 3.5's layers (`delta_net_json.py`); every one has experts, chosen by a softmax over all of them, whose
weights add up to one, and a shared expert, whose output is multiplied by the sigmoid of one number a token.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, positive
from pronghorn.models.delta_net_json import further_heads, hybrid_tensor_names, read_hybrid, write_hybrid
from pronghorn.models.experts_json import EXPERT_KEYS, read_experts, write_experts
from pronghorn.models.tensor_names import expert_tensors

_KEYS = frozenset({"moe_intermediate_size", "shared_expert_intermediate_size"})


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    width = positive(hf, "moe_intermediate_size", 512)
    return read_hybrid(
        {"intermediate_size": width} | dict(hf),  # of dense layers, and there are none
        family="qwen3_5_moe",
        known=EXPERT_KEYS | _KEYS,
        default_kv_heads=2,
        experts=read_experts(
            hf,
            count=256,
            chosen=8,
            coefficient=0.001,
            width=width,
            normalized=True,
            shared_width=positive(hf, "shared_expert_intermediate_size", 512),
            shared_gate=True,
        ),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    assert config.experts is not None
    return (
        write_hybrid(config, "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM")
        | write_experts(config)
        | {
            "moe_intermediate_size": config.experts.width,
            "shared_expert_intermediate_size": config.experts.shared_width,
        }
    )


FAMILY = Family(
    "qwen3_5_moe",
    ("qwen3_5_moe_text",),
    config_from_hf,
    config_to_hf,
    hybrid_tensor_names,
    stacked_tensors=expert_tensors,
    left_out=further_heads,
)
