"""Seed-OSS.

Special: biases on q, k and v, and a switch of its own for o's. Its dropout rates (0.1) are those of pre-training:
nothing is dropped here but in front of adapters.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, positive, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names

_KNOWN = frozenset({
    "attention_bias", "attention_dropout", "attention_out_bias", "mlp_bias", "residual_dropout"
})  # fmt: skip


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"max_position_embeddings": 524288} | dict(hf)
    return read_common(
        hf,
        family="seed_oss",
        known=_KNOWN,
        default_kv_heads=8,
        head_dim=positive(hf, "head_dim", None if "head_dim" in hf else 128),
        qkv_bias=flag(hf, "attention_bias", True),
        output_bias=flag(hf, "attention_out_bias"),
        mlp_bias=flag(hf, "mlp_bias"),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "seed_oss", "SeedOssForCausalLM") | {
        "attention_bias": config.qkv_bias,
        "attention_out_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family("seed_oss", ("seed_oss",), config_from_hf, config_to_hf, llama_tensor_names)
