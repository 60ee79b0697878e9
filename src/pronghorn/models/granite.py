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


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    attention_bias, divisor = flag(hf, "attention_bias"), number(hf, "logits_scaling", 1.0)
    if divisor == 0:
        raise InputError("config.json: logits_scaling divides the logits, and is 0.")
    factors: dict[str, Any] = {ours: number(hf, theirs, 1.0) for ours, theirs in _FACTORS.items()}
    return read_common(
        hf,
        family="granite",
        known=frozenset({"attention_bias", "logits_scaling", "mlp_bias", *_FACTORS.values()}),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(hf, "mlp_bias"),
        logit_scale=1.0 / divisor,
        **factors,
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "granite", "GraniteForCausalLM") | {
        "attention_bias": config.qkv_bias,
        "logits_scaling": 1.0 / config.logit_scale,
        "mlp_bias": config.mlp_bias,
        **{theirs: getattr(config, ours) for ours, theirs in _FACTORS.items()},
    }


FAMILY = Family("granite", ("granite",), config_from_hf, config_to_hf, llama_tensor_names)
