"""Cohere: Command R, Command R+, Aya.

Special: attention and MLP read the same normalised input, side by side; layer norm without bias; pairs of rope are
neighbours; a factor on the logits; tied. Command R+ normalises every head of q and k with weights of its own.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, number, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names

DEFAULTS = {"logit_scale": 0.0625, "layer_norm_eps": 1e-5, "tie_word_embeddings": True}


def cohere_switches(hf: HfConfig) -> dict[str, Any]:
    """What Cohere 1 and 2 share."""
    attention_bias = flag(hf, "attention_bias")
    return {
        "block": "parallel",
        "norm": "layer",
        "logit_scale": number(hf, "logit_scale"),
        "rope_interleaved": True,
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
    }


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = DEFAULTS | {"rope_theta": 500000.0, "max_position_embeddings": 8192} | dict(hf)
    return read_common(
        hf,
        family="cohere",
        known=frozenset({"attention_bias", "logit_scale", "model_max_length", "use_qk_norm"}),
        eps_key="layer_norm_eps",
        qk_norm=flag(hf, "use_qk_norm"),
        qk_norm_over="heads",
        **cohere_switches(hf),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "cohere", "CohereForCausalLM", eps_key="layer_norm_eps") | {
        "attention_bias": config.qkv_bias,
        "logit_scale": config.logit_scale,
        "use_qk_norm": config.qk_norm,
    }


FAMILY = Family("cohere", ("cohere",), config_from_hf, config_to_hf, llama_tensor_names)
