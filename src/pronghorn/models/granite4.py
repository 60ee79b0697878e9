"""Granite 4: dense (350M, 1B, micro), with state-space layers (h-350m, h-1b, h-micro), and with experts too (h-tiny,
h-small).

Special: the factors of Granite 3; gate and up are one tensor in the file, those of all experts as well, and the MLP is
called shared: it is the shared expert where there are others; some are told no positions (`position_embedding_type`
null or "nope"); a state-space mixer multiplies by its gate in front of its norm.
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
    whole,
    write_common,
)
from pronghorn.models.experts_json import read_experts, write_experts
from pronghorn.models.granite import FACTOR_KEYS, read_factors, write_factors
from pronghorn.models.state_space_json import (
    STATE_SPACE_KEYS,
    hybrid_state_space_names,
    read_state_space,
    write_state_space,
)
from pronghorn.models.tensor_names import InterleavedTensor

_KNOWN = frozenset({
    "attention_bias", "init_method", "layer_types", "layers_block_type", "position_embedding_type",
    "shared_intermediate_size",
})  # fmt: skip
_EXPERT_KEYS = frozenset({"num_experts_per_tok", "num_local_experts", "router_aux_loss_coef"})
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "normalization_function": ("rmsnorm",),
    "output_router_logits": (False,),
}
# The first two are the names of transformers 4.
_KINDS: dict[str, LayerKind] = {
    "mamba": "mamba", "attention": "full", "linear_attention": "mamba", "full_attention": "full"
}  # fmt: skip
_ROUTER = "block_sparse_moe.router"
_MODULES = {
    "mlp.down_proj": "shared_mlp.output_linear",
    "mlp.shared_expert.down_proj": "shared_mlp.output_linear",
    "mlp.gate": f"{_ROUTER}.layer",
    **{f"mlp.experts.{p}_proj": f"block_sparse_moe.experts.{p}_proj" for p in ("gate", "up", "down")},
}


def _layer_kinds(hf: HfConfig) -> tuple[LayerKind, ...]:
    count = positive(hf, "num_hidden_layers")
    types = hf.get("layer_types") or hf.get("layers_block_type") or ["mamba"] * count
    if (
        not isinstance(types, list | tuple)
        or len(types) != count
        or not {str(t) for t in types} <= set(_KINDS)
    ):
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
    width, shared = positive(hf, "intermediate_size", 11008), positive(hf, "shared_intermediate_size", 1024)
    experts = None
    if whole(hf, "num_local_experts", 8):
        experts = read_experts(
            hf,
            count=8,
            chosen=2,
            coefficient=0.001,
            width=width,
            router="softmax_after_top_k",
            shared_width=shared,
        )
    return read_common(
        hf,
        family="granite4",
        known=_KNOWN | _EXPERT_KEYS | FACTOR_KEYS | STATE_SPACE_KEYS,
        neutral=_NEUTRAL if experts is None else _NEUTRAL | {"output_router_logits": (False, True)},
        head_dim=derived_head_dim(hf),
        intermediate_size=width if experts else shared,
        experts=experts,
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
    hf |= {"num_experts_per_tok": 0, "num_local_experts": 0}
    if config.experts is not None:
        hf |= write_experts(config, "num_local_experts")
    return hf | {
        "attention_bias": config.qkv_bias,
        "layer_types": ["mamba" if kind == "mamba" else "attention" for kind in config.layer_kinds],
        "position_embedding_type": None if config.layer_ropes else "rope",
        "shared_intermediate_size": _shared(config)[1],
    }


def _shared(config: DecoderConfig) -> tuple[str, int]:
    """The module that every token goes through, and its width."""
    if config.experts is None:
        return "mlp", config.intermediate_size
    return "mlp.shared_expert", config.experts.shared_width


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    return hybrid_state_space_names(config, _MODULES)


def module_tensors(config: DecoderConfig) -> dict[str, str]:
    """Our name -> that of transformers, whose router is no linear layer."""
    names = tensor_names(config)
    return {ours: name.replace(f"{_ROUTER}.layer.", f"{_ROUTER}.") for ours, name in names.items()}


def fused(config: DecoderConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """The tensors that the file holds as one."""
    module, width = _shared(config)
    layers = [f"model.layers.{index}." for index in range(config.num_layers)]
    return {
        f"{layer}shared_mlp.input_linear.weight": tuple(
            (f"{layer}{module}.{part}_proj.weight", width) for part in ("gate", "up")
        )
        for layer in layers
    }


def interleaved_tensors(config: DecoderConfig) -> dict[str, InterleavedTensor]:
    """The experts' tensors of every layer: gate's rows of an expert, then up's."""
    found = {}
    for index in range(config.num_layers if config.experts else 0):
        moe = f"model.layers.{index}.block_sparse_moe."
        for name, projections in (("input_linear", ("gate", "up")), ("output_linear", ("down",))):
            parts = tuple(f"{moe}experts.{part}_proj.weight" for part in projections)
            found[f"{moe}{name}.weight"] = InterleavedTensor(
                parts, transposed=False, in_turn=False, by_rows=True
            )
    return found


FAMILY = Family(
    "granite4",
    ("granitemoehybrid",),
    config_from_hf,
    config_to_hf,
    tensor_names,
    fused,
    module_tensors=module_tensors,
    interleaved_tensors=interleaved_tensors,
)
