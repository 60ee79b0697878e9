"""Qwen 3 with a mixture of experts (30B-A3B, 235B-A22B, Coder).

Special: Qwen 3's attention; experts in every `decoder_sparse_step`-th layer but those of `mlp_only_layers`, chosen by a
softmax over all of them, whose weights add up to one only where `norm_topk_prob` says so. `intermediate_size` is that
of layers without experts. A window, where there is one, is every layer's.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, positive, read_common, write_common
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
    "attention_bias", "max_window_layers", "moe_intermediate_size", "norm_topk_prob", "sliding_window",
    "use_sliding_window",
})  # fmt: skip


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    attention_bias = flag(hf, "attention_bias")
    layers = positive(hf, "num_hidden_layers")
    window = None
    if flag(hf, "use_sliding_window") and hf.get("sliding_window", 4096) is not None:
        window = positive(hf, "sliding_window", 4096)
    return read_common(
        hf,
        family="qwen3_moe",
        known=EXPERT_KEYS | SPARSE_LAYER_KEYS | _KEYS,
        default_kv_heads=4,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
        sliding_window=window,
        layer_kinds=("full" if window is None else "sliding",) * layers,
        intermediate_size=positive(hf, "intermediate_size", 6144),
        experts=read_experts(
            hf,
            count=128,
            chosen=8,
            coefficient=0.001,
            width=positive(hf, "moe_intermediate_size", 768),
            normalized=flag(hf, "norm_topk_prob"),
            dense_layers=read_dense_layers(hf),
        ),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    assert config.experts is not None
    return (
        write_common(config, "qwen3_moe", "Qwen3MoeForCausalLM")
        | write_experts(config)
        | write_dense_layers(config)
        | {
            "attention_bias": config.qkv_bias,
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "moe_intermediate_size": config.experts.width,
            "norm_topk_prob": config.experts.normalized,
        }
    )


FAMILY = Family(
    "qwen3_moe",
    ("qwen3_moe",),
    config_from_hf,
    config_to_hf,
    llama_tensor_names,
    stacked_tensors=expert_tensors,
)
