"""Llama 4 (Scout, 109B-A17B; Maverick, 400B-A17B), the text tower.

Special: three layers that see their chunk of `attention_chunk_size` tokens to one that sees all and is told no
positions, whose queries grow with what is in front of them (`attn_scale`, `floor_scale`); pairs of rope are neighbours,
and heads of q and k are divided by their root mean square behind it. The router's choice is scored by sigmoid, and the
score is on what the experts read; one network that every token goes through. The file calls a layer's network
`feed_forward`, and holds experts as `[experts, in, out]`, gate and up one after the other.
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
    read_layer_types,
    write_common,
    write_layer_types,
)
from pronghorn.models.experts_json import EXPERT_KEYS, read_experts, write_experts
from pronghorn.models.tensor_names import InterleavedTensor, llama_tensor_names

_KNOWN = frozenset({
    "attention_bias", "attention_chunk_size", "attn_scale", "attn_temperature_tuning", "floor_scale",
    "interleave_moe_layer_step", "intermediate_size_mlp", "layer_types", "moe_layers", "no_rope_layer_interval",
    "no_rope_layers", "use_qk_norm",
})  # fmt: skip
_NEUTRAL = {"for_llm_compressor": (False,), "router_jitter_noise": (0,)}
_MODULES = {
    ours: ours.replace("mlp.", "feed_forward.")
    for part in ("", "experts.", "shared_expert.")
    for ours in (f"mlp.{part}{p}_proj" for p in ("gate", "up", "down"))
} | {"mlp.gate": "feed_forward.router"}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    } | {key: value for key, value in hf.items() if value is not None or key == "attention_chunk_size"}
    layers, every = positive(hf, "num_hidden_layers"), positive(hf, "no_rope_layer_interval", 4)
    # An empty list counts as absent, as in transformers.
    uses = hf.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(uses, list) or len(uses) != layers or not set(uses) <= {0, 1}:
        raise InputError(f"config.json: no_rope_layers has to be a list of {layers} times 0 or 1.")
    has_chunks = hf.get("attention_chunk_size", 0) is not None
    default: tuple[LayerKind, ...] = tuple("chunked" if use and has_chunks else "full" for use in uses)
    kinds = read_layer_types(hf, default)
    if "sliding" in kinds or ("chunked" in kinds and not has_chunks):
        raise InputError(
            "config.json: layer_types has to be chunked_attention, with an attention_chunk_size, or full_attention."
        )
    step = positive(hf, "interleave_moe_layer_step", 1)
    sparse = hf.get("moe_layers", list(range(step - 1, layers, step)))
    if not isinstance(sparse, list) or not sparse or not set(sparse) <= set(range(layers)):
        raise InputError(f"config.json: moe_layers has to list layers from 0 to {layers - 1}, at least one.")
    width, bias = positive(hf, "intermediate_size", 8192), flag(hf, "attention_bias")
    tuned = flag(hf, "attn_temperature_tuning", True)
    return read_common(
        hf,
        family="llama4",
        known=EXPERT_KEYS | _KNOWN,
        neutral=_NEUTRAL,
        default_kv_heads=8,
        qkv_bias=bias,
        output_bias=bias,
        rope_interleaved=True,
        unit_heads=flag(hf, "use_qk_norm", True),
        layer_kinds=kinds,
        layer_ropes=tuple("global" if use else "none" for use in uses),
        attention_chunk=positive(hf, "attention_chunk_size", 8192) if "chunked" in kinds else None,
        query_scale_beta=number(hf, "attn_scale", 0.1) if tuned else 0.0,
        query_scale_context=positive(hf, "floor_scale", 8192),
        query_scale_first=1,
        query_scale_ropes=("none",),
        intermediate_size=positive(hf, "intermediate_size_mlp", 16384),
        experts=read_experts(
            hf | {"output_router_logits": False},  # which asks for no loss in this family
            count=16,
            chosen=1,
            coefficient=0.001,
            width=width,
            router="sigmoid_after_top_k",
            weights_on_input=True,
            shared_width=width,
            dense_layers=tuple(i for i in range(layers) if i not in sparse),
        ),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    experts = config.experts
    assert experts is not None
    return (
        write_common(config, "llama4_text", "Llama4ForCausalLM")
        | write_experts(config, "num_local_experts")
        | {
            "attention_bias": config.qkv_bias,
            "attention_chunk_size": config.attention_chunk,
            "attn_scale": config.query_scale_beta,
            "attn_temperature_tuning": config.query_scale_beta != 0,
            "floor_scale": config.query_scale_context,
            "intermediate_size": experts.width,
            "intermediate_size_mlp": config.intermediate_size,
            "layer_types": write_layer_types(config),
            "moe_layers": [i for i in range(config.num_layers) if config.is_sparse(i)],
            "no_rope_layers": [int(rope != "none") for _, rope in config.layer_pattern],
            "use_qk_norm": config.unit_heads,
        }
    )


def interleaved_tensors(config: DecoderConfig) -> dict[str, InterleavedTensor]:
    """The experts' tensors of every layer that has them."""
    found = {}
    for index in range(config.num_layers):
        if config.is_sparse(index):
            experts = f"model.layers.{index}.feed_forward.experts."
            for name, projections in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
                parts = tuple(f"{experts}{p}_proj.weight" for p in projections)
                found[f"{experts}{name}"] = InterleavedTensor(parts, transposed=True, in_turn=False)
    return found


FAMILY = Family(
    "llama4",
    ("llama4_text",),
    config_from_hf,
    config_to_hf,
    lambda config: llama_tensor_names(config, _MODULES),
    interleaved_tensors=interleaved_tensors,
    tower="language_model.model",
)
