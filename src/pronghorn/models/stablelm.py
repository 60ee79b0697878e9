"""StableLM.

Special: layer norm with bias; a quarter of each head is rotated; a switch for biases on q, k and v, and one for
attention and MLP side by side.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, derived_head_dim, flag, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names

_NEUTRAL: dict[str, tuple[Any, ...]] = {"hidden_dropout": (0,), "qk_layernorm": (False,)}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"layer_norm_eps": 1e-5, "max_position_embeddings": 4096} | dict(hf)
    return read_common(
        hf,
        family="stablelm",
        known=frozenset({"use_parallel_residual", "use_qkv_bias"}),
        neutral=_NEUTRAL,
        default_kv_heads=32,
        eps_key="layer_norm_eps",
        partial_rotary=0.25,
        head_dim=derived_head_dim(hf),
        norm="layer",
        norm_bias=True,
        qkv_bias=flag(hf, "use_qkv_bias"),
        block="parallel" if flag(hf, "use_parallel_residual") else "pre",
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "stablelm", "StableLmForCausalLM", eps_key="layer_norm_eps") | {
        "partial_rotary_factor": config.rope.partial_rotary_factor,
        "use_parallel_residual": config.block == "parallel",
        "use_qkv_bias": config.qkv_bias,
    }


FAMILY = Family("stablelm", ("stablelm",), config_from_hf, config_to_hf, llama_tensor_names)
