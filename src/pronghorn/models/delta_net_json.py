"""What the families of Qwen 3.5's layers share: gated delta nets, and gated attention between them.

Three layers of a delta net to one of attention (`layer_types`, or `full_attention_interval`); heads of q and k are
normalised, norms store their weight less one (but for that inside of the delta net), and a quarter of each head is
rotated. Sections of rope belong to images: on text alone all of them have the token's position. The heads that predict
further tokens (mtp) are left out, as in transformers.
"""

from collections.abc import Mapping
from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import HfConfig, flag, positive, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names

_KNOWN = frozenset({
    "attention_bias", "full_attention_interval", "layer_types", "linear_conv_kernel_dim", "linear_key_head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim", "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings",
})  # fmt: skip
# The state is fp32 here too; attention without its gate would be another model.
_NEUTRAL = {"attn_output_gate": (True,), "mamba_ssm_dtype": ("float32",), "use_sliding_window": (False,)}
_SECTIONS = ("mrope_section", "mrope_interleaved")
_KINDS: dict[str, LayerKind] = {"linear_attention": "linear", "full_attention": "full"}
_LEAVES = ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")


def _layer_kinds(hf: HfConfig) -> tuple[LayerKind, ...]:
    count, types = positive(hf, "num_hidden_layers"), hf.get("layer_types")
    if types is None:
        every = positive(hf, "full_attention_interval", 4)
        return tuple("linear" if (index + 1) % every else "full" for index in range(count))
    if not isinstance(types, list | tuple) or len(types) != count or not set(types) <= set(_KINDS):
        raise InputError(
            f"config.json: layer_types has to be one of {', '.join(_KINDS)} for each of {count} layers."
        )
    return tuple(_KINDS[kind] for kind in types)


def _without_sections(hf: HfConfig) -> dict[str, Any]:
    hf = dict(hf)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(hf.get(name), Mapping):
            hf[name] = {key: value for key, value in hf[name].items() if key not in _SECTIONS}
    return hf


def read_hybrid(
    hf: HfConfig, *, family: str, known: frozenset[str] = frozenset(), default_kv_heads: int, **specific: Any
) -> DecoderConfig:
    """A DecoderConfig from the keys that these families share; arguments as in `read_common`.

    Raises:
      InputError: as `read_common` does.
    """
    attention_bias = flag(hf, "attention_bias")
    fields: dict[str, Any] = {
        "head_dim": positive(hf, "head_dim", 256),
        "norm_weight_offset": 1.0,
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "qk_norm": True,
        "attention_gate": True,
        "layer_kinds": _layer_kinds(hf),
        "conv_width": positive(hf, "linear_conv_kernel_dim", 4),
        "linear_key_heads": positive(hf, "linear_num_key_heads", 16),
        "linear_value_heads": positive(hf, "linear_num_value_heads", 32),
        "linear_key_dim": positive(hf, "linear_key_head_dim", 128),
        "linear_value_dim": positive(hf, "linear_value_head_dim", 128),
    }
    return read_common(
        _without_sections({"max_position_embeddings": 32768} | dict(hf)),
        family=family,
        known=known | _KNOWN,
        neutral=_NEUTRAL,
        default_kv_heads=default_kv_heads,
        partial_rotary=0.25,
        **(fields | specific),
    )


def write_hybrid(config: DecoderConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The keys that `read_hybrid` reads."""
    names = {kind: name for name, kind in _KINDS.items()}
    return write_common(config, model_type, architecture) | {
        "attention_bias": config.qkv_bias,
        "partial_rotary_factor": config.rope.partial_rotary_factor,
        "layer_types": [names[kind] for kind in config.layer_kinds],
        "linear_conv_kernel_dim": config.conv_width,
        "linear_num_key_heads": config.linear_key_heads,
        "linear_num_value_heads": config.linear_value_heads,
        "linear_key_head_dim": config.linear_key_dim,
        "linear_value_head_dim": config.linear_value_dim,
    }


def hybrid_tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    names = llama_tensor_names(config)
    parts = ("qkvz", "ba") if config.linear_by_key_head else ("qkv", "z", "b", "a")
    leaves = [*(f"in_proj_{part}.weight" for part in parts), *_LEAVES]
    for index, kind in enumerate(config.layer_kinds):
        if kind == "linear":
            prefix = f"layers.{index}."
            names = {ours: name for ours, name in names.items() if not ours.startswith(f"{prefix}self_attn.")}
            names |= {f"{prefix}linear_attn.{leaf}": f"model.{prefix}linear_attn.{leaf}" for leaf in leaves}
    return names


def further_heads(hf: HfConfig) -> tuple[str, ...]:
    """How the names of tensors begin that predict further tokens."""
    return ("mtp.",)
