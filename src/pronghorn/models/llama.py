"""Llama 2, 3, 3.1, 3.2, 3.3, and what calls itself so (SmolLM 2, TinyLlama, Yi).

Special: one `attention_bias` for q, k, v and o; `mlp_bias`; rope of kind llama3 from 3.1 on; small models are tied.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        hf,
        family="llama",
        known=frozenset({"attention_bias", "mlp_bias"}),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(hf, "mlp_bias"),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "llama", "LlamaForCausalLM") | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family("llama", ("llama",), config_from_hf, config_to_hf, llama_tensor_names)
