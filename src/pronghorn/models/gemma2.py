"""Gemma 2.

Special: as Gemma 1, and a norm before and after each half of a layer; every other layer, from the first on, slides;
soft caps on attention's logits and on the final ones; attention is scaled by query_pre_attn_scalar ** -0.5.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    number,
    positive,
    read_common,
    read_layer_types,
    write_common,
    write_layer_types,
)
from pronghorn.models.gemma import DEFAULTS, gemma_switches
from pronghorn.models.tensor_names import llama_tensor_names

KNOWN = frozenset({
    "attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "layer_types", "query_pre_attn_scalar",
    "sliding_window",
})  # fmt: skip
_DEFAULTS = DEFAULTS | {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
}


def sandwich_switches(hf: HfConfig) -> dict[str, Any]:
    """What Gemma 2 and 3 share. A soft cap of null is none."""
    return gemma_switches(hf) | {
        "block": "sandwich",
        "attention_scale": number(hf, "query_pre_attn_scalar", 256) ** -0.5,
        "sliding_window": positive(hf, "sliding_window", 4096),
        **{
            ours: None if hf.get(theirs) is None else number(hf, theirs)
            for ours, theirs in (
                ("attention_softcap", "attn_logit_softcapping"),
                ("logit_softcap", "final_logit_softcapping"),
            )
        },
    }


def read(hf: HfConfig, *, family: str, **switches: Any) -> DecoderConfig:
    """Gemma 2 and what differs from it in a few switches."""
    hf = _DEFAULTS | dict(hf)
    kinds: tuple[LayerKind, ...] = ("sliding", "full")
    count = positive(hf, "num_hidden_layers")
    return read_common(
        hf,
        family=family,
        known=KNOWN,
        default_kv_heads=4,
        activation_key="hidden_activation",
        layer_kinds=read_layer_types(hf, tuple(kinds[i % 2] for i in range(count))),
        **(sandwich_switches(hf) | switches),
    )


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    return read(hf, family="gemma2")


def write_sandwich(config: DecoderConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The keys of Gemma 2 and 3."""
    assert config.attention_scale is not None
    scalar = config.attention_scale**-2
    return write_common(config, model_type, architecture, activation_key="hidden_activation") | {
        "attention_bias": config.qkv_bias,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "layer_types": write_layer_types(config),
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "sliding_window": config.sliding_window,
    }


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_sandwich(config, "gemma2", "Gemma2ForCausalLM")


FAMILY = Family("gemma2", ("gemma2",), config_from_hf, config_to_hf, llama_tensor_names)
