"""Nemotron 3 and 4, Minitron (not the Llama-Nemotrons, which are llamas).

Special: layer norm with bias whose weight is stored less one; an MLP without a gate, with squared ReLU; half of each
head is rotated.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"hidden_act": "relu2", "norm_eps": 1e-5, "max_position_embeddings": 4096} | dict(hf)
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        hf,
        family="nemotron",
        known=frozenset({"attention_bias", "mlp_bias"}),
        eps_key="norm_eps",
        partial_rotary=0.5,
        norm="layer",
        norm_bias=True,
        norm_weight_offset=1.0,
        gated_mlp=False,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(hf, "mlp_bias"),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "nemotron", "NemotronForCausalLM", eps_key="norm_eps") | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "partial_rotary_factor": config.rope.partial_rotary_factor,
    }


FAMILY = Family("nemotron", ("nemotron",), config_from_hf, config_to_hf, llama_tensor_names)
