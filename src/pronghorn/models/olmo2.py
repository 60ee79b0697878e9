"""OLMo 2.

Special: each half of a layer is normalised on its way out, not on its way in; q and k are normalised over all heads at
once.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, number, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names


def olmo2_switches(hf: HfConfig) -> dict[str, Any]:
    """What OLMo 2 and 3 share."""
    attention_bias = flag(hf, "attention_bias")
    return {
        "block": "post",
        "qk_norm": True,
        "qk_norm_over": "width",
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "rms_norm_eps": number(hf, "rms_norm_eps", 1e-5),
    }


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    return read_common(hf, family="olmo2", known=frozenset({"attention_bias"}), **olmo2_switches(hf))


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "olmo2", "Olmo2ForCausalLM") | {"attention_bias": config.qkv_bias}


FAMILY = Family("olmo2", ("olmo2",), config_from_hf, config_to_hf, llama_tensor_names)
