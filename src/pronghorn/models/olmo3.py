"""OLMo 3.

Special: as OLMo 2; three sliding layers to a full one, and rope is scaled (yarn) on the full ones only.
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    number,
    positive,
    read_common,
    read_layer_ropes,
    read_layer_types,
    write_common,
    write_layer_ropes,
    write_layer_types,
)
from pronghorn.models.olmo2 import olmo2_switches
from pronghorn.models.tensor_names import llama_tensor_names

_BASE = 500000.0


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"rope_theta": _BASE} | dict(hf)
    count = positive(hf, "num_hidden_layers")
    kinds: tuple[LayerKind, ...] = tuple("sliding" if (i + 1) % 4 else "full" for i in range(count))
    kinds = read_layer_types(hf, kinds)
    head_dim = positive(hf, "head_dim", positive(hf, "hidden_size") // positive(hf, "num_attention_heads"))
    base = number(hf, "rope_theta")
    if base != _BASE:
        raise InputError(
            f"config.json: rope_theta is {base:g}, and for other than {_BASE:g} transformers rotates sliding layers by "
            "the latter; write rope_parameters with one dict for each kind of layer."
        )
    rope, local_rope = read_layer_ropes(hf, head_dim=head_dim, local_base=_BASE)
    return read_common(
        hf,
        family="olmo3",
        known=frozenset({"attention_bias", "layer_types", "sliding_window"}),
        sliding_window=positive(hf, "sliding_window", 4096),
        layer_kinds=kinds,
        layer_ropes=tuple("local" if kind == "sliding" else "global" for kind in kinds),
        rope=rope,
        local_rope=local_rope,
        **olmo2_switches(hf),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    hf = write_common(config, "olmo3", "Olmo3ForCausalLM")
    del hf["rope_theta"], hf["rope_scaling"]
    return hf | {
        "attention_bias": config.qkv_bias,
        "layer_types": write_layer_types(config),
        "rope_parameters": write_layer_ropes(config),
        "sliding_window": config.sliding_window,
    }


FAMILY = Family("olmo3", ("olmo3",), config_from_hf, config_to_hf, llama_tensor_names)
