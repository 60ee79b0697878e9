"""DeepSeek-V3 and R1 (671B; Moonlight, 16B-A3B, and others of its model_type).

Special: DeepSeek-V2's attention; scores of experts by sigmoid, a correction that moves the choice, groups by the sum of
their two best, one network that every token goes through, and dense layers in front. The layers that predict further
tokens (`num_nextn_predict_layers`) are left out, as in transformers.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, read_common, write_common
from pronghorn.models.deepseek_v2 import LATENT_DEFAULTS, PRETRAINING_KEYS
from pronghorn.models.experts_json import (
    ROUTED_EXPERT_KEYS,
    predicting_layers,
    read_routed_experts,
    write_routed_experts,
)
from pronghorn.models.latent_json import LATENT_KEYS, read_latent, write_latent
from pronghorn.models.tensor_names import SHARED_EXPERTS, expert_tensors, llama_tensor_names

_EXPERTS = {
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}
_NEUTRAL = {
    "ep_size": (1,),
    "moe_layer_freq": (1,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}
_OWN_CODE = frozenset({
    "configuration_deepseek.DeepseekV3Config", "modeling_deepseek.DeepseekV3Model",
    "modeling_deepseek.DeepseekV3ForCausalLM",
})  # fmt: skip


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"intermediate_size": 18432, "max_position_embeddings": 4096} | dict(hf)
    bias = flag(hf, "attention_bias")
    return read_common(
        hf,
        family="deepseek_v3",
        known=ROUTED_EXPERT_KEYS | LATENT_KEYS | PRETRAINING_KEYS | {"attention_bias", "rope_interleave"},
        neutral=_NEUTRAL,
        own_code=_OWN_CODE,
        qkv_bias=bias,
        output_bias=bias,
        rope_interleaved=flag(hf, "rope_interleave", True),
        experts=read_routed_experts(
            hf, _EXPERTS, router="sigmoid", correction_bias=True, normalizer_epsilon=1e-20
        ),
        **read_latent(hf, LATENT_DEFAULTS),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return (
        write_common(config, "deepseek_v3", "DeepseekV3ForCausalLM")
        | write_latent(config)
        | write_routed_experts(config)
        | {"attention_bias": config.qkv_bias, "rope_interleave": config.rope_interleaved}
    )


FAMILY = Family(
    "deepseek_v3",
    ("deepseek_v3",),
    config_from_hf,
    config_to_hf,
    lambda config: llama_tensor_names(config, SHARED_EXPERTS),
    stacked_tensors=expert_tensors,
    left_out=predicting_layers,
)
