"""Cohere 2: Command R7B, Command A.

Special: as Cohere; three sliding layers with rope to a full one that is told no positions.
"""

from typing import Any

from pronghorn.models.cohere import DEFAULTS, cohere_switches
from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    derived_head_dim,
    positive,
    read_common,
    read_layer_types,
    write_common,
    write_layer_types,
)
from pronghorn.models.tensor_names import llama_tensor_names

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "layer_switch": (4,),
    "order_of_interleaved_layers": ("local_attn_first",),
    "position_embedding_type": ("rope_gptj",),
    "rotary_pct": (1,),
    "use_embedding_sharing": (True,),
    "use_gated_activation": (True,),
    "use_parallel_block": (True,),
    "use_parallel_embedding": (False,),
    "use_qk_norm": (False,),
}
_KNOWN = frozenset(
    {"attention_bias", "layer_types", "logit_scale", "sliding_window", "sliding_window_pattern"}
)


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = DEFAULTS | {"max_position_embeddings": 8192} | dict(hf)
    count, period = positive(hf, "num_hidden_layers"), positive(hf, "sliding_window_pattern", 4)
    kinds: tuple[LayerKind, ...] = tuple("sliding" if (i + 1) % period else "full" for i in range(count))
    kinds = read_layer_types(hf, kinds)
    return read_common(
        hf,
        family="cohere2",
        known=_KNOWN,
        neutral=_NEUTRAL,
        eps_key="layer_norm_eps",
        head_dim=derived_head_dim(hf),
        sliding_window=positive(hf, "sliding_window", 4096),
        layer_kinds=kinds,
        layer_ropes=tuple("global" if kind == "sliding" else "none" for kind in kinds),
        **cohere_switches(hf),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "cohere2", "Cohere2ForCausalLM", eps_key="layer_norm_eps") | {
        "attention_bias": config.qkv_bias,
        "layer_types": write_layer_types(config),
        "logit_scale": config.logit_scale,
        "sliding_window": config.sliding_window,
    }


FAMILY = Family("cohere2", ("cohere2",), config_from_hf, config_to_hf, llama_tensor_names)
