"""Granite 4, dense (350M, 1B, micro): "granitemoehybrid" without experts and without state-space layers.

Special: the factors of Granite 3; gate and up are one tensor in the file, and the MLP is called shared; some are told
no positions (`position_embedding_type` null or "nope").
"""

import math
from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    choice,
    derived_head_dim,
    flag,
    positive,
    read_common,
    write_common,
)
from pronghorn.models.granite import FACTOR_KEYS, read_factors, write_factors
from pronghorn.models.tensor_names import fused_tensors, llama_tensor_names

# What only experts and state-space layers read, and notes of how training started.
_UNREAD = frozenset({
    "init_method", "mamba_chunk_size", "mamba_conv_bias", "mamba_d_conv", "mamba_d_head", "mamba_d_state",
    "mamba_expand", "mamba_n_groups", "mamba_n_heads", "mamba_proj_bias", "num_experts_per_tok",
    "router_aux_loss_coef", "time_step_limit",
})  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "normalization_function": ("rmsnorm",),
    "num_local_experts": (0,),
    "output_router_logits": (False,),
}
_MODULES = {"mlp.down_proj": "shared_mlp.output_linear"}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    count, attention_bias = positive(hf, "num_hidden_layers"), flag(hf, "attention_bias")
    types = hf.get("layer_types") or hf.get("layers_block_type") or ["mamba"]
    if any(kind not in ("attention", "full_attention") for kind in types) or len(types) != count:
        raise InputError(
            "config.json: layer_types has to be attention for every layer; Granite 4 models with state-space (mamba) "
            "layers are not supported, its dense ones (350M, 1B, micro) are."
        )
    told = choice(
        {"position_embedding_type": "nope"} | dict(hf),
        "position_embedding_type",
        {"rope": True, "nope": False},
        "nope",
    )
    return read_common(
        {"num_local_experts": 8} | dict(hf),
        family="granite4",
        known=_UNREAD
        | FACTOR_KEYS
        | {
            "attention_bias",
            "layer_types",
            "layers_block_type",
            "position_embedding_type",
            "shared_intermediate_size",
        },
        neutral=_NEUTRAL,
        head_dim=derived_head_dim(hf),
        intermediate_size=positive(hf, "shared_intermediate_size", 1024),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        layer_ropes=() if told else ("none",) * count,
        **read_factors(hf),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    hf = write_common(config, "granitemoehybrid", "GraniteMoeHybridForCausalLM") | write_factors(config)
    return hf | {
        "attention_bias": config.qkv_bias,
        "layer_types": ["attention"] * config.num_layers,
        # Of state-space layers that are not there; transformers checks that it divides their width.
        "mamba_n_heads": math.gcd(128, 2 * config.hidden_size),
        "num_experts_per_tok": 0,
        "num_local_experts": 0,
        "position_embedding_type": None if config.layer_ropes else "rope",
        "shared_intermediate_size": config.intermediate_size,
    }


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    return llama_tensor_names(config, _MODULES)


def fused(config: DecoderConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """The tensors that the file holds as one."""
    tensors = fused_tensors(config, ("mlp.gate_up_proj",))
    return {
        name.replace("mlp.gate_up_proj", "shared_mlp.input_linear"): parts for name, parts in tensors.items()
    }


FAMILY = Family("granite4", ("granitemoehybrid",), config_from_hf, config_to_hf, tensor_names, fused)
