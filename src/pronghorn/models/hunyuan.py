"""HunYuan V1, dense.

Special: heads of q and k are normalised after rope; a rope of kind "dynamic" with `alpha` stretches its base once and
for all, by alpha ** (d / (d - 2)), d the head_dim.
"""

from collections.abc import Mapping
from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig, RopeConfig
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    flag,
    number,
    positive,
    read_common,
    read_rope,
    write_common,
)
from pronghorn.models.tensor_names import llama_tensor_names

_NAMES = {"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_classification_head": (False,),
    "attention_head_dim": (),
    "mlp_bias": (False,),
    "norm_type": ("rms", "hf_rms", "fused"),
    "use_cla": (False,),
    "use_qk_norm": (True,),
    "use_rotary_pos_emb": (True,),
}
_KNOWN = frozenset(
    {"attention_bias", "eod_token_id", "org_vocab_size", "cla_share_factor", "class_num", "pool_type"}
)


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5} | dict(hf)
    head_dim = positive(hf, "head_dim", positive(hf, "hidden_size") // positive(hf, "num_attention_heads"))
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        hf,
        family="hunyuan",
        known=_KNOWN | {"attention_head_dim"} if hf.get("attention_head_dim") == head_dim else _KNOWN,
        neutral=_NEUTRAL,
        qk_norm=True,
        qk_norm_after_rope=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        rope=_read_rope(hf, head_dim),
    )


def _read_rope(hf: HfConfig, head_dim: int) -> RopeConfig:
    for name in ("rope_scaling", "rope_parameters"):
        scaling = hf.get(name)
        if not isinstance(scaling, Mapping) or not scaling.get("alpha"):
            continue
        kind = scaling.get("rope_type") or scaling.get("type")
        if kind != "dynamic" or number(scaling, "factor", 1.0) != 1:
            raise InputError(
                f"config.json: {name}.alpha belongs to type 'dynamic' with factor 1, not {kind!r}."
            )
        base = number(scaling, "rope_theta", number(hf, "rope_theta", 10000.0))
        return RopeConfig(base=base * number(scaling, "alpha") ** (head_dim / (head_dim - 2)))
    return read_rope(hf, head_dim=head_dim)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json; an alpha is written as the base it makes."""
    return write_common(config, "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM") | {
        "attention_bias": config.qkv_bias
    }


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    return llama_tensor_names(config, _NAMES)


FAMILY = Family("hunyuan", ("hunyuan_v1_dense",), config_from_hf, config_to_hf, tensor_names)
