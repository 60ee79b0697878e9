"""GLM 4 (2024: glm-4-9b-hf, glm-edge) and GLM 4-0414 (model_type "glm4").

Special: half of each head is rotated, pairs being neighbours; gate and up are one tensor in the file; biases on q, k
and v. GLM 4-0414 also normalises what each half of a layer puts out.
"""

from typing import Any

from pronghorn.models.config import Block, DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, read_common, write_common
from pronghorn.models.tensor_names import fused_tensors, llama_tensor_names

_DEFAULTS = {
    "attention_bias": True,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
}
_SANDWICH_NAMES = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}


def _config_from_hf(hf: HfConfig, family: str, block: Block) -> DecoderConfig:
    hf = _DEFAULTS | dict(hf)
    return read_common(
        hf,
        family=family,
        known=frozenset({"attention_bias"}),
        default_kv_heads=2,
        partial_rotary=0.5,
        qkv_bias=flag(hf, "attention_bias"),
        rope_interleaved=True,
        block=block,
    )


def glm_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    return _config_from_hf(hf, "glm", "pre")


def glm4_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    return _config_from_hf(hf, "glm4", "sandwich")


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    architecture = "GlmForCausalLM" if config.family == "glm" else "Glm4ForCausalLM"
    return write_common(config, config.family, architecture) | {
        "attention_bias": config.qkv_bias,
        "partial_rotary_factor": config.rope.partial_rotary_factor,
    }


def fused(config: DecoderConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """The tensors that the file holds as one."""
    return fused_tensors(config, ("mlp.gate_up_proj",))


def glm4_tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    return llama_tensor_names(config, _SANDWICH_NAMES)


GLM = Family("glm", ("glm",), glm_from_hf, config_to_hf, llama_tensor_names, fused)
GLM4 = Family("glm4", ("glm4",), glm4_from_hf, config_to_hf, glm4_tensor_names, fused)
