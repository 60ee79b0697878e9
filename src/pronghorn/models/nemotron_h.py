"""Nemotron-H and Nemotron Nano 2, dense (4B to 56B).

Special: a layer has one norm, and is a state-space mixer, attention or a feed-forward network
(`hybrid_override_pattern`: M, * and -, or `layers_block_type`); relu² without a gate; no positions; names of its own
for every module, whose files say "backbone" where transformers says "model". The heads that predict further tokens
(mtp) are left out, as in transformers.
"""

import math
from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    choice,
    flag,
    number,
    positive,
    read_common,
    write_common,
)
from pronghorn.models.state_space_config import StateSpaceConfig
from pronghorn.models.state_space_json import CONVOLVED_WITH, mixer_leaves

# What only experts and further heads read, how something starts, and how transformers computes the same.
_UNREAD = frozenset({
    "chunk_size", "expand", "moe_intermediate_size", "moe_latent_size", "moe_shared_expert_intermediate_size",
    "moe_shared_expert_overlap", "mtp_hybrid_override_pattern", "mtp_layers_block_type", "n_group", "n_routed_experts",
    "n_shared_experts", "norm_topk_prob", "num_experts_per_tok", "num_logits_to_keep", "num_nextn_predict_layers",
    "output_router_logits", "rescale_prenorm_residual", "routed_scaling_factor", "time_step_floor", "time_step_max",
    "time_step_rank", "topk_group", "use_mamba_kernels",
})  # fmt: skip
_KNOWN = frozenset({
    "conv_kernel", "hybrid_override_pattern", "layer_types", "layers_block_type", "mamba_head_dim", "mamba_hidden_act",
    "mamba_num_heads", "mlp_bias", "n_groups", "ssm_state_size", "time_step_min", "use_bias", "use_conv_bias",
})  # fmt: skip
# Keys that transformers does not read either, as long as they say what it computes.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mamba_proj_bias": (False,),
    "mamba_ssm_cache_dtype": ("float32",),
    "residual_in_fp32": (False,),
    "time_step_limit": ([0.0, math.inf], (0.0, math.inf), [0.0, {"__float__": "Infinity"}]),
}
_OWN_CODE = frozenset({
    "configuration_nemotron_h.NemotronHConfig", "modeling_nemotron_h.NemotronHForCausalLM"
})  # fmt: skip
_LETTERS: dict[str, LayerKind] = {"M": "mamba", "*": "full", "-": "mlp"}
_NAMES: dict[str, LayerKind] = {
    "mamba": "mamba", "linear_attention": "mamba", "attention": "full", "full_attention": "full", "mlp": "mlp"
}  # fmt: skip


def _layer_kinds(hf: HfConfig) -> tuple[LayerKind, ...]:
    key = next((key for key in ("layers_block_type", "layer_types") if hf.get(key) is not None), None)
    key = key or "hybrid_override_pattern"
    kinds, known = hf.get(key), _LETTERS if key == "hybrid_override_pattern" else _NAMES
    if not isinstance(kinds, list | tuple | str) or not kinds:
        raise InputError(f"config.json lacks {key}, which says what each layer is; the file is incomplete.")
    unknown = sorted({str(kind) for kind in kinds} - set(known))
    if unknown:
        raise InputError(
            f"config.json: {key} has {unknown[0][:40]!r}; supported are {', '.join(known)}, so use a dense Nemotron-H: "
            "experts without a gate (E, moe) are not supported."
        )
    if positive(hf, "num_hidden_layers", len(kinds)) != len(kinds):
        raise InputError(
            f"config.json: {key} has {len(kinds)} layers and num_hidden_layers is {hf['num_hidden_layers']}; correct "
            "the wrong one."
        )
    return tuple(known[kind] for kind in kinds)


