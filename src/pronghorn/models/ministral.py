"""Ministral 8B.

Special: as Mistral, but each layer slides or not by itself (`layer_types`).
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


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"sliding_window": 4096, "max_position_embeddings": 131072} | dict(hf)
    window = positive(hf, "sliding_window") if hf["sliding_window"] is not None else None
    kind: LayerKind = "full" if window is None else "sliding"
    return read_common(
        hf,
        family="ministral",
        known=frozenset({"layer_types", "sliding_window"}),
        default_kv_heads=8,
        sliding_window=window,
        layer_kinds=read_layer_types(hf, (kind,) * positive(hf, "num_hidden_layers")),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "ministral", "MinistralForCausalLM") | {
        "layer_types": write_layer_types(config),
        "sliding_window": config.sliding_window,
    }


FAMILY = Family("ministral", ("ministral",), config_from_hf, config_to_hf, llama_tensor_names)
