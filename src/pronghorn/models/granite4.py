"""Granite 4: dense (350M, 1B, micro), and with state-space layers in front of a few that attend (h-350m to h-micro).

Special: the factors of Granite 3; gate and up are one tensor in the file, and the MLP is called shared; some are told
no positions (`position_embedding_type` null or "nope"); a state-space mixer multiplies by its gate in front of its
norm.
"""

import math
from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig, LayerKind
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
from pronghorn.models.state_space_json import (
    STATE_SPACE_KEYS,
    hybrid_state_space_names,
    read_state_space,
    write_state_space,
)
from pronghorn.models.tensor_names import fused_tensors

_KNOWN = frozenset({
    "attention_bias", "layer_types", "layers_block_type", "position_embedding_type", "shared_intermediate_size",
})  # fmt: skip
# What only experts read, and notes of how training started.
_UNREAD = frozenset({"init_method", "num_experts_per_tok", "router_aux_loss_coef"})
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "normalization_function": ("rmsnorm",),
    "num_local_experts": (0,),
    "output_router_logits": (False,),
}
# The first two are the names of transformers 4.
_KINDS: dict[str, LayerKind] = {
    "mamba": "mamba", "attention": "full", "linear_attention": "mamba", "full_attention": "full"
}  # fmt: skip
_MODULES = {"mlp.down_proj": "shared_mlp.output_linear"}


def _layer_kinds(hf: HfConfig) -> tuple[LayerKind, ...]:
    count = positive(hf, "num_hidden_layers")
    types = hf.get("layer_types") or hf.get("layers_block_type") or ["mamba"] * count
    if not isinstance(types, list | tuple) or len(types) != count or not set(types) <= set(_KINDS):
        raise InputError(
            f"config.json: layer_types has to be one of {', '.join(_KINDS)} for each of {count} layers."
        )
    return tuple(_KINDS[kind] for kind in types)


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    kinds, attention_bias = _layer_kinds(hf), flag(hf, "attention_bias")
    told = choice(
        {"position_embedding_type": "nope"} | dict(hf),
        "position_embedding_type",
        {"rope": True, "nope": False},
        "nope",
    )
    mixer = None
    if "mamba" in kinds:
        mixer = read_state_space(hf, output_bias=flag(hf, "mamba_proj_bias"))
    return read_common(
        {"num_local_experts": 8} | dict(hf),
        family="granite4",
        known=_UNREAD | _KNOWN | FACTOR_KEYS | STATE_SPACE_KEYS,
        neutral=_NEUTRAL,
        head_dim=derived_head_dim(hf),
        intermediate_size=positive(hf, "shared_intermediate_size", 1024),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        layer_kinds=kinds,
        layer_ropes=() if told else ("none",) * len(kinds),
        state_space=mixer,
        **read_factors(hf),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    hf = write_common(config, "granitemoehybrid", "GraniteMoeHybridForCausalLM") | write_factors(config)
    if config.state_space is None:
        # Of state-space layers that are not there; transformers checks that it divides their width.
        hf["mamba_n_heads"] = math.gcd(128, 2 * config.hidden_size)
    else:
        expand = config.state_space.width // config.hidden_size
        hf |= write_state_space(config) | {"mamba_expand": expand}
    return hf | {
        "attention_bias": config.qkv_bias,
        "layer_types": ["mamba" if kind == "mamba" else "attention" for kind in config.layer_kinds],
        "num_experts_per_tok": 0,
        "num_local_experts": 0,
        "position_embedding_type": None if config.layer_ropes else "rope",
        "shared_intermediate_size": config.intermediate_size,
    }


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    return hybrid_state_space_names(config, _MODULES)


def fused(config: DecoderConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """The tensors that the file holds as one."""
    tensors = fused_tensors(config, ("mlp.gate_up_proj",))
    return {
        name.replace("mlp.gate_up_proj", "shared_mlp.input_linear"): parts for name, parts in tensors.items()
    }


FAMILY = Family("granite4", ("granitemoehybrid",), config_from_hf, config_to_hf, tensor_names, fused)
