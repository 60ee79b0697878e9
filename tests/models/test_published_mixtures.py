"""Keys of published config.json files with many experts, or latent attention, are read as they are meant.

The files on the hub were not at hand: DeepSeek-V2-Lite's keys are those that a public project compares it with, the
others are from memory and the defaults of transformers, and have to be compared with the files.
"""

import numpy as np
import pytest
from transformers import AutoConfig

from pronghorn.errors import InputError
from pronghorn.models import family_for, rope
from pronghorn.models.latent_config import LatentConfig

GLM_4_5_AIR = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 131072,
    "model_type": "glm4_moe", "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8,
    "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "pad_token_id": 151329,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1, "torch_dtype": "bfloat16",
    "use_cache": True, "use_qk_norm": False, "vocab_size": 151552,
}  # fmt: skip
ERNIE_4_5_21B = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 2560, "intermediate_size": 12288, "max_position_embeddings": 131072,
    "model_type": "ernie4_5_moe", "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_intermediate_size": 1536,
    "moe_k": 6, "moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_num_experts": 64,
    "moe_num_shared_experts": 2, "moe_use_aux_free": True, "num_attention_heads": 20, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "num_nextn_predict_layers": 1, "pad_token_id": 0, "rms_norm_eps": 1e-05,
    "rope_theta": 500000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_bias": False,
    "use_cache": False, "use_rmsnorm": True, "vocab_size": 103424,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129280,
}  # fmt: skip
MINICPM_3_4B = {
    "architectures": ["MiniCPM3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPM3Config",
        "AutoModel": "modeling_minicpm.MiniCPM3Model",
        "AutoModelForCausalLM": "modeling_minicpm.MiniCPM3ForCausalLM",
    },
    "bos_token_id": 1, "dim_model_base": 256, "eos_token_id": [2, 73440], "hidden_act": "silu", "hidden_size": 2560,
    "initializer_range": 0.1, "intermediate_size": 6400, "kv_lora_rank": 256, "max_position_embeddings": 32768,
    "model_type": "minicpm3", "num_attention_heads": 40, "num_hidden_layers": 62, "num_key_value_heads": 40,
    "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0 + 0.1 * i for i in range(16)], "original_max_position_embeddings": 32768,
        "short_factor": [1.0 + 0.1 * i for i in range(16)], "type": "longrope",
    },
    "scale_depth": 1.4, "scale_emb": 12, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 73448,
}  # fmt: skip
LLAMA_4_SCOUT = {
    "attention_bias": False, "attention_chunk_size": 8192, "attention_dropout": 0.0, "attn_scale": 0.1,
    "attn_temperature_tuning": True, "bos_token_id": 200000, "eos_token_id": [200001, 200007, 200008],
    "floor_scale": 8192, "for_llm_compressor": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
    "initializer_range": 0.02, "interleave_moe_layer_step": 1, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "max_position_embeddings": 10485760, "model_type": "llama4_text",
    "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
    "num_key_value_heads": 8, "num_local_experts": 16, "output_router_logits": False, "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "torch_dtype": "bfloat16",
    "use_cache": True, "use_qk_norm": True, "vocab_size": 202048,
}  # fmt: skip
QWEN_3_NEXT_80B = {
    "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4,
    "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
    "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_next",
    "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512,
    "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_3_5_35B = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16",
    "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
    "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 512, "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False, "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8,
    "num_hidden_layers": 40, "num_key_value_heads": 2, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
        "rope_theta": 10000000, "rope_type": "default",
    },
    "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 248320,
}  # fmt: skip


def read(hf):
    return family_for(hf).config_from_hf(hf)


def test_glm_4_5_has_one_dense_layer_a_correction_and_no_group():
    config = read(GLM_4_5_AIR)
    experts = config.experts
    assert (experts.num_experts, experts.experts_per_token, experts.width, experts.shared_width) == (
        128,
        8,
        1408,
        1408,
    )
    assert (
        experts.router == "sigmoid" and experts.correction_bias and experts.normalized and experts.groups == 1
    )
    assert [config.is_sparse(i) for i in range(3)] == [False, True, True]
    assert config.qkv_bias and not config.output_bias and not config.qk_norm and not config.rope_interleaved
    assert config.rope.partial_rotary_factor == 0.5 and config.rope.base == 1e6


