"""EXAONE 4.

Special: each half of a layer is normalised on its way out; heads of q and k are normalised; where there is a window,
three sliding layers with rope to a full one that is told no positions.
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

_KNOWN = frozenset({"layer_types", "sliding_window", "sliding_window_pattern"})


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"sliding_window": 4096, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5} | dict(hf)
    count, window = positive(hf, "num_hidden_layers"), None
    period = count + 1
    if hf["sliding_window"] is not None:
        window = positive(hf, "sliding_window")
        if hf.get("layer_types") is None:
            period = positive(hf, "sliding_window_pattern", 4)
    sliding = window is not None
    kinds: tuple[LayerKind, ...] = tuple(
        "sliding" if sliding and (i + 1) % period else "full" for i in range(count)
    )
    kinds = read_layer_types(hf, kinds)
    full = "global" if window is None else "none"
    return read_common(
        hf,
        family="exaone4",
        known=_KNOWN,
        default_kv_heads=32,
        block="post",
        qk_norm=True,
        sliding_window=window,
        layer_kinds=kinds,
        layer_ropes=tuple("global" if kind == "sliding" else full for kind in kinds),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "exaone4", "Exaone4ForCausalLM") | {
        "layer_types": write_layer_types(config),
        "sliding_window": config.sliding_window,
    }


FAMILY = Family("exaone4", ("exaone4",), config_from_hf, config_to_hf, llama_tensor_names)
