"""Keys of published config.json files of the families beyond Llama are read as they are meant."""

import pytest
from transformers import AutoConfig

from pronghorn.errors import InputError
from pronghorn.models import family_for

GEMMA_2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
PHI_4_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 199999,
    "embd_pdrop": 0.0,
    "eos_token_id": 199999,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "phi3",
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "longrope", "long_factor": [1.5] * 48, "short_factor": [1.0] * 48},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "vocab_size": 200064,
}
LFM_2_1_2B = {
    "architectures": ["Lfm2ForCausalLM"],
    "block_auto_adjust_ff_dim": True,
    "block_dim": 2048,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-05,
    "block_use_swiglu": True,
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_dim": 2048,
    "eos_token_id": 7,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "model_type": "lfm2",
    "norm_eps": 1e-05,
    "num_attention_heads": 32,
    "num_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_pos_enc": True,
    "vocab_size": 65536,
}
GRANITE_4_MICRO = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "init_method": "mup",
    "initializer_range": 0.1,
    "intermediate_size": 8192,
    "layer_types": ["attention"] * 40,
    "logits_scaling": 10,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 40,
    "mamba_d_state": 256,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "model_type": "granitemoehybrid",
    "normalization_function": "rmsnorm",
    "num_attention_heads": 40,
    "num_experts_per_tok": 0,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "num_local_experts": 0,
    "output_router_logits": False,
    "position_embedding_type": "rope",
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.01,
    "shared_intermediate_size": 8192,
    "tie_word_embeddings": True,
    "vocab_size": 100352,
}
MINISTRAL_3_3B = {
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 262144,
    "model_type": "ministral3",
    "num_attention_heads": 32,
    "num_hidden_layers": 26,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 131072,
}

# Sizes are the defaults of transformers' configuration, which says it is "Qwen3.5-9B style". The file on the hub was
# not at hand: its longer context, rope base and further keys are from memory and have to be compared with it.
QWEN_3_5_9B = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16",
    "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 12288,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
    "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 16, "num_hidden_layers": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
        "rope_theta": 10000000, "rope_type": "default",
    },
    "tie_word_embeddings": False, "use_cache": True, "vocab_size": 248320,
}  # fmt: skip

# The keys are those of EXAONE 3.5's first code; the values are still to be compared with the published file.
EXAONE_3_5_2_4B = {
    "activation_function": "silu", "architectures": ["ExaoneForCausalLM"], "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_exaone.ExaoneConfig", "AutoModelForCausalLM": "modeling_exaone.ExaoneForCausalLM",
        "AutoModelForSequenceClassification": "modeling_exaone.ExaoneForSequenceClassification",
    },
    "bos_token_id": 1, "embed_dropout": 0.0, "eos_token_id": 361, "head_dim": 80, "hidden_size": 2560,
    "initializer_range": 0.02, "intermediate_size": 7168, "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 32768, "model_type": "exaone", "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_layers": 30, "pad_token_id": 0,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 1000000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.0",
    "use_cache": True, "vocab_size": 102400,
}  # fmt: skip


GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
    "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088,
}  # fmt: skip

# Keys as on the hub, where transformers writes sizes of full layers one by one; the values are still to be compared
# with the published file.
GEMMA_4_E2B_TEXT = {
    "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": False, "bos_token_id": 2,
    "dtype": "bfloat16",
    "enable_moe_block": False, "eos_token_id": 1, "final_logit_softcapping": 30.0, "global_head_dim": 512,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1536, "hidden_size_per_layer_input": 256,
    "initializer_range": 0.02, "intermediate_size": 6144,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7, "max_position_embeddings": 131072,
    "model_type": "gemma4_text", "moe_intermediate_size": None, "num_attention_heads": 8, "num_experts": None,
    "num_global_key_value_heads": None, "num_hidden_layers": 35, "num_key_value_heads": 1, "num_kv_shared_layers": 20,
    "pad_token_id": 0, "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 512, "tie_word_embeddings": True, "top_k_experts": None, "use_bidirectional_attention": None,
    "use_cache": True, "use_double_wide_mlp": True, "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
}  # fmt: skip

# The keys and values of google/gemma-3n-E2B's text_config, still to be compared with the published file.
GEMMA_3N_E2B_TEXT = {
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20, "altup_active_idx": 0, "altup_coef_clip": 120.0,
    "altup_correct_scale": True, "altup_lr_multiplier": None, "altup_num_inputs": 4, "attention_bias": False,
    "attention_dropout": 0.0, "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2048, "hidden_size_per_layer_input": 256,
    "initializer_range": 0.02, "intermediate_size": [8192] * 30, "laurel_rank": 64,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 6, "max_position_embeddings": 32768,
    "model_type": "gemma3n_text", "num_attention_heads": 8, "num_hidden_layers": 30, "num_key_value_heads": 2,
    "num_kv_shared_layers": 10, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0, "rope_scaling": None,
    "rope_theta": 1000000.0, "sliding_window": 512, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 262400,
    "vocab_size_per_layer_input": 262144,
}  # fmt: skip

