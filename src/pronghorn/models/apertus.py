"""Apertus.

Special: an MLP without a gate, with xIELU, whose four numbers a layer are tensors of the checkpoint; heads of q and k
are normalised; rope of kind llama3 where nothing is said; norms of a layer have other names.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, read_common, write_common, write_rope
from pronghorn.models.tensor_names import llama_tensor_names

_NAMES = {"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {"mlp_bias": (False,), "post_norm": (False,), "qk_norm": (True,)}
_BASE = 12000000.0
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": _BASE,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"hidden_act": "xielu", "max_position_embeddings": 65536, "rms_norm_eps": 1e-5} | dict(hf)
    if hf.get("rope_scaling") is None and hf.get("rope_parameters") is None:
        hf["rope_parameters"] = _ROPE
    hf.setdefault("rope_theta", _BASE)
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        hf,
        family="apertus",
        known=frozenset({"attention_bias"}),
        neutral=_NEUTRAL,
        qk_norm=True,
        gated_mlp=False,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    hf = write_common(config, "apertus", "ApertusForCausalLM") | {"attention_bias": config.qkv_bias}
    return hf | {"rope_scaling": write_rope(config.rope)}  # null would mean the family's own


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    return llama_tensor_names(config, _NAMES)


FAMILY = Family("apertus", ("apertus",), config_from_hf, config_to_hf, tensor_names)
