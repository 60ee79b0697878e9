"""Phi 3, 3.5 and 4 (mini and medium; text).

Special: q, k and v are one tensor in the file, and so are gate and up; rope of kind longrope ("su" and "yarn" are old
names of it) with the original context beside it; Phi 4 mini rotates a part of each head and is tied; a window on every
layer where `sliding_window` is set.
"""

from collections.abc import Mapping
from typing import Any

from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import Family, HfConfig, positive, read_common, write_common
from pronghorn.models.tensor_names import fused_tensors, llama_tensor_names

_OWN_CODE = frozenset({"configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"})
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "lm_head_bias": (False,),
    "mlp_bias": (False,),
}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    } | dict(hf)
    for name in ("rope_scaling", "rope_parameters"):
        scaling = hf.get(name)
        if isinstance(scaling, Mapping) and {scaling.get("type"), scaling.get("rope_type")} & {"su", "yarn"}:
            hf[name] = {**scaling, "type": "longrope", "rope_type": "longrope"}
    window = positive(hf, "sliding_window") if hf.get("sliding_window") is not None else None
    kind: LayerKind = "full" if window is None else "sliding"
    return read_common(
        hf,
        family="phi3",
        known=frozenset({"sliding_window"}),
        partial_rotary=1.0,
        neutral=_NEUTRAL,
        own_code=_OWN_CODE,
        sliding_window=window,
        layer_kinds=(kind,) * positive(hf, "num_hidden_layers"),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    hf = write_common(config, "phi3", "Phi3ForCausalLM") | {"sliding_window": config.sliding_window}
    if config.rope.kind == "longrope":
        hf["rope_scaling"]["type"] = "longrope"  # what readers of the first releases look at
        hf["original_max_position_embeddings"] = hf["rope_scaling"].pop("original_max_position_embeddings")
    return hf


def fused(config: DecoderConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """The tensors that the file holds as one."""
    return fused_tensors(config, ("self_attn.qkv_proj", "mlp.gate_up_proj"))


FAMILY = Family("phi3", ("phi3",), config_from_hf, config_to_hf, llama_tensor_names, fused)
