"""SmolLM 3.

Special: every fourth layer is told no positions (`no_rope_layers`, where 0 means none); tied.
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

_KNOWN = frozenset({
    "attention_bias", "layer_types", "max_window_layers", "mlp_bias", "no_rope_layer_interval", "no_rope_layers",
    "sliding_window", "use_sliding_window",
})  # fmt: skip


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"rope_theta": 2000000.0, "tie_word_embeddings": True, "max_position_embeddings": 32768} | dict(hf)
    count, interval = positive(hf, "num_hidden_layers"), positive(hf, "no_rope_layer_interval", 4)
    uses = hf.get("no_rope_layers")
    uses = [int((i + 1) % interval != 0) for i in range(count)] if uses is None else uses
    if not isinstance(uses, list) or len(uses) != count or not set(uses) <= {0, 1}:
        raise InputError(f"config.json: no_rope_layers has to be a list of {count} times 0 or 1.")
    windowed = flag(hf, "use_sliding_window") and hf.get("sliding_window") is not None
    kinds: tuple[LayerKind, ...] = tuple("sliding" if windowed and not use else "full" for use in uses)
    kinds = read_layer_types(hf, kinds)
    if "sliding" in kinds and not windowed:
        raise InputError(
            "config.json: layer_types slide and use_sliding_window or sliding_window says otherwise."
        )
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        hf,
        family="smollm3",
        known=_KNOWN,
        default_kv_heads=4,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(hf, "mlp_bias"),
        sliding_window=positive(hf, "sliding_window") if windowed else None,
        layer_kinds=kinds,
        layer_ropes=tuple("global" if use else "none" for use in uses),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "smollm3", "SmolLM3ForCausalLM") | {
        "attention_bias": config.qkv_bias,
        "layer_types": write_layer_types(config),
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(rope != "none") for _, rope in config.layer_pattern],
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
    }


FAMILY = Family("smollm3", ("smollm3",), config_from_hf, config_to_hf, llama_tensor_names)