# The keys and values of allenai/OLMo-7B-0424-hf, still to be compared with the published file.
OLMO_7B_0424 = {
    "architectures": ["OlmoForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": 8.0,
    "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "olmo", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 1, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.40.2", "use_cache": True,
    "vocab_size": 50304,
}  # fmt: skip


def read(hf):
    return family_for(hf).config_from_hf(hf)


def test_gemma_2_alternates_caps_and_is_tied_by_default():
    config = read(GEMMA_2_2B)
    assert config.layer_kinds == ("sliding", "full") * 13 and config.block == "sandwich"
    assert (config.attention_softcap, config.logit_softcap, config.attention_scale) == (50.0, 30.0, 1 / 16)
    assert config.tie_word_embeddings and config.norm_weight_offset == 1.0 and config.embedding_scale == 48.0


def test_gemma_3_has_five_local_layers_to_a_global_one():
    config = read(GEMMA_3_1B)
    assert config.layer_pattern[:6] == (("sliding", "local"),) * 5 + (("full", "global"),)
    assert (config.rope.base, config.local_rope.base, config.sliding_window) == (1000000.0, 10000.0, 512)


def test_phi_4_mini_is_read_although_it_names_code_of_its_own_and_no_other_code_is():
    config = read(PHI_4_MINI)
    assert config.rope.kind == "longrope" and config.rope.factor == 32.0
    assert config.rope.partial_rotary_factor == 0.75 and config.rope.original_max_position_embeddings == 4096
    with pytest.raises(InputError, match="auto_map"):
        family_for(PHI_4_MINI | {"auto_map": {"AutoModel": "other.Model"}})


def test_lfm_2_convolves_where_it_does_not_attend_and_cuts_its_ffn():
    config = read(LFM_2_1_2B)
    assert (
        config.layer_kinds[:4] == ("conv", "conv", "full", "conv") and config.layer_kinds.count("full") == 6
    )
    assert (config.intermediate_size, config.conv_width, config.tie_word_embeddings) == (8192, 3, True)


def test_granite_4_micro_is_dense_and_scaled():
    config = read(GRANITE_4_MICRO)
    assert (config.attention_scale, config.logit_scale, config.residual_scale) == (0.015625, 0.1, 0.22)
    assert config.layer_ropes == () and config.rope.base == 1e7
    with pytest.raises(InputError, match="num_local_experts=62"):
        read(GRANITE_4_MICRO | {"num_local_experts": 62})


def test_ministral_3_scales_queries_by_contexts_passed():
    config = read(MINISTRAL_3_3B)
    assert (config.query_scale_beta, config.rope.original_max_position_embeddings) == (0.1, 16384)
    assert config.rope.kind == "yarn" and config.rope.factor == 16.0


def test_qwen_3_5_has_three_delta_nets_to_one_gated_attention():
    config = read(QWEN_3_5_9B)
    assert config.layer_kinds == ("linear", "linear", "linear", "full") * 8 and config.attention_gate
    assert (config.linear_key_heads, config.linear_value_heads, config.conv_width) == (16, 32, 4)
    assert (config.rope.base, config.rope.partial_rotary_factor) == (1e7, 0.25)
    without = {key: value for key, value in QWEN_3_5_9B.items() if key != "layer_types"}
    assert read(without) == config
    with pytest.raises(InputError, match="attn_output_gate"):
        read(QWEN_3_5_9B | {"attn_output_gate": False})


def test_exaone_3_5_is_read_by_the_names_of_its_first_code_and_by_those_of_transformers():
    config = read(EXAONE_3_5_2_4B)
    assert (config.num_layers, config.rms_norm_eps, config.activation) == (30, 1e-5, "silu")
    assert (config.rope.kind, config.rope.base, config.num_kv_heads) == ("llama3", 1e6, 8)
    assert read(EXAONE_3_5_2_4B | {"num_layers": None, "num_hidden_layers": 30}) == config
    with pytest.raises(InputError, match="num_layers and num_hidden_layers"):
        read(EXAONE_3_5_2_4B | {"num_hidden_layers": 31})


def test_gpt_oss_has_sinks_clamped_experts_and_a_ramp_that_is_not_rounded():
    config = read(GPT_OSS_20B)
    assert config.attention_sinks and config.layer_kinds == ("sliding", "full") * 12
    assert (config.rope.base, config.rope.factor, config.rope.truncate) == (150000.0, 32.0, False)
    experts = config.experts
    assert (experts.num_experts, experts.experts_per_token, experts.width) == (32, 4, 2880)
    assert experts.bias and experts.router_bias and experts.router == "softmax_after_top_k"
    assert (experts.swiglu_limit, experts.swiglu_alpha) == (7.0, 1.702)
    without = {
        key: value for key, value in GPT_OSS_20B.items() if not key.startswith(("rope_", "layer_types"))
    }
    assert read(without) == config, "its defaults"
    with pytest.raises(InputError, match="initial_context_length=8192"):
        read(GPT_OSS_20B | {"initial_context_length": 8192})
    with pytest.raises(InputError, match="swiglu_limit"):
        read(GPT_OSS_20B | {"swiglu_limit": -1.0})


def test_gemma_4_shares_keys_and_values_and_its_full_layers_have_larger_heads():
    config = read(GEMMA_4_E2B_TEXT)
    assert [config.of_layer(i).head_dim for i in (3, 4)] == [256, 512]
    assert [config.of_layer(i).intermediate_size for i in (14, 15)] == [6144, 12288]
    modes = [config.of_layer(i).extras.key_values for i in range(35)]
    assert modes == ["own"] * 13 + ["stored"] * 2 + ["read"] * 20
    assert (config.attention_scale, config.rope.partial_rotary_factor, config.local_rope.base) == (
        1.0,
        0.25,
        1e4,
    )
    assert read(GEMMA_4_E2B_TEXT | {"use_bidirectional_attention": "vision"}) == config
    large = GEMMA_4_E2B_TEXT | {
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
    }
    assert [read(large).of_layer(i).num_kv_heads for i in (3, 4)] == [4, 2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"enable_moe_block": True}, "enable_moe_block"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"per_layer_config": {"3": {"head_dim": 8}}}, "per_layer_config"),
        (
            {"per_layer_config": {str(i): {"head_dim": i} for i in range(4, 35, 5)}},
            "same of every full layer",
        ),
        ({"per_layer_config": {str(i): {"eps": 1} for i in range(4, 35, 5)}}, "per_layer_config has eps"),
        ({"num_kv_shared_layers": 33}, "no layer before has"),
        ({"num_kv_shared_layers": 36}, "no layer before has"),
    ],
)
def test_gemma_4s_that_would_be_other_models_are_refused(change, named):
    with pytest.raises(InputError, match=named):
        read(GEMMA_4_E2B_TEXT | change)


