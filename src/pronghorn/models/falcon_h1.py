"""Falcon-H1 (0.5B to 34B).

Special: every layer attends and has a state-space mixer beside attention, which reads the same norm; factors on nearly
everything (Yang et al. 2022, muP); the mixer's norm may be left out, or stand in front of its gate.
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    flag,
    number,
    positive,
    read_common,
    write_common,
)
from pronghorn.models.state_space_config import GatedNorm, StateSpaceConfig
from pronghorn.models.state_space_json import (
    STATE_SPACE_KEYS,
    hybrid_state_space_names,
    read_state_space,
    write_state_space,
)

_FACTORS = {
    "embedding_scale": "embedding_multiplier",
    "logit_scale": "lm_head_multiplier",
    "attention_input_scale": "attention_in_multiplier",
    "attention_output_scale": "attention_out_multiplier",
    "key_scale": "key_multiplier",
}
_MIXER_FACTORS = {"input_scale": "ssm_in_multiplier", "output_scale": "ssm_out_multiplier"}
# The last two say how something starts, or what is returned while generating.
_KNOWN = frozenset({
    "attention_bias", "mamba_d_ssm", "mamba_norm_before_gate", "mamba_rms_norm", "mlp_bias", "mlp_multipliers",
    "projectors_bias", "ssm_multipliers", "mlp_expansion_factor", "num_logits_to_keep",
    *_FACTORS.values(), *_MIXER_FACTORS.values(),
})  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {"attn_layer_indices": (), "mamba_use_mlp": (True,)}
_MODULES = {
    "post_attention_layernorm": "pre_ff_layernorm",
    **{f"mlp.{p}_proj": f"feed_forward.{p}_proj" for p in ("gate", "up", "down")},
}


def _factors(hf: HfConfig, key: str, count: int) -> tuple[float, ...]:
    values = hf.get(key)
    values = [1.0] * count if values is None else values
    if not isinstance(values, list | tuple) or len(values) != count:
        raise InputError(f"config.json: {key} has to be a list of {count} numbers.")
    return tuple(number({key: value}, key) for value in values)


def _mixer(hf: HfConfig) -> StateSpaceConfig:
    norm: GatedNorm = "norm_first" if flag(hf, "mamba_norm_before_gate", True) else "gate_first"
    derived = "mamba_d_ssm" in hf and hf["mamba_d_ssm"] is None
    return read_state_space(
        hf,
        width=None if derived else positive(hf, "mamba_d_ssm", 1024),
        output_bias=flag(hf, "projectors_bias"),
        gated_norm=norm if flag(hf, "mamba_rms_norm") else "none",
        part_scales=_factors(hf, "ssm_multipliers", 5),
        **{ours: number(hf, theirs, 1.0) for ours, theirs in _MIXER_FACTORS.items()},
    )


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    attention_bias = flag(hf, "attention_bias")
    gate_scale, mlp_output_scale = _factors(hf, "mlp_multipliers", 2)
    factors: dict[str, Any] = {ours: number(hf, theirs, 1.0) for ours, theirs in _FACTORS.items()}
    return read_common(
        {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5} | dict(hf),
        family="falcon_h1",
        known=_KNOWN | STATE_SPACE_KEYS,
        neutral=_NEUTRAL,
        default_kv_heads=8,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(hf, "mlp_bias"),
        layer_kinds=("hybrid",) * positive(hf, "num_hidden_layers"),
        state_space=_mixer(hf),
        gate_scale=gate_scale,
        mlp_output_scale=mlp_output_scale,
        **factors,
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    mixer = config.state_space
    assert mixer is not None
    hf = write_common(config, "falcon_h1", "FalconH1ForCausalLM") | write_state_space(config)
    hf |= {theirs: getattr(config, ours) for ours, theirs in _FACTORS.items()}
    hf |= {theirs: getattr(mixer, ours) for ours, theirs in _MIXER_FACTORS.items()}
    return hf | {
        "attention_bias": config.qkv_bias,
        "mamba_d_ssm": mixer.width,
        "mamba_norm_before_gate": mixer.gated_norm == "norm_first",
        "mamba_rms_norm": mixer.gated_norm != "none",
        "mlp_bias": config.mlp_bias,
        "mlp_multipliers": [config.gate_scale, config.mlp_output_scale],
        "projectors_bias": mixer.output_bias,
        "ssm_multipliers": list(mixer.part_scales),
    }


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    names = hybrid_state_space_names(config, _MODULES)
    return names | {"norm.weight": "model.final_layernorm.weight"}


FAMILY = Family(
    "falcon_h1",
    ("falcon_h1",),
    config_from_hf,
    config_to_hf,
    tensor_names,
    unadapted=("mamba.out_proj",),
)
