"""Qwen3-Next (80B-A3B).

Special: Qwen 3.5's layers (`delta_net_json.py`), but that a delta net has two projections in front, whose rows are
those of one key head after the other; experts in every `decoder_sparse_step`-th layer but those of `mlp_only_layers`,
and a shared expert, whose output is multiplied by the sigmoid of one number a token.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, positive
from pronghorn.models.delta_net_json import further_heads, hybrid_tensor_names, read_hybrid, write_hybrid
from pronghorn.models.experts_json import (
    EXPERT_KEYS,
    SPARSE_LAYER_KEYS,
    read_dense_layers,
    read_experts,
    write_dense_layers,
    write_experts,
)
from pronghorn.models.tensor_names import expert_tensors

_KEYS = frozenset({"moe_intermediate_size", "norm_topk_prob", "shared_expert_intermediate_size"})


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    return read_hybrid(
        {"intermediate_size": 5632} | dict(hf),
        family="qwen3_next",
        known=EXPERT_KEYS | SPARSE_LAYER_KEYS | _KEYS,
        default_kv_heads=2,
        linear_by_key_head=True,
        experts=read_experts(
            hf,
            count=512,
            chosen=10,
            coefficient=0.001,
            width=positive(hf, "moe_intermediate_size", 512),
            normalized=flag(hf, "norm_topk_prob", True),
            shared_width=positive(hf, "shared_expert_intermediate_size", 512),
            shared_gate=True,
            dense_layers=read_dense_layers(hf),
        ),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    assert config.experts is not None
    return (
        write_hybrid(config, "qwen3_next", "Qwen3NextForCausalLM")
        | write_experts(config)
        | write_dense_layers(config)
        | {
            "moe_intermediate_size": config.experts.width,
            "norm_topk_prob": config.experts.normalized,
            "shared_expert_intermediate_size": config.experts.shared_width,
        }
    )


FAMILY = Family(
    "qwen3_next",
    ("qwen3_next",),
    config_from_hf,
    config_to_hf,
    hybrid_tensor_names,
    stacked_tensors=expert_tensors,
    left_out=further_heads,
)
