"""ERNIE 4.5, dense.

Special: pairs of rope are neighbours; one `use_bias` for every linear of a layer; a head_dim of its own; tied.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, positive, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True} | dict(hf)
    bias = flag(hf, "use_bias")
    return read_common(
        hf,
        family="ernie4_5",
        known=frozenset({"use_bias"}),
        default_kv_heads=2,
        head_dim=positive(hf, "head_dim", None if "head_dim" in hf else 128),
        rope_interleaved=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "ernie4_5", "Ernie4_5ForCausalLM") | {"use_bias": config.qkv_bias}


FAMILY = Family("ernie4_5", ("ernie4_5",), config_from_hf, config_to_hf, llama_tensor_names)
