"""Gemma 1.

Special: norms multiply by 1 + weight; GELU (tanh form, whatever `hidden_act` says: "gelu" is a slip of the first
release) in the gate; the embedding is scaled by sqrt(hidden_size), rounded to the dtype; tied; a head_dim of its own.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, choice, flag, positive, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names

DEFAULTS = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def gemma_switches(hf: HfConfig) -> dict[str, Any]:
    """What every Gemma switches on."""
    attention_bias = flag(hf, "attention_bias")
    return {
        "norm_weight_offset": 1.0,
        "embedding_scale": positive(hf, "hidden_size") ** 0.5,
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
    }


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = DEFAULTS | dict(hf)
    for key in ("hidden_act", "hidden_activation"):
        choice(hf, key, {"gelu": None, "gelu_pytorch_tanh": None}, "gelu")
    return read_common(
        hf,
        family="gemma",
        known=frozenset({"attention_bias", "hidden_activation"}),
        default_kv_heads=16,
        activation="gelu_tanh",
        **gemma_switches(hf),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "gemma", "GemmaForCausalLM") | {"attention_bias": config.qkv_bias}


FAMILY = Family("gemma", ("gemma",), config_from_hf, config_to_hf, llama_tensor_names)
