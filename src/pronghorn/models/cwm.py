"""Code World Model (Meta, 2025): Llama 3.1 with windows.

Special: a full layer first, then three sliding ones to a full one (`layer_types`), all with one rope.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    positive,
    read_common,
    read_layer_types,
    write_common,
    write_layer_types,
)
from pronghorn.models.tensor_names import llama_tensor_names

# transformers has linears without biases whatever `attention_bias` says, and `mlp_bias` is Llama's.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
_ROPE = {
    "rope_theta": 1e6,
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": 8192,
    } | dict(hf)
    if hf.get("rope_parameters") is None and hf.get("rope_scaling") is None:
        hf["rope_parameters"] = _ROPE
    count = positive(hf, "num_hidden_layers")
    kinds: tuple[LayerKind, ...] = tuple("sliding" if i % 4 else "full" for i in range(count))
    return read_common(
        hf,
        family="cwm",
        known=frozenset({"layer_types", "sliding_window"}),
        neutral=_NEUTRAL,
        default_kv_heads=8,
        sliding_window=positive(hf, "sliding_window"),
        layer_kinds=read_layer_types(hf, kinds),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    hf = write_common(config, "cwm", "CwmForCausalLM")
    if hf["rope_scaling"] is None:  # which would mean the default, a rope of Llama 3's kind
        hf["rope_scaling"] = {"rope_type": "default"}
    return hf | {"layer_types": write_layer_types(config), "sliding_window": config.sliding_window}


FAMILY = Family("cwm", ("cwm",), config_from_hf, config_to_hf, llama_tensor_names)
