"""Gemma 3: 1B, 270M, and the text towers of 4B, 12B and 27B, whose `text_config` leaves out what is the default.

Special: as Gemma 2 without soft caps, and heads of q and k are normalised; five sliding layers to a full one, each
kind with a rope of its own (`rope_local_base_freq` for the sliding ones, never scaled).
"""

from typing import Any

from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    number,
    positive,
    read_common,
    read_layer_ropes,
    read_layer_types,
    write_layer_ropes,
)
from pronghorn.models.gemma import DEFAULTS
from pronghorn.models.gemma2 import KNOWN, sandwich_switches, write_sandwich
from pronghorn.models.tensor_names import llama_tensor_names

_DEFAULTS = DEFAULTS | {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = _DEFAULTS | dict(hf)
    count, period = positive(hf, "num_hidden_layers"), positive(hf, "sliding_window_pattern", 6)
    kinds: tuple[LayerKind, ...] = tuple("sliding" if (i + 1) % period else "full" for i in range(count))
    kinds = read_layer_types(hf, kinds)
    local_base = number(hf, "rope_local_base_freq", 10000.0)
    rope, local_rope = read_layer_ropes(hf, head_dim=positive(hf, "head_dim"), local_base=local_base)
    return read_common(
        hf,
        family="gemma3",
        known=KNOWN | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
        default_kv_heads=4,
        activation_key="hidden_activation",
        layer_kinds=kinds,
        layer_ropes=tuple("local" if kind == "sliding" else "global" for kind in kinds),
        rope=rope,
        local_rope=local_rope,
        qk_norm=True,
        **sandwich_switches(hf),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    assert config.local_rope is not None
    hf = write_sandwich(config, "gemma3_text", "Gemma3ForCausalLM")
    if config.local_rope.kind == "default":
        return hf | {"rope_local_base_freq": config.local_rope.base}
    del hf["rope_theta"], hf["rope_scaling"]
    return hf | {"rope_parameters": write_layer_ropes(config)}


FAMILY = Family("gemma3", ("gemma3_text",), config_from_hf, config_to_hf, llama_tensor_names)
