"""Jais 2.

Special: layer norm with bias; an MLP without a gate, with squared ReLU; biases everywhere by default.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"hidden_act": "relu2", "layer_norm_eps": 1e-5, "max_position_embeddings": 8192} | dict(hf)
    attention_bias = flag(hf, "attention_bias", True)
    return read_common(
        hf,
        family="jais2",
        known=frozenset({"attention_bias", "mlp_bias"}),
        eps_key="layer_norm_eps",
        norm="layer",
        norm_bias=True,
        gated_mlp=False,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(hf, "mlp_bias", True),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "jais2", "Jais2ForCausalLM", eps_key="layer_norm_eps") | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family("jais2", ("jais2",), config_from_hf, config_to_hf, llama_tensor_names)