def _mixer(hf: HfConfig) -> StateSpaceConfig:
    choice(hf, "mamba_hidden_act", CONVOLVED_WITH, "silu")
    bias = flag(hf, "use_bias")
    try:
        return StateSpaceConfig(
            heads=positive(hf, "mamba_num_heads", 128),
            head_dim=positive(hf, "mamba_head_dim", 64),
            groups=positive(hf, "n_groups", 8),
            state_dim=positive(hf, "ssm_state_size", 128),
            conv_width=positive(hf, "conv_kernel", 4),
            conv_bias=flag(hf, "use_conv_bias", True),
            input_bias=bias,
            output_bias=bias,
            step_limits=(number(hf, "time_step_min", 0.001), math.inf),
        )
    except ValueError as error:
        raise InputError(f"config.json describes no possible state-space mixer: {error}.") from error


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    kinds, head_dim = _layer_kinds(hf), positive(hf, "head_dim", 128)
    if flag(hf, "tie_word_embeddings"):
        raise InputError(
            "config.json: tie_word_embeddings is true, and transformers has a head of its own in every Nemotron-H; set "
            "it to false if the file has lm_head.weight."
        )
    defaults = {"intermediate_size": 21504, "max_position_embeddings": 4096, "mlp_hidden_act": "relu2"}
    return read_common(
        defaults | {"layer_norm_epsilon": 1e-5} | dict(hf) | {"num_hidden_layers": len(kinds)},
        family="nemotron_h",
        known=_KNOWN | _UNREAD,
        neutral=_NEUTRAL | {"attention_head_dim": (head_dim,)},
        own_code=_OWN_CODE,
        default_kv_heads=8,
        eps_key="layer_norm_epsilon",
        activation_key="mlp_hidden_act",
        head_dim=head_dim,
        gated_mlp=False,
        mlp_bias=flag(hf, "mlp_bias"),
        block="single",
        layer_kinds=kinds,
        layer_ropes=("none",) * len(kinds),
        state_space=_mixer(hf) if "mamba" in kinds else None,
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    keys = {"eps_key": "layer_norm_epsilon", "activation_key": "mlp_hidden_act"}
    hf = write_common(config, "nemotron_h", "NemotronHForCausalLM", **keys)
    del hf["rope_theta"], hf["rope_scaling"]  # no layer is told positions
    letters = {kind: letter for letter, kind in _LETTERS.items()}
    hf |= {
        "hybrid_override_pattern": "".join(letters[kind] for kind in config.layer_kinds),
        "mlp_bias": config.mlp_bias,
    }
    mixer = config.state_space
    if mixer is None:
        return hf
    return hf | {
        "conv_kernel": mixer.conv_width,
        "mamba_head_dim": mixer.head_dim,
        "mamba_num_heads": mixer.heads,
        "n_groups": mixer.groups,
        "ssm_state_size": mixer.state_dim,
        "time_step_min": mixer.step_limits[0],
        "use_bias": mixer.input_bias,
        "use_conv_bias": mixer.conv_bias,
    }


def tensor_names(config: DecoderConfig, top: str = "backbone") -> dict[str, str]:
    """Our name -> the checkpoint's, which has `top` in front of all but the head."""
    biased = ["weight", *["bias"] * config.mlp_bias]
    mixer = config.state_space
    parts: dict[str, tuple[str, list[str]]] = {
        "full": ("self_attn", [f"{p}_proj.weight" for p in "qkvo"]),
        "mlp": ("mlp", [f"{p}_proj.{leaf}" for p in ("up", "down") for leaf in biased]),
        "mamba": ("mamba", mixer_leaves(mixer) if mixer is not None else []),
    }
    names = {"embed_tokens.weight": f"{top}.embeddings.weight", "norm.weight": f"{top}.norm_f.weight"}
    for index, kind in enumerate(config.layer_kinds):
        ours, theirs = f"layers.{index}.", f"{top}.layers.{index}."
        names[f"{ours}input_layernorm.weight"] = f"{theirs}norm.weight"
        module, leaves = parts[kind]
        names |= {f"{ours}{module}.{leaf}": f"{theirs}mixer.{leaf}" for leaf in leaves}
    return names | {"lm_head.weight": "lm_head.weight"}


def module_tensors(config: DecoderConfig) -> dict[str, str]:
    """Our name -> that of transformers."""
    return tensor_names(config, "model")


def further_heads(hf: HfConfig) -> tuple[str, ...]:
    """How the names of tensors begin that predict further tokens."""
    return ("mtp.",)


FAMILY = Family(
    "nemotron_h",
    ("nemotron_h",),
    config_from_hf,
    config_to_hf,
    tensor_names,
    module_tensors=module_tensors,
    left_out=further_heads,
    unadapted=("mamba.out_proj",),
)
