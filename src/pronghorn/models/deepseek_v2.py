"""DeepSeek-V2 (236B, Lite, Coder; DeepSeek-VL2's text tower has the same keys).

Special: multi-head latent attention, pairs of rope being neighbours; with a stretched context the factor of q kᵀ grows
too. Experts by a softmax over all of them, whose weights are scaled and never made to add up to one; with
`topk_method` "group_limited_greedy" from the groups with the best experts only; one network that every token goes
through, and dense layers in front.
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, choice, flag, read_common, write_common
from pronghorn.models.experts_json import ROUTED_EXPERT_KEYS, read_routed_experts, write_routed_experts
from pronghorn.models.latent_json import LATENT_KEYS, read_latent, write_latent
from pronghorn.models.tensor_names import SHARED_EXPERTS, expert_tensors, llama_tensor_names

LATENT_DEFAULTS = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
# Of the loss that balanced experts in pre-training, which transformers does not have.
PRETRAINING_KEYS = frozenset({"aux_loss_alpha", "seq_aux"})
_EXPERTS = {
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 1407,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
}
_NEUTRAL = {"ep_size": (1,), "mlp_bias": (False,), "moe_layer_freq": (1,), "scoring_func": ("softmax",)}
_METHODS = {"greedy": False, "group_limited_greedy": True}
_OWN_CODE = frozenset({
    "configuration_deepseek.DeepseekV2Config", "modeling_deepseek.DeepseekV2Model",
    "modeling_deepseek.DeepseekV2ForCausalLM",
})  # fmt: skip


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"intermediate_size": 11008, "max_position_embeddings": 2048} | dict(hf)
    if flag(hf, "norm_topk_prob"):
        raise InputError(
            "config.json: norm_topk_prob is true, which transformers leaves out for model_type 'deepseek_v2'; set it "
            "to false, or use another checkpoint."
        )
    grouped = choice(hf, "topk_method", _METHODS, "greedy")
    bias = flag(hf, "attention_bias")
    return read_common(
        hf,
        family="deepseek_v2",
        known=ROUTED_EXPERT_KEYS | LATENT_KEYS | PRETRAINING_KEYS | {"attention_bias", "topk_method"},
        neutral=_NEUTRAL,
        own_code=_OWN_CODE,
        qkv_bias=bias,
        output_bias=bias,
        rope_interleaved=True,
        experts=read_routed_experts(
            hf if grouped else hf | {"n_group": 1, "topk_group": 1}, _EXPERTS, group_score="best"
        ),
        **read_latent(hf, LATENT_DEFAULTS),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    assert config.experts is not None
    return (
        write_common(config, "deepseek_v2", "DeepseekV2ForCausalLM")
        | write_latent(config)
        | write_routed_experts(config)
        | {
            "attention_bias": config.qkv_bias,
            "topk_method": "group_limited_greedy" if config.experts.groups > 1 else "greedy",
        }
    )


FAMILY = Family(
    "deepseek_v2",
    ("deepseek_v2",),
    config_from_hf,
    config_to_hf,
    lambda config: llama_tensor_names(config, SHARED_EXPERTS),
    stacked_tensors=expert_tensors,
)
