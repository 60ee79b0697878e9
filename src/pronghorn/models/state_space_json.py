"""Reading and writing what a `config.json` says of state-space mixers, by the keys that several families share."""

import math
from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import ATTENDING_KINDS, STATE_SPACE_KINDS, DecoderConfig
from pronghorn.models.config_json import HfConfig, choice, flag, positive
from pronghorn.models.state_space_config import StateSpaceConfig
from pronghorn.models.tensor_names import llama_tensor_names

# mamba_chunk_size says how transformers computes the same, and is not read.
STATE_SPACE_KEYS = frozenset({
    "mamba_chunk_size", "mamba_conv_bias", "mamba_d_conv", "mamba_d_head", "mamba_d_state", "mamba_expand",
    "mamba_n_groups", "mamba_n_heads", "mamba_proj_bias", "time_step_limit",
})  # fmt: skip
CONVOLVED_WITH = {"silu": "silu", "swish": "silu"}  # the activation behind a mixer's convolution
_INFINITY = {"__float__": "Infinity"}  # as transformers 5 writes it


def read_state_space(hf: HfConfig, *, width: int | None = None, **specific: Any) -> StateSpaceConfig:
    """A StateSpaceConfig from the keys of STATE_SPACE_KEYS.

    Args:
      width: dims of all heads; None for mamba_expand times hidden_size.
      specific: the other fields.

    Raises:
      InputError: a key has a value that cannot be, or the heads do not make up the width.
    """
    choice(hf, "hidden_act", CONVOLVED_WITH, "silu")
    heads = positive(hf, "mamba_n_heads", 128)
    if width is None:
        width = positive(hf, "mamba_expand", 2) * positive(hf, "hidden_size")
    derived = hf.get("mamba_d_head") in (None, "auto")
    head_dim = width // heads if derived else positive(hf, "mamba_d_head")
    if heads * head_dim != width:
        raise InputError(
            f"config.json: {heads} state-space heads (mamba_n_heads) of {head_dim} dims (mamba_d_head) are not the "
            f"{width} that the mixer is wide (mamba_expand times hidden_size, or mamba_d_ssm); correct one of them."
        )
    fields: dict[str, Any] = {
        "heads": heads,
        "head_dim": head_dim,
        "groups": positive(hf, "mamba_n_groups", 1),
        "state_dim": positive(hf, "mamba_d_state", 256),
        "conv_width": positive(hf, "mamba_d_conv", 4),
        "conv_bias": flag(hf, "mamba_conv_bias", True),
        "input_bias": flag(hf, "mamba_proj_bias"),
        "step_limits": _step_limits(hf),
    }
    try:
        return StateSpaceConfig(**(fields | specific))
    except ValueError as error:
        raise InputError(f"config.json describes no possible state-space mixer: {error}.") from error


def _step_limits(hf: HfConfig) -> tuple[float, float]:
    limits = hf.get("time_step_limit")
    if limits is None:
        return (0.0, math.inf)
    if isinstance(limits, list | tuple) and len(limits) == 2:
        numbers = [math.inf if limit == _INFINITY else limit for limit in limits]
        if all(isinstance(limit, int | float) and not isinstance(limit, bool) for limit in numbers):
            return (float(numbers[0]), float(numbers[1]))
    raise InputError(f"config.json: time_step_limit has to be two numbers, and is {str(limits)[:40]}.")


def write_state_space(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_state_space` reads, but for a width of its own."""
    mixer = config.state_space
    assert mixer is not None
    return {
        "mamba_conv_bias": mixer.conv_bias,
        "mamba_d_conv": mixer.conv_width,
        "mamba_d_head": mixer.head_dim,
        "mamba_d_state": mixer.state_dim,
        "mamba_n_groups": mixer.groups,
        "mamba_n_heads": mixer.heads,
        "mamba_proj_bias": mixer.input_bias,
        "time_step_limit": [_INFINITY if math.isinf(limit) else limit for limit in mixer.step_limits],
    }


def mixer_leaves(mixer: StateSpaceConfig) -> list[str]:
    """The names of a mixer's parameters within it, which all families share."""
    leaves = ["A_log", "D", "dt_bias", "conv1d.weight", *["conv1d.bias"] * mixer.conv_bias]
    leaves += ["norm.weight"] * (mixer.gated_norm != "none")
    leaves += ["in_proj.weight", *["in_proj.bias"] * mixer.input_bias]
    return [*leaves, "out_proj.weight", *["out_proj.bias"] * mixer.output_bias]


def hybrid_state_space_names(config: DecoderConfig, modules: dict[str, str]) -> dict[str, str]:
    """`llama_tensor_names` of a decoder with mixers, without the attention that layers do not have."""
    names, mixer = llama_tensor_names(config, modules), config.state_space
    if mixer is None:
        return names
    leaves = mixer_leaves(mixer)
    for index, kind in enumerate(config.layer_kinds):
        prefix = f"layers.{index}."
        if kind not in ATTENDING_KINDS:
            names = {ours: name for ours, name in names.items() if not ours.startswith(f"{prefix}self_attn.")}
        if kind in STATE_SPACE_KINDS:
            names |= {f"{prefix}mamba.{leaf}": f"model.{prefix}mamba.{leaf}" for leaf in leaves}
    return names
