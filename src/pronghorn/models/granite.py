"""Granite 3, dense.

Special: factors on the embedding, on attention's logits, on what each half of a layer adds, and a divisor of the final
logits (Yang et al. 2022, muP).
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, number, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names

_FACTORS = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention_scale": "attention_multiplier",
}
FACTOR_KEYS = frozenset({"logits_scaling", *_FACTORS.values()})


def read_factors(hf: HfConfig) -> dict[str, Any]:
    """The factors of Granite 3 and 4."""
    divisor = number(hf, "logits_scaling", 1.0)
    if divisor == 0:
        raise InputError("config.json: logits_scaling divides the logits, and is 0.")
    factors: dict[str, Any] = {ours: number(hf, theirs, 1.0) for ours, theirs in _FACTORS.items()}
    return factors | {"logit_scale": 1.0 / divisor}


def write_factors(config: DecoderConfig) -> dict[str, Any]:
    """Their keys."""
    factors = {theirs: getattr(config, ours) for ours, theirs in _FACTORS.items()}
    return factors | {"logits_scaling": 1.0 / config.logit_scale}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        hf,
        family="granite",
        known=FACTOR_KEYS | {"attention_bias", "mlp_bias"},
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(hf, "mlp_bias"),
        **read_factors(hf),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "granite", "GraniteForCausalLM") | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        **write_factors(config),
    }


FAMILY = Family("granite", ("granite",), config_from_hf, config_to_hf, llama_tensor_names)
