"""Helium.

Special: pairs of rope are neighbours; heads together are as wide as the model.
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    derived_head_dim,
    flag,
    positive,
    read_common,
    write_common,
)
from pronghorn.models.tensor_names import llama_tensor_names


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    defaults = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-8, "rope_theta": 100000.0}
    hf = defaults | {"head_dim": 128} | dict(hf)
    if derived_head_dim(hf) * positive(hf, "num_attention_heads") != positive(hf, "hidden_size"):
        raise InputError("config.json: hidden_size has to be head_dim times num_attention_heads for Helium.")
    return read_common(
        hf,
        family="helium",
        known=frozenset({"attention_bias", "mlp_bias"}),
        default_kv_heads=20,
        rope_interleaved=True,
        qkv_bias=flag(hf, "attention_bias"),
        mlp_bias=flag(hf, "mlp_bias"),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "helium", "HeliumForCausalLM") | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family("helium", ("helium",), config_from_hf, config_to_hf, llama_tensor_names)
