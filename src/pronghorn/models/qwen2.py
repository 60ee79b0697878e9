"""Qwen 2, 2.5 (and their distillates).

Special: a bias on q, k and v but not on o, though no key says so; a sliding window only where `use_sliding_window` is
true, on the layers that `layer_types` names, or without it on those from `max_window_layers` on.
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig, LayerKind
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
from pronghorn.models.tensor_names import llama_tensor_names

WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    return read_common(
        hf, family="qwen2", known=WINDOW_KEYS, default_kv_heads=32, qkv_bias=True, **read_window(hf)
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "qwen2", "Qwen2ForCausalLM") | write_window(config)


def read_window(hf: HfConfig) -> dict[str, Any]:
    """sliding_window and layer_kinds of a config that says which layers slide (Qwen 2 and 3)."""
    layers = positive(hf, "num_hidden_layers")
    window = None
    if flag(hf, "use_sliding_window"):
        window = hf.get("sliding_window", 4096)
        window = None if window is None else positive(hf, "sliding_window", window)
    first = hf.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):
        raise InputError(f"config.json: max_window_layers has to be a whole number, and is {first!r}.")
    default: list[LayerKind] = [
        "sliding" if window is not None and i >= first else "full" for i in range(layers)
    ]
    kinds = read_layer_types(hf, tuple(default))
    if "sliding" in kinds and window is None:
        raise InputError(
            "config.json: layer_types has sliding_attention, and use_sliding_window or sliding_window is off; set both "
            "or make every layer full_attention."
        )
    return {"sliding_window": window if "sliding" in kinds else None, "layer_kinds": kinds}


def write_window(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read_window`."""
    sliding = config.sliding_window is not None
    kinds = list(config.layer_kinds)
    return {
        "use_sliding_window": sliding,
        "sliding_window": config.sliding_window,
        "max_window_layers": kinds.index("sliding") if "sliding" in kinds else config.num_layers,
        "layer_types": write_layer_types(config),
    }


FAMILY = Family("qwen2", ("qwen2",), config_from_hf, config_to_hf, llama_tensor_names)
