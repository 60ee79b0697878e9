"""Ministral 3 (text tower).

Special: yarn from the first release on, and queries grow with the number of original contexts in front of them
(`llama_4_scaling_beta`, beside the keys of rope).
"""

from collections.abc import Mapping
from typing import Any

from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import Family, HfConfig, number, positive, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
# Beside the keys of rope: said twice, or no key of rope.
_BESIDE = ("llama_4_scaling_beta", "max_position_embeddings")


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144} | dict(hf)
    given = hf.get("rope_parameters") or hf.get("rope_scaling") or _YARN
    rope: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    beta = number(rope, "llama_4_scaling_beta", 0.0)
    if rope:
        hf |= {"rope_parameters": {k: v for k, v in rope.items() if k not in _BESIDE}, "rope_scaling": None}
    window = None if hf.get("sliding_window") is None else positive(hf, "sliding_window")
    kind: LayerKind = "full" if window is None else "sliding"
    return read_common(
        hf,
        family="ministral3",
        known=frozenset({"sliding_window"}),
        default_kv_heads=8,
        sliding_window=window,
        layer_kinds=(kind,) * positive(hf, "num_hidden_layers"),
        query_scale_beta=beta,
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json; rope as transformers 5 writes it, since this family came with that."""
    hf = write_common(config, "ministral3", "Ministral3ForCausalLM") | {
        "sliding_window": config.sliding_window
    }
    rope = {"rope_type": "default"} | (hf.pop("rope_scaling") or {})
    rope |= {"rope_theta": hf.pop("rope_theta"), "llama_4_scaling_beta": config.query_scale_beta}
    return hf | {"rope_parameters": rope}


FAMILY = Family("ministral3", ("ministral3",), config_from_hf, config_to_hf, llama_tensor_names)
