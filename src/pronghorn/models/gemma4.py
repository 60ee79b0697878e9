"""Gemma 4, the dense ones (E2B, E4B, 31B): text models, and text towers of the wrappers.

Special: as Gemma 3, but norms store their weight itself and attention is not scaled; values are divided by their rms;
full layers have heads of another size (`global_head_dim`), maybe other numbers of them, and maybe no v_proj; a quarter
of the pairs of each full head is rotated; the last layers read the keys and values of those before them and may be
twice as wide; every layer has an input of its own, and a factor. Mixtures of experts are refused.
"""

from collections.abc import Mapping
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
from pronghorn.models.extras_config import ExtrasConfig
from pronghorn.models.tensor_names import extended_tensor_names, shared_key_values

_KNOWN = frozenset({
    "attention_bias", "attention_k_eq_v", "final_logit_softcapping", "global_head_dim", "hidden_size_per_layer_input",
    "layer_types", "moe_intermediate_size", "num_experts", "num_global_key_value_heads", "num_kv_shared_layers",
    "per_layer_config", "sliding_window", "top_k_experts", "use_double_wide_mlp", "vocab_size_per_layer_input",
})  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "enable_moe_block": (False,),
    "use_bidirectional_attention": (False, "vision"),  # of tokens of images, which text has none of
}
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def whole(hf: HfConfig, key: str, default: int = 0) -> int:
    """A whole number, maybe 0; absent or null gives the default."""
    return positive(hf, key) if hf.get(key) else default if hf.get(key) is None else 0


def _full_sizes(hf: HfConfig, kinds: tuple[LayerKind, ...]) -> tuple[int, int]:
    """(head size, key/value heads) of full layers: in keys of their own, or in what transformers writes a layer."""
    heads = positive(hf, "num_key_value_heads")
    by_layer = hf.get("per_layer_config")
    if by_layer is None:
        if flag(hf, "attention_k_eq_v"):
            heads = positive(hf, "num_global_key_value_heads", heads)
        return positive(hf, "global_head_dim", 512), heads
    if not isinstance(by_layer, Mapping) or not all(str(index).isdigit() for index in by_layer):
        raise InputError(
            "config.json: per_layer_config has to be an object with the numbers of layers as keys."
        )
    found = {int(index): dict(sizes) for index, sizes in by_layer.items()}
    full = {index for index, kind in enumerate(kinds) if kind == "full"}
    sizes = next(iter(found.values()), {})
    if set(found) != full or any(other != sizes for other in found.values()):
        raise InputError(
            "config.json: per_layer_config has to say the same of every full layer, and of no other."
        )
    if set(sizes) - {"head_dim", "num_key_value_heads"}:
        raise InputError(
            f"config.json: per_layer_config has {', '.join(sorted(sizes))}, which may change the result."
        )
    return positive(sizes, "head_dim", positive(hf, "head_dim")), positive(
        sizes, "num_key_value_heads", heads
    )


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = _DEFAULTS | {key: value for key, value in hf.items() if value is not None or key not in _DEFAULTS}
    count = positive(hf, "num_hidden_layers")
    kinds = read_layer_types(hf, tuple("sliding" if (i + 1) % 6 else "full" for i in range(count)))
    kinds = (*kinds[:-1], "full")  # as in transformers
    head_dim, heads = _full_sizes(hf, kinds)
    sliding_dim, sliding_heads = positive(hf, "head_dim"), positive(hf, "num_key_value_heads")
    rope, local_rope = read_layer_ropes(hf, head_dim=head_dim, local_base=1e4)
    shared, width = whole(hf, "num_kv_shared_layers"), positive(hf, "intermediate_size")
    double = shared and flag(hf, "use_double_wide_mlp")
    inputs = whole(hf, "hidden_size_per_layer_input")
    attention_bias, cap = flag(hf, "attention_bias"), hf.get("final_logit_softcapping")
    return read_common(
        hf,
        family="gemma4",
        known=_KNOWN,
        neutral=_NEUTRAL,
        activation_key="hidden_activation",
        head_dim=head_dim,
        num_kv_heads=heads,
        layer_kinds=kinds,
        layer_ropes=tuple("local" if kind == "sliding" else "global" for kind in kinds),
        rope=rope,
        local_rope=local_rope,
        block="sandwich",
        qk_norm=True,
        attention_scale=1.0,
        sliding_window=positive(hf, "sliding_window"),
        embedding_scale=positive(hf, "hidden_size") ** 0.5,
        logit_softcap=None if cap is None else number(hf, "final_logit_softcapping"),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        extras=ExtrasConfig(
            sliding_head_dim=sliding_dim if sliding_dim != head_dim else 0,
            sliding_kv_heads=sliding_heads if sliding_heads != heads else 0,
            value_norm=True,
            keys_as_values=flag(hf, "attention_k_eq_v"),
            shared_kv_layers=shared,
            layer_widths=tuple(width * (1 + (i >= count - shared)) for i in range(count)) if double else (),
            input_width=inputs,
            input_vocab=positive(hf, "vocab_size_per_layer_input") if inputs else 0,
            layer_scalar=True,
        ),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    extras = config.extras
    assert extras is not None
    hf = write_common(config, "gemma4_text", "Gemma4ForCausalLM", activation_key="hidden_activation")
    del hf["rope_theta"], hf["rope_scaling"]
    hf.pop("partial_rotary_factor", None)
    return hf | {
        "rope_parameters": write_layer_ropes(config),
        "head_dim": extras.sliding_head_dim or config.head_dim,
        "num_key_value_heads": extras.sliding_kv_heads or config.num_kv_heads,
        "global_head_dim": config.head_dim,
        "num_global_key_value_heads": config.num_kv_heads if extras.sliding_kv_heads else None,
        "attention_bias": config.qkv_bias,
        "attention_k_eq_v": extras.keys_as_values,
        "final_logit_softcapping": config.logit_softcap,
        "layer_types": write_layer_types(config),
        "sliding_window": config.sliding_window,
        "num_kv_shared_layers": extras.shared_kv_layers,
        "use_double_wide_mlp": bool(extras.layer_widths),
        "hidden_size_per_layer_input": extras.input_width,
        "vocab_size_per_layer_input": extras.input_vocab or config.vocab_size,
    }


FAMILY = Family(
    "gemma4",
    ("gemma4_text",),
    config_from_hf,
    config_to_hf,
    extended_tensor_names,
    left_out=lambda hf: shared_key_values(config_from_hf(hf)),
)
