"""Mistral 7B, Nemo and Small (text).

Special: a sliding window on every layer where `sliding_window` is set (7B v0.1: 4096; later ones: null), and a
`head_dim` that need not be hidden_size / heads (Nemo).
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    positive,
    read_common,
    read_layer_types,
    write_common,
)
from pronghorn.models.tensor_names import llama_tensor_names


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    # transformers' default is 4096; null means none.
    window = hf.get("sliding_window", 4096)
    window = None if window is None else positive(hf, "sliding_window", window)
    kind: LayerKind = "full" if window is None else "sliding"
    kinds = (kind,) * positive(hf, "num_hidden_layers")
    if read_layer_types(hf, kinds) != kinds:
        raise InputError(
            "config.json: layer_types differs from what model_type 'mistral' computes, which is one kind for all "
            "layers; transformers ignores the key there, and pronghorn does not guess."
        )
    return read_common(
        hf,
        family="mistral",
        known=frozenset({"sliding_window", "layer_types"}),
        default_kv_heads=8,
        sliding_window=window,
        layer_kinds=kinds,
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "mistral", "MistralForCausalLM") | {"sliding_window": config.sliding_window}


FAMILY = Family("mistral", ("mistral",), config_from_hf, config_to_hf, llama_tensor_names)