def test_layers_that_predict_further_tokens_are_left_out():
    for hf, names in (
        (GLM_4_5_AIR, ("model.layers.46.",)),
        (DEEPSEEK_V3 | {"num_nextn_predict_layers": 2}, ("model.layers.61.", "model.layers.62.")),
        (DEEPSEEK_V3 | {"num_nextn_predict_layers": 0}, ()),
        (DEEPSEEK_V2_LITE, ()),
    ):
        assert family_for(hf).left_out(hf) == names


def test_ernie_4_5_has_experts_from_the_second_layer_on():
    config = read(ERNIE_4_5_21B)
    experts = config.experts
    assert (experts.num_experts, experts.experts_per_token, experts.shared_width) == (64, 6, 3072)
    assert experts.router == "softmax" and experts.correction_row and experts.normalizer_minimum == 1e-12
    assert experts.dense_layers == (0,) and config.tie_word_embeddings and config.rope_interleaved
    every_third = {"moe_layer_interval": 3, "moe_layer_start_index": 4, "moe_layer_end_index": 20}
    changed = read(ERNIE_4_5_21B | every_third)
    assert [i for i in range(28) if changed.is_sparse(i)] == [5, 8, 11, 14, 17, 20]
    assert read(family_for(ERNIE_4_5_21B).config_to_hf(changed)) == changed


def test_deepseek_v2_lite_projects_queries_at_once_and_chooses_without_groups():
    config = read(DEEPSEEK_V2_LITE)
    assert config.latent == LatentConfig(512, 128, 64, 128, query_rank=0)
    assert (config.head_dim, config.value_dim, config.num_kv_heads) == (192, 128, 16)
    experts = config.experts
    assert (experts.router, experts.groups, experts.normalized, experts.scaling_factor) == (
        "softmax",
        1,
        False,
        1.0,
    )
    assert experts.shared_width == 2816 and experts.dense_layers == (0,)
    expected = 192**-0.5 * (0.1 * 0.707 * np.log(40) + 1) ** 2
    assert abs(config.attention_multiplier - expected) <= 1e-12
    grouped = read(DEEPSEEK_V2_LITE | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3})
    assert (grouped.experts.groups, grouped.experts.groups_chosen, grouped.experts.group_score) == (
        8,
        3,
        "best",
    )


def test_deepseek_v3_expands_queries_too_and_chooses_four_groups_of_eight():
    config = read(DEEPSEEK_V3)
    assert config.latent == LatentConfig(512, 128, 64, 128, query_rank=1536)
    experts = config.experts
    assert (experts.groups, experts.groups_chosen, experts.group_score) == (8, 4, "two_best")
    assert experts.correction_bias and experts.scaling_factor == 2.5 and experts.dense_layers == (0, 1, 2)
    assert config.rope_interleaved and not config.qkv_bias
    absent = {key: value for key, value in DEEPSEEK_V3.items() if key != "q_lora_rank"}
    assert read(absent) == config, "an absent rank is the family's default, a null is none"
    assert read(DEEPSEEK_V3 | {"q_lora_rank": None}).latent.query_rank == 0


def test_minicpm_3_is_dense_and_scaled():
    config = read(MINICPM_3_4B)
    assert config.latent == LatentConfig(256, 64, 32, 64, query_rank=768) and config.experts is None
    assert (config.embedding_scale, config.logit_scale) == (12.0, 0.1) and config.tie_word_embeddings
    assert config.residual_scale == 1.4 / 62**0.5 and not config.rope_interleaved
    assert config.rope.kind == "longrope" and len(config.rope.long_factor) == 16


