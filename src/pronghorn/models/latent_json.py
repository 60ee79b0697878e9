"""Reading and writing the keys of a `config.json` that are about latent attention and shared by several families."""

import math
from collections.abc import Mapping
from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig, RopeConfig
from pronghorn.models.config_json import HfConfig, positive, read_rope
from pronghorn.models.latent_config import LatentConfig

# Read by `read_latent`; qk_head_dim is a note that transformers writes, the sum of two others.
LATENT_KEYS = frozenset({
    "kv_lora_rank", "q_lora_rank", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
})  # fmt: skip


def read_latent(hf: HfConfig, defaults: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a DecoderConfig that latent attention has: latent, head_dim, rope and attention_scale.

    Args:
      defaults: the family's, of every key in `LATENT_KEYS` but qk_head_dim. A q_lora_rank of null means no rank.

    Raises:
      InputError: a key has a value that cannot be, or there are other numbers of keys than of queries.
    """
    heads = positive(hf, "num_attention_heads")
    if positive(hf, "num_key_value_heads", heads) != heads:
        raise InputError(
            f"config.json: num_key_value_heads is {hf['num_key_value_heads']}, and latent attention has keys of each "
            f"of its {heads} heads; set it to {heads}."
        )
    has_rank = hf.get("q_lora_rank", 0) is not None
    latent = LatentConfig(
        rank=positive(hf, "kv_lora_rank", defaults["kv_lora_rank"]),
        content_dim=positive(hf, "qk_nope_head_dim", defaults["qk_nope_head_dim"]),
        position_dim=positive(hf, "qk_rope_head_dim", defaults["qk_rope_head_dim"]),
        value_dim=positive(hf, "v_head_dim", defaults["v_head_dim"]),
        query_rank=positive(hf, "q_lora_rank", defaults["q_lora_rank"]) if has_rank else 0,
    )
    rope = read_rope(hf, head_dim=latent.position_dim)
    head_dim = latent.content_dim + latent.position_dim
    return {
        "latent": latent,
        "head_dim": head_dim,
        "rope": rope,
        "attention_scale": _attention_scale(head_dim, rope),
    }


def _attention_scale(head_dim: int, rope: RopeConfig) -> float | None:
    """The factor of q kᵀ where contexts are stretched (DeepSeek-V2's code), or None for 1 / sqrt(head_dim)."""
    if rope.kind == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return None
    factor = 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
    return head_dim**-0.5 * factor * factor


def write_latent(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_latent` reads; head_dim is what transformers takes it for, the dims that are rotated."""
    latent = config.latent
    assert latent is not None
    return {
        "head_dim": latent.position_dim,
        "kv_lora_rank": latent.rank,
        "q_lora_rank": latent.query_rank or None,
        "qk_nope_head_dim": latent.content_dim,
        "qk_rope_head_dim": latent.position_dim,
        "v_head_dim": latent.value_dim,
    }
