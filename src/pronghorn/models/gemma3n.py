"""Gemma 3n (E2B, E4B): text models, and text towers of the wrappers.

Special: as Gemma 3, but norms store their weight itself and attention is not scaled; values are divided by their rms;
the last layers read the keys and values of those before them; every layer has an input of its own; four residual
streams of which a layer computes one (AltUp), a low-rank product beside attention (LAuReL), and gates of which the
first layers keep what is far over their mean. transformers clips AltUp's coefficients in training (`altup_coef_clip`),
at a hundred times what they are; here they are never clipped.
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    flag,
    number,
    positive,
    read_common,
    read_layer_ropes,
    read_layer_types,
    write_common,
    write_layer_ropes,
    write_layer_types,
)
from pronghorn.models.extras_config import AltUpConfig, ExtrasConfig
from pronghorn.models.gemma4 import whole
from pronghorn.models.tensor_names import extended_tensor_names, shared_key_values

_KNOWN = frozenset({
    "activation_sparsity_pattern", "altup_active_idx", "altup_coef_clip", "altup_correct_scale", "altup_num_inputs",
    "attention_bias", "final_logit_softcapping", "hidden_size_per_layer_input", "laurel_rank", "layer_types",
    "num_kv_shared_layers", "rope_local_base_freq", "sliding_window", "vocab_size_per_layer_input",
})  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262400,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
    "altup_num_inputs": 4,
    "laurel_rank": 64,
}


def _by_layer(hf: HfConfig, key: str, value: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) != count:
        raise InputError(f"config.json: {key} has to be a list of {count} numbers, one a layer.")
    return tuple(value)


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    cap = hf.get("final_logit_softcapping", 30.0)
    hf = _DEFAULTS | {key: value for key, value in hf.items() if value is not None or key not in _DEFAULTS}
    count = positive(hf, "num_hidden_layers")
    kinds = tuple[LayerKind, ...]("full" if (i + 1) % 5 == 0 else "sliding" for i in range(count))
    kinds = read_layer_types(hf, kinds)
    sizes, sparsity = hf["intermediate_size"], hf.get("activation_sparsity_pattern")
    widths = _by_layer(hf, "intermediate_size", sizes, count) if isinstance(sizes, list | tuple) else (sizes,)
    if sparsity is None:
        sparsity = [0.95 if count > 10 and i < 10 else 0.0 for i in range(count)]
    shares = _by_layer(hf, "activation_sparsity_pattern", sparsity, count)
    shares = tuple(number({"activation_sparsity_pattern": s}, "activation_sparsity_pattern") for s in shares)
    widths = tuple(positive({"intermediate_size": width}, "intermediate_size") for width in widths)
    rope, local_rope = read_layer_ropes(
        hf,
        head_dim=positive(hf, "head_dim"),
        local_base=number(hf, "rope_local_base_freq", 1e4),
    )
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        hf | {"intermediate_size": widths[0]},
        family="gemma3n",
        known=_KNOWN,
        activation_key="hidden_activation",
        layer_kinds=kinds,
        layer_ropes=tuple("local" if kind == "sliding" else "global" for kind in kinds),
        rope=rope,
        local_rope=local_rope,
        block="sandwich",
        qk_norm=True,
        attention_scale=1.0,
        sliding_window=positive(hf, "sliding_window"),
        embedding_scale=positive(hf, "hidden_size") ** 0.5,
        logit_softcap=None if cap is None else number(hf, "final_logit_softcapping", 30.0),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        extras=ExtrasConfig(
            value_norm=True,
            shared_kv_layers=whole(hf, "num_kv_shared_layers", 15),
            layer_widths=widths if len(set(widths)) > 1 else (),
            gate_sparsity=shares if any(shares) else (),
            input_width=positive(hf, "hidden_size_per_layer_input"),
            input_vocab=positive(hf, "vocab_size_per_layer_input"),
            altup=AltUpConfig(
                streams=positive(hf, "altup_num_inputs"),
                active=whole(hf, "altup_active_idx"),
                scale_corrected=flag(hf, "altup_correct_scale", True),
                laurel_rank=positive(hf, "laurel_rank"),
            ),
        ),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    extras = config.extras
    assert extras is not None and extras.altup is not None
    hf = write_common(config, "gemma3n_text", "Gemma3nForCausalLM", activation_key="hidden_activation")
    del hf["rope_theta"], hf["rope_scaling"]
    return hf | {
        "rope_parameters": write_layer_ropes(config),
        "intermediate_size": list(extras.layer_widths) or config.intermediate_size,
        "attention_bias": config.qkv_bias,
        "final_logit_softcapping": config.logit_softcap,
        "layer_types": write_layer_types(config),
        "sliding_window": config.sliding_window,
        "num_kv_shared_layers": extras.shared_kv_layers,
        "activation_sparsity_pattern": list(extras.gate_sparsity) or [0.0] * config.num_layers,
        "hidden_size_per_layer_input": extras.input_width,
        "vocab_size_per_layer_input": extras.input_vocab,
        "altup_num_inputs": extras.altup.streams,
        "altup_active_idx": extras.altup.active,
        "altup_correct_scale": extras.altup.scale_corrected,
        "laurel_rank": extras.altup.laurel_rank,
    }


FAMILY = Family(
    "gemma3n",
    ("gemma3n_text",),
    config_from_hf,
    config_to_hf,
    extended_tensor_names,
    left_out=lambda hf: shared_key_values(config_from_hf(hf)),
)
