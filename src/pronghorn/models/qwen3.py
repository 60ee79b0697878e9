"""Qwen 3, dense.

Special: RMSNorm over each head of q and k before rope; a `head_dim` of its own (128 where absent, not
hidden_size / heads); one `attention_bias` for q, k, v and o, false as published. Windows as in Qwen 2.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    flag,
    positive,
    read_common,
    write_common,
)
from pronghorn.models.qwen2 import WINDOW_KEYS, read_window, write_window
from pronghorn.models.tensor_names import llama_tensor_names


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        hf,
        family="qwen3",
        known=WINDOW_KEYS | {"attention_bias"},
        default_kv_heads=32,
        head_dim=positive(hf, "head_dim", 128),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
        **read_window(hf),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return (
        write_common(config, "qwen3", "Qwen3ForCausalLM")
        | write_window(config)
        | {"attention_bias": config.qkv_bias}
    )


FAMILY = Family("qwen3", ("qwen3",), config_from_hf, config_to_hf, llama_tensor_names)
