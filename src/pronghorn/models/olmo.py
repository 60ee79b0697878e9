"""OLMo 1.

Special: layer norm without weight and bias, epsilon 1e-5 whatever the file says; queries, keys and values are clipped
in front of rope where `clip_qkv` is set (7B of April 2024).
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, number, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names

_KNOWN = frozenset({"attention_bias", "clip_qkv"})
_EPS = 1e-5


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    if number(hf, "rms_norm_eps", _EPS) != _EPS:
        raise InputError(f"config.json: rms_norm_eps is {hf['rms_norm_eps']}, and OLMo's norms have {_EPS}.")
    clip = None if hf.get("clip_qkv") is None else number(hf, "clip_qkv")
    if clip is not None and clip <= 0:
        raise InputError(f"config.json: clip_qkv is {clip}, and has to be over 0.")
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        {"vocab_size": 50304, "max_position_embeddings": 2048} | dict(hf),
        family="olmo",
        known=_KNOWN,
        norm="layer",
        norm_weight=False,
        rms_norm_eps=_EPS,
        qkv_clip=clip,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    hf = write_common(config, "olmo", "OlmoForCausalLM")
    del hf["rms_norm_eps"]
    return hf | {"attention_bias": config.qkv_bias, "clip_qkv": config.qkv_clip}


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's, which has nothing for norms."""
    return {ours: theirs for ours, theirs in llama_tensor_names(config).items() if "norm." not in ours}


FAMILY = Family("olmo", ("olmo",), config_from_hf, config_to_hf, tensor_names)
