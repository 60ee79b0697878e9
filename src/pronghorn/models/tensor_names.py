"""Names of a checkpoint's tensors, from the configuration.

Most families differ from Llama in a few module names; some store q, k and v (or gate and up) as one tensor, rows after
rows. Those are cut when a checkpoint is read and put together when it is written: every bit stays.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pronghorn.models.config import DecoderConfig
from pronghorn.models.layers import LAYER_NORMS


def llama_tensor_names(config: DecoderConfig, modules: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our name -> the checkpoint's, which says "model." in front of all but the head.

    Args:
      modules: modules of a layer whose names differ, ours -> theirs ("mlp.up_proj" -> "mlp.c_fc").
    """
    biased = {f"self_attn.{p}_proj": config.qkv_bias for p in "qkv"} | {
        "self_attn.o_proj": config.output_bias
    }
    biased |= {f"mlp.{p}_proj": config.mlp_bias for p in ("gate", "up", "down")}
    if not config.gated_mlp:
        del biased["mlp.gate_proj"]
    biased |= dict.fromkeys(LAYER_NORMS[config.block], config.norm_bias)
    if config.qk_norm:
        biased |= {f"self_attn.{p}_norm": False for p in "qk"}
    layer: dict[str, str] = {}
    for module, has_bias in biased.items():
        theirs = (modules or {}).get(module, module)
        layer |= {f"{module}.{leaf}": f"{theirs}.{leaf}" for leaf in ("weight", *["bias"] * has_bias)}
    if config.activation == "xielu":
        layer |= {name: name for name in (f"mlp.act_fn.{p}" for p in ("alpha_p", "alpha_n", "beta", "eps"))}
    names = {"embed_tokens.weight": "model.embed_tokens.weight"}
    for index in range(config.num_layers):
        prefix = f"layers.{index}."
        names |= {f"{prefix}{ours}": f"model.{prefix}{theirs}" for ours, theirs in layer.items()}
    names |= {f"norm.{leaf}": f"model.norm.{leaf}" for leaf in ("weight", *["bias"] * config.norm_bias)}
    return names if config.tie_word_embeddings else names | {"lm_head.weight": "lm_head.weight"}


def fused_tensors(config: DecoderConfig, modules: Sequence[str]) -> dict[str, tuple[tuple[str, int], ...]]:
    """{name in the file: ((name in `tensor_names`, rows), ..)} of tensors that the file stores as one.

    Args:
      modules: "self_attn.qkv_proj" and "mlp.gate_up_proj", whichever the family has.
    """
    head_dim = config.head_dim
    parts = {
        "self_attn.qkv_proj": (
            ("self_attn.q_proj", config.num_heads * head_dim),
            ("self_attn.k_proj", config.num_kv_heads * head_dim),
            ("self_attn.v_proj", config.num_kv_heads * head_dim),
        ),
        "mlp.gate_up_proj": (
            ("mlp.gate_proj", config.intermediate_size),
            ("mlp.up_proj", config.intermediate_size),
        ),
    }
    return {
        f"model.layers.{index}.{module}.weight": tuple(
            (f"model.layers.{index}.{part}.weight", rows) for part, rows in parts[module]
        )
        for index in range(config.num_layers)
        for module in modules
    }


def by_our_names(
    arrays: Mapping[str, Any], names: Mapping[str, str], fused: Mapping[str, tuple[tuple[str, int], ...]]
) -> dict[str, Any]:
    """Arrays of transformers by our names, those of linears that are several of ours cut by rows.

    Args:
      arrays: by the names of transformers; those that the family does not have are left out.
      names, fused: of the family.
    """
    arrays = dict(arrays)
    for name, parts in fused.items():
        if name in arrays:
            cuts = np.cumsum([rows for _, rows in parts])[:-1]
            arrays |= dict(zip([part for part, _ in parts], np.split(arrays.pop(name), cuts), strict=True))
    return {ours: arrays[theirs] for ours, theirs in names.items() if theirs in arrays}
