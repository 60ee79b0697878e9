"""Keys of published config.json files of the families beyond Llama are read as they are meant."""

import math

import pytest
from transformers import AutoConfig

from pronghorn.errors import InputError
from pronghorn.models import family_for
from tests.models.published_configs import (
    CWM,
    EXAONE_3_5_2_4B,
    FALCON_H1_0_5B,
    GEMMA_2_2B,
    GEMMA_3_1B,
    GEMMA_3N_E2B_TEXT,
    GEMMA_4_E2B_TEXT,
    GPT_OSS_20B,
    GRANITE_4_H_TINY,
    GRANITE_4_MICRO,
    JAIS_2_8B,
    LFM_2_1_2B,
    MINISTRAL_3_3B,
    NEMOTRON_NANO_9B_V2,
    OLMO_7B_0424,
    PHI_4_MINI,
    QWEN_3_5_9B,
)


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
    assert config.experts is None and config.state_space is None


def test_granite_4_h_tiny_has_nine_mixers_to_a_layer_that_attends_and_experts_everywhere():
    config = read(GRANITE_4_H_TINY)
    assert config.layer_kinds == (("mamba",) * 5 + ("full",) + ("mamba",) * 4) * 4
    mixer, experts = config.state_space, config.experts
    assert (mixer.heads, mixer.head_dim, mixer.groups, mixer.state_dim, mixer.conv_width) == (
        48,
        64,
        1,
        128,
        4,
    )
    assert (mixer.conv_bias, mixer.input_bias, mixer.step_limits) == (True, False, (0.0, math.inf))
    assert (experts.num_experts, experts.experts_per_token, experts.width, experts.shared_width) == (
        64,
        6,
        512,
        1024,
    )
    assert config.layer_ropes == ("none",) * 40
    one_sided = {"time_step_limit": [0.01, {"__float__": "Infinity"}]}
    assert read(GRANITE_4_H_TINY | one_sided).state_space.step_limits == (0.01, math.inf)


def test_falcon_h1_has_mixers_beside_attention_and_factors_everywhere():
    config = read(FALCON_H1_0_5B)
    mixer = config.state_space
    assert config.layer_kinds == ("hybrid",) * 36 and mixer.gated_norm == "none" and mixer.width == 1536
    assert (config.gate_scale, config.mlp_output_scale) == (0.8838834764831844, 0.5859375)
    assert (mixer.input_scale, mixer.output_scale, mixer.part_scales[3]) == (1.25, 0.23570226039551587, 0.5)
    assert config.attention_multiplier == 0.39062499999999994 / 8
    normed = read(FALCON_H1_0_5B | {"mamba_rms_norm": True})
    assert normed.state_space.gated_norm == "gate_first"


def test_nemotron_nano_2_has_blocks_of_one_part():
    config = read(NEMOTRON_NANO_9B_V2)
    assert config.block == "single" and config.activation == "relu2" and not config.gated_mlp
    assert [config.layer_kinds.count(kind) for kind in ("mamba", "full", "mlp")] == [27, 4, 25]
    assert config.layer_kinds[:8] == ("mamba", "mlp") * 3 + ("mamba", "mamba")
    mixer = config.state_space
    assert (mixer.heads, mixer.head_dim, mixer.groups, mixer.step_limits) == (128, 80, 8, (0.001, math.inf))
    named = [
        {"M": "mamba", "*": "attention", "-": "mlp"}[letter]
        for letter in NEMOTRON_NANO_9B_V2["hybrid_override_pattern"]
    ]
    assert read(NEMOTRON_NANO_9B_V2 | {"hybrid_override_pattern": None, "layers_block_type": named}) == config
    assert family_for(NEMOTRON_NANO_9B_V2).left_out(NEMOTRON_NANO_9B_V2) == ("mtp.",)


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


def test_cwm_has_windows_and_a_rope_of_llama_3s_kind_where_the_file_is_silent():
    config = read(CWM)
    assert config.layer_kinds == ("full", "sliding", "sliding", "sliding") * 16
    assert (config.rope.kind, config.rope.factor, config.layer_ropes) == ("llama3", 16.0, ())
    assert read({key: value for key, value in CWM.items() if not key.startswith("rope")}) == config


def test_jais_2_has_biases_where_the_file_is_silent():
    silent = {key: value for key, value in JAIS_2_8B.items() if not key.endswith("_bias")}
    assert read(silent) == read(JAIS_2_8B) and read(silent).mlp_bias and read(silent).output_bias


@pytest.mark.parametrize(
    "hf",
    [
        CWM,
        JAIS_2_8B,
        OLMO_7B_0424,
        GEMMA_3N_E2B_TEXT,
        GEMMA_4_E2B_TEXT,
        GEMMA_2_2B,
        GEMMA_3_1B,
        PHI_4_MINI,
        LFM_2_1_2B,
        GRANITE_4_MICRO,
        GRANITE_4_H_TINY,
        FALCON_H1_0_5B,
        NEMOTRON_NANO_9B_V2,
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
        (GRANITE_4_MICRO, {"output_router_logits": True}, "output_router_logits"),
        (FALCON_H1_0_5B, {"mamba_d_ssm": None}, "mamba_d_ssm"),
        (FALCON_H1_0_5B, {"mamba_use_mlp": False}, "mamba_use_mlp"),
        (FALCON_H1_0_5B, {"ssm_multipliers": [1.0] * 4}, "ssm_multipliers"),
        (FALCON_H1_0_5B, {"hidden_act": "gelu"}, "hidden_act"),
        (NEMOTRON_NANO_9B_V2, {"hybrid_override_pattern": "ME" * 28}, "experts without a gate"),
        (NEMOTRON_NANO_9B_V2, {"hybrid_override_pattern": "M*-"}, "num_hidden_layers"),
        (NEMOTRON_NANO_9B_V2, {"hybrid_override_pattern": None}, "lacks hybrid_override_pattern"),
        (NEMOTRON_NANO_9B_V2, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (NEMOTRON_NANO_9B_V2, {"attention_head_dim": 64}, "attention_head_dim"),
        (NEMOTRON_NANO_9B_V2, {"mamba_hidden_act": "gelu"}, "mamba_hidden_act"),
        (NEMOTRON_NANO_9B_V2, {"time_step_limit": [0.1, 0.2]}, "time_step_limit"),
        (GRANITE_4_H_TINY, {"mamba_n_heads": 47}, "mamba_n_heads"),
        (GRANITE_4_H_TINY, {"mamba_n_groups": 5}, "5 groups"),
        (GRANITE_4_H_TINY, {"time_step_limit": [0.1]}, "time_step_limit"),
        (GRANITE_4_H_TINY, {"time_step_limit": [0.2, 0.1]}, "limits of state-space steps"),
        (GRANITE_4_H_TINY, {"layer_types": ["mamba"] * 40}, "no layer attends"),
        (GRANITE_4_H_TINY, {"layer_types": ["mamba", "attention"]}, "layer_types"),
        (GRANITE_4_H_TINY, {"layer_types": [["mamba"]] * 40}, "layer_types"),
        (GRANITE_4_H_TINY, {"mamba_expand": -2}, "mamba_expand"),
        (PHI_4_MINI, {"resid_pdrop": 0.1}, "resid_pdrop"),
    ],
)
def test_what_would_change_the_maths_is_refused(hf, change, named):
    with pytest.raises(InputError, match=named):
        family_for(hf | change)
