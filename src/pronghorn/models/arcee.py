"""Arcee: AFM.

Special: an MLP without a gate, with squared ReLU.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5} | dict(hf)
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        hf,
        family="arcee",
        known=frozenset({"attention_bias", "mlp_bias"}),
        gated_mlp=False,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(hf, "mlp_bias"),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "arcee", "ArceeForCausalLM") | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family("arcee", ("arcee",), config_from_hf, config_to_hf, llama_tensor_names)