def test_gemma_3n_has_four_streams_and_sparse_gates_in_its_first_layers():
    config = read(GEMMA_3N_E2B_TEXT)
    assert (config.intermediate_size, config.extras.layer_widths, config.num_kv_heads) == (8192, (), 2)
    assert [config.of_layer(i).extras.gate_sparsity for i in (9, 10)] == [(0.95,), (0.0,)]
    assert [config.of_layer(i).extras.key_values for i in (17, 18, 19, 20)] == [
        "own",
        "stored",
        "stored",
        "read",
    ]
    assert config.extras.altup.streams == 4 and config.logit_softcap == 30.0
    assert (config.rope.base, config.local_rope.base) == (1e6, 1e4)
    assert read(GEMMA_3N_E2B_TEXT | {"activation_sparsity_pattern": None}) == config
    with pytest.raises(InputError, match="intermediate_size has to be a list of 30"):
        read(GEMMA_3N_E2B_TEXT | {"intermediate_size": [8192] * 29})
    with pytest.raises(InputError, match="stream 4 of 4"):
        read(GEMMA_3N_E2B_TEXT | {"altup_active_idx": 4})


def test_olmo_1_clips_and_has_one_epsilon():
    config = read(OLMO_7B_0424)
    assert (config.qkv_clip, config.rms_norm_eps, config.norm_weight, config.norm) == (
        8.0,
        1e-5,
        False,
        "layer",
    )
    with pytest.raises(InputError, match="rms_norm_eps is 1e-06"):
        read(OLMO_7B_0424 | {"rms_norm_eps": 1e-6})
    with pytest.raises(InputError, match="clip_qkv"):
        read(OLMO_7B_0424 | {"clip_qkv": -1.0})


@pytest.mark.parametrize(
    "hf",
    [
        OLMO_7B_0424,
        GEMMA_3N_E2B_TEXT,
        GEMMA_4_E2B_TEXT,
        GEMMA_2_2B,
        GEMMA_3_1B,
        PHI_4_MINI,
        LFM_2_1_2B,
        GRANITE_4_MICRO,
        MINISTRAL_3_3B,
        QWEN_3_5_9B,
        EXAONE_3_5_2_4B,
        GPT_OSS_20B,
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
        (GEMMA_2_2B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA_2_2B, {"embedding_multiplier": 2.0}, "embedding_multiplier"),
        (PHI_4_MINI, {"lm_head_bias": True}, "lm_head_bias"),
        (PHI_4_MINI, {"resid_pdrop": 0.1}, "resid_pdrop"),
    ],
)
def test_what_would_change_the_maths_is_refused(hf, change, named):
    with pytest.raises(InputError, match=named):
        family_for(hf | change)
