"""Qwen 1.5 and 2 with a mixture of experts (A2.7B, 57B-A14B).

Special: a bias on q, k and v (`qkv_bias`); experts as in Qwen 3's mixture, and beside them a shared expert, whose
output is multiplied by the sigmoid of one number a token. A window, where there is one, is that of every other layer
under `max_window_layers`, or of those that `layer_types` names.
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    flag,
    positive,
    read_common,
    read_layer_types,
    write_common,
    write_layer_types,
)
from pronghorn.models.experts_json import (
    EXPERT_KEYS,
    SPARSE_LAYER_KEYS,
    read_dense_layers,
    read_experts,
    write_dense_layers,
    write_experts,
)
from pronghorn.models.tensor_names import expert_tensors, llama_tensor_names

_KEYS = frozenset({
    "layer_types", "max_window_layers", "moe_intermediate_size", "norm_topk_prob", "qkv_bias",
    "shared_expert_intermediate_size", "sliding_window", "use_sliding_window",
})  # fmt: skip


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    layers, slides = positive(hf, "num_hidden_layers"), flag(hf, "use_sliding_window")
    first_full = positive(hf, "max_window_layers", 28) if slides else 0
    default = tuple("sliding" if i < first_full and i % 2 == 0 else "full" for i in range(layers))
    kinds = read_layer_types(hf, default)  # type: ignore[arg-type]
    if "sliding" in kinds and not slides:
        raise InputError(
            "config.json: layer_types has sliding_attention, and "
            "use_sliding_window is off; set it, or make every layer "
            "full_attention."
        )
    return read_common(
        hf,
        family="qwen2_moe",
        known=EXPERT_KEYS | SPARSE_LAYER_KEYS | _KEYS,
        default_kv_heads=16,
        qkv_bias=flag(hf, "qkv_bias", True),
        sliding_window=positive(hf, "sliding_window", 4096) if "sliding" in kinds else None,
        layer_kinds=kinds,
        intermediate_size=positive(hf, "intermediate_size", 5632),
        experts=read_experts(
            hf,
            count=60,
            chosen=4,
            coefficient=0.001,
            width=positive(hf, "moe_intermediate_size", 1408),
            normalized=flag(hf, "norm_topk_prob"),
            shared_width=positive(hf, "shared_expert_intermediate_size", 5632),
            shared_gate=True,
            dense_layers=read_dense_layers(hf),
        ),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    experts = config.experts
    assert experts is not None
    return (
        write_common(config, "qwen2_moe", "Qwen2MoeForCausalLM")
        | write_experts(config)
        | write_dense_layers(config)
        | {
            "qkv_bias": config.qkv_bias,
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "layer_types": write_layer_types(config),
            "moe_intermediate_size": experts.width,
            "shared_expert_intermediate_size": experts.shared_width,
            "norm_topk_prob": experts.normalized,
        }
    )


FAMILY = Family(
    "qwen2_moe",
    ("qwen2_moe",),
    config_from_hf,
    config_to_hf,
    llama_tensor_names,
    stacked_tensors=expert_tensors,
)
