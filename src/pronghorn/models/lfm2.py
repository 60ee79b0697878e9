"""LFM 2 (Liquid AI; 350M to 2.6B).

Special: most layers have a short gated convolution in place of attention (`layer_types`, or `full_attn_idxs` in older
files); heads of q and k are normalised; names of its own for every module; `intermediate_size` (or `block_ff_dim`) is
cut to two thirds, scaled and rounded up where `block_auto_adjust_ff_dim` is true; tied.
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    derived_head_dim,
    flag,
    number,
    positive,
    read_common,
    write_common,
)

_KNOWN = frozenset({
    "block_auto_adjust_ff_dim", "block_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of", "conv_L_cache",
    "conv_bias", "full_attn_idxs", "layer_types", "tie_embedding",
})  # fmt: skip
# Of the first release's own code, read by nothing there either; widths that are hidden_size.
_NOTES = ("block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu",
          "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "theta",
          "use_pos_enc")  # fmt: skip
_KINDS: dict[str, LayerKind] = {"conv": "conv", "full_attention": "full"}
_MODULES = {
    "full": {
        **{f"self_attn.{p}_proj": f"self_attn.{p}_proj" for p in "qkv"},
        "self_attn.o_proj": "self_attn.out_proj",
        "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm",
    },
    "conv": {name: name for name in ("conv.in_proj", "conv.conv", "conv.out_proj")},
}
_EVERY = {
    "input_layernorm": "operator_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def _layer_kinds(hf: HfConfig) -> tuple[LayerKind, ...]:
    count = positive(hf, "num_hidden_layers")
    types = hf.get("layer_types")
    if types is None:
        full = range(count) if hf.get("full_attn_idxs") is None else hf["full_attn_idxs"]
        types = ["full_attention" if index in full else "conv" for index in range(count)]
    if len(types) != count or not set(types) <= set(_KINDS):
        raise InputError(
            f"config.json: layer_types has to be one of {', '.join(_KINDS)} for each of {count} layers."
        )
    return tuple(_KINDS[kind] for kind in types)


def _ffn(hf: HfConfig) -> int:
    size = positive(hf, "intermediate_size", 12288)
    if hf.get("block_ff_dim") is not None:
        size = positive(hf, "block_ff_dim")
    if not flag(hf, "block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    size = int(number(hf, "block_ffn_dim_multiplier", 1.0) * size)
    multiple = positive(hf, "block_multiple_of", 256)
    return multiple * ((size + multiple - 1) // multiple)


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"max_position_embeddings": 128000, "norm_eps": 1e-5, "rope_theta": 1000000.0} | dict(hf)
    hf = {key: value for key, value in hf.items() if key not in _NOTES} | {"intermediate_size": _ffn(hf)}
    return read_common(
        hf,
        family="lfm2",
        known=_KNOWN,
        default_kv_heads=8,
        eps_key="norm_eps",
        head_dim=derived_head_dim(hf),
        layer_kinds=_layer_kinds(hf),
        conv_width=positive(hf, "conv_L_cache", 3),
        conv_bias=flag(hf, "conv_bias"),
        qk_norm=True,
        tie_word_embeddings=flag(hf, "tie_embedding", flag(hf, "tie_word_embeddings", True)),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    names = {kind: name for name, kind in _KINDS.items()}
    return write_common(config, "lfm2", "Lfm2ForCausalLM", eps_key="norm_eps") | {
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": config.conv_width,
        "conv_bias": config.conv_bias,
        "layer_types": [names[kind] for kind in config.layer_kinds],
    }


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    names = {"embed_tokens.weight": "model.embed_tokens.weight", "norm.weight": "model.embedding_norm.weight"}
    for index, kind in enumerate(config.layer_kinds):
        for ours, theirs in (_MODULES["conv" if kind == "conv" else "full"] | _EVERY).items():
            biased = ours.startswith("conv.") and config.conv_bias
            for leaf in ("weight", *["bias"] * biased):
                names[f"layers.{index}.{ours}.{leaf}"] = f"model.layers.{index}.{theirs}.{leaf}"
    return names if config.tie_word_embeddings else names | {"lm_head.weight": "lm_head.weight"}


FAMILY = Family("lfm2", ("lfm2",), config_from_hf, config_to_hf, tensor_names)