def test_llama_4_sees_chunks_but_for_every_fourth_layer_which_has_no_rope():
    config = read(LLAMA_4_SCOUT)
    assert config.layer_pattern[:4] == (("chunked", "global"),) * 3 + (("full", "none"),)
    assert config.attention_chunk == 8192 and config.unit_heads and config.rope_interleaved
    experts = config.experts
    assert (experts.num_experts, experts.width, experts.shared_width) == (16, 8192, 8192)
    assert experts.weights_on_input and experts.dense_layers == () and config.intermediate_size == 16384
    # As positions 8190 and 8191 are scaled, the first of them not yet, in layers without rope only.
    scale = rope.query_scale(config, np.asarray([[8190, 8191]]))
    assert np.allclose(scale, [[1.0, 1 + 0.1 * np.log(2)]]) and config.query_scale_ropes == ("none",)
    maverick = read(LLAMA_4_SCOUT | {"interleave_moe_layer_step": 2, "num_local_experts": 128})
    assert [maverick.is_sparse(i) for i in range(4)] == [False, True, False, True]


def test_qwen_3_next_projects_by_key_heads_and_qwen_3_5_does_not():
    older, newer = read(QWEN_3_NEXT_80B), read(QWEN_3_5_35B)
    assert older.linear_by_key_head and not newer.linear_by_key_head
    for config, count, chosen in ((older, 512, 10), (newer, 256, 8)):
        assert config.layer_kinds[:5] == ("linear", "linear", "linear", "full", "linear")
        assert config.attention_gate and config.qk_norm and config.norm_weight_offset == 1.0
        assert (config.experts.num_experts, config.experts.experts_per_token) == (count, chosen)
        assert config.experts.normalized and config.experts.shared_gate and config.experts.dense_layers == ()
    assert family_for(QWEN_3_NEXT_80B).left_out(QWEN_3_NEXT_80B) == ("mtp.",)


@pytest.mark.parametrize(
    "hf",
    [
        GLM_4_5_AIR,
        ERNIE_4_5_21B,
        DEEPSEEK_V2_LITE,
        DEEPSEEK_V3,
        MINICPM_3_4B,
        LLAMA_4_SCOUT,
        QWEN_3_NEXT_80B,
        QWEN_3_5_35B,
    ],
    ids=lambda hf: hf["model_type"],
)
def test_published_rewritten_and_written_files_are_read_alike(hf):
    family, config = family_for(hf), read(hf)
    assert read(family.config_to_hf(config)) == config
    assert read(AutoConfig.for_model(**hf).to_dict()) == config


@pytest.mark.parametrize(
    ("hf", "change", "named"),
    [
        (GLM_4_5_AIR, {"first_k_dense_replace": 46}, "first_k_dense_replace"),
        (GLM_4_5_AIR, {"topk_group": 2}, "groups_chosen 2"),
        (ERNIE_4_5_21B, {"use_bias": True}, "use_bias"),
        (ERNIE_4_5_21B, {"moe_layer_start_index": 28}, "moe_layer_start_index"),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob"),
        (DEEPSEEK_V2_LITE, {"topk_method": "noaux_tc"}, "topk_method"),
        (DEEPSEEK_V2_LITE, {"num_key_value_heads": 4}, "num_key_value_heads"),
        (DEEPSEEK_V2_LITE, {"mlp_bias": True}, "mlp_bias"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (DEEPSEEK_V3, {"auto_map": {"AutoModel": "modeling_other.Model"}}, "auto_map"),
        (MINICPM_3_4B, {"num_experts": 8}, "num_experts"),
        (
            LLAMA_4_SCOUT,
            {"attention_chunk_size": None, "layer_types": ["chunked_attention"] * 48},
            "layer_types",
        ),
        (LLAMA_4_SCOUT, {"moe_layers": []}, "moe_layers"),
        (LLAMA_4_SCOUT, {"no_rope_layers": [1, 2]}, "no_rope_layers"),
        (LLAMA_4_SCOUT, {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ],
)
def test_what_would_change_the_maths_is_refused(hf, change, named):
    with pytest.raises(InputError, match=named):
        family_for(hf | change)
