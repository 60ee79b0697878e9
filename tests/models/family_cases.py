"""A tiny random model of every family with its real structure, for the checks in `family_checks.py`.

Each has at least one period of the layer pattern and one layer more, an odd vocabulary, fewer key/value heads than
query heads, and every switch of the family on. All in fp32.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to build: overrides of the sizes in `reference.py`, and how our layers are laid out."""

    model_type: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    layers: str = "unrolled"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(6)],
    "long_factor": [1.0 + 0.7 * i for i in range(6)],
}
# Values narrower than queries and keys, which have dims that are rotated and dims that are not.
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
# Delta nets, and attention with a gate.
DELTA_NETS = {
    "head_dim": 16,
    "attention_bias": True,
    # A head that reads next to nothing is normalised, which magnifies rounding: with the 1e-5 of the others
    # transformers' own two forms of the rule, chunks and recurrence, differ by 1.2e-4 in the logits.
    "rms_norm_eps": 1e-3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
# As Granite 4's: `time_step_limit` cuts off a share of the steps at either end.
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_n_groups": 2,
    "mamba_d_state": 10,
    "mamba_chunk_size": 16,
    "mamba_proj_bias": True,
    "time_step_limit": [0.3, 1.1],
    "layer_types": ["mamba", "mamba", "attention", "mamba"],
    "num_hidden_layers": 4,
}
FALCON_H1 = {
    **{key: value for key, value in MAMBA.items() if key not in ("layer_types", "num_hidden_layers")},
    "mamba_d_ssm": 96,
    "projectors_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 1.3,
    "embedding_multiplier": 6.0,
    "key_multiplier": 0.6,
    "lm_head_multiplier": 0.7,
    "mlp_multipliers": [0.9, 1.4],
    "ssm_in_multiplier": 1.25,
    "ssm_multipliers": [0.8, 1.2, 0.7, 1.5, 0.6],
    "ssm_out_multiplier": 0.9,
}
GRANITE_4 = {
    "shared_intermediate_size": 96,
    "position_embedding_type": "rope",
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
    "attention_bias": True,
}
# family name -> case. Windows of 17 tokens cut in every check.
CASES = {
    "llama": Case("llama", {"mlp_bias": True}, "scanned"),
    "mistral": Case("mistral", {"sliding_window": 17, "head_dim": 10}, "scanned"),
    "ministral": Case(
        "ministral",
        {
            "head_dim": 10,
            "sliding_window": 17,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "num_hidden_layers": 4,
        },
    ),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}, "scanned"),
    "qwen3": Case("qwen3", {"head_dim": 12}, "scanned"),
    "gemma": Case("gemma", {"head_dim": 12}, "scanned"),
    "gemma2": Case(
        "gemma2",
        {
            "head_dim": 12,
            "sliding_window": 17,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            "head_dim": 12,
            "sliding_window": 17,
            "query_pre_attn_scalar": 20,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    # As Gemma 4 below. The second stream is the active one, and the table of inputs is shorter than the vocabulary.
    "gemma3n": Case(
        "gemma3n_text",
        {
            "num_hidden_layers": 5,
            "rms_norm_eps": 1e-3,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            "head_dim": 6,
            "sliding_window": 17,
            "num_kv_shared_layers": 2,
            "intermediate_size": [80, 64, 80, 64, 80],
            "activation_sparsity_pattern": [0.7, 0.0, 0.9, 0.0, 0.0],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 100,
            "altup_num_inputs": 4,
            "altup_active_idx": 1,
            "laurel_rank": 4,
            "final_logit_softcapping": 3.0,
        },
    ),
    # Of both kinds a layer with keys and values of its own, one that others read, and one that reads. A head that reads
    # next to nothing is normalised: with an epsilon of 1e-5 transformers' logits in fp32 are 8e-5 from its own in fp64.
    "gemma4": Case(
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "rms_norm_eps": 1e-3,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "head_dim": 6,
            "global_head_dim": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 17,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 131,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": Case(
        "phi3",
        {
            "hidden_size": 96,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 150,
            "rope_scaling": LONGROPE,
        },
        "scanned",
    ),
    "smollm3": Case("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}),
    "olmo": Case("olmo", {"clip_qkv": 0.9, "attention_bias": True}, "scanned"),
    "olmo2": Case("olmo2", {}, "scanned"),
    "olmo3": Case(
        "olmo3",
        {
            "num_hidden_layers": 5,
            "sliding_window": 17,
            "rope_parameters": {
                "full_attention": YARN | {"rope_theta": 500000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            },
        },
    ),
    "granite": Case(
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
            "attention_bias": True,
        },
        "scanned",
    ),
    "cohere": Case("cohere", {"use_qk_norm": True, "logit_scale": 0.25, "attention_bias": True}, "scanned"),
    "cohere2": Case("cohere2", {"num_hidden_layers": 5, "sliding_window": 17, "logit_scale": 0.25}),
    "starcoder2": Case("starcoder2", {"sliding_window": 17}, "scanned"),
    "seed_oss": Case("seed_oss", {"head_dim": 10}, "scanned"),
    "apertus": Case("apertus", {}, "scanned"),
    "ernie4_5": Case("ernie4_5", {"head_dim": 12, "use_bias": True}, "scanned"),
    "exaone": Case(
        "exaone",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
        "scanned",
    ),
    "exaone4": Case("exaone4", {"num_hidden_layers": 5, "sliding_window": 17}),
    "nemotron": Case("nemotron", {"mlp_bias": True}, "scanned"),
    "jais2": Case("jais2", {"layer_norm_eps": 1e-5}, "scanned"),
    "cwm": Case("cwm", {"head_dim": 10, "num_hidden_layers": 5, "sliding_window": 17}),
    "stablelm": Case("stablelm", {"hidden_size": 96, "use_qkv_bias": True}, "scanned"),
    "hunyuan": Case(
        "hunyuan_v1_dense",
        {
            "head_dim": 10,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1e4},
        },
        "scanned",
    ),
    "helium": Case("helium", {"head_dim": 8}, "scanned"),
    "arcee": Case("arcee", {"rope_parameters": YARN | {"rope_theta": 1e4}}, "scanned"),
    "glm": Case("glm", {"head_dim": 12}, "scanned"),
    "glm4": Case("glm4", {"head_dim": 12}, "scanned"),
    "granite4": Case("granitemoehybrid", GRANITE_4 | MAMBA | {"num_local_experts": 0}),
    "vaultgemma": Case(
        "vaultgemma",
        {
            "head_dim": 12,
            "sliding_window": 17,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "hyperclovax": Case(
        "hyperclovax",
        {"head_dim": 10, "embedding_multiplier": 6.0, "residual_multiplier": 0.7, "logits_scaling": 0.5},
        "scanned",
    ),
    "internlm3": Case(
        "internlm3",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 10,
            "rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 1e4},
        },
        "scanned",
    ),
    "iquestcoder": Case("iquestcoder", {"head_dim": 10}, "scanned"),
    "lfm2": Case(
        "lfm2",
        {
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "num_hidden_layers": 4,
            "conv_bias": True,
            "norm_eps": 1e-5,
            "block_multiple_of": 16,
            "block_ffn_dim_multiplier": 1.2,
        },
    ),
    "qwen3_moe": Case(
        "qwen3_moe",
        {
            "head_dim": 12,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": Case(
        "mixtral", {"num_local_experts": 5, "sliding_window": 17, "intermediate_size": 40}, "scanned"
    ),
    "olmoe": Case("olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 40}, "scanned"),
    "qwen2_moe": Case(
        "qwen2_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 64,
            "decoder_sparse_step": 2,
        },
    ),
    "gpt_oss": Case(
        "gpt_oss",
        {
            "head_dim": 12,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "intermediate_size": 40,
            "sliding_window": 17,
            "swiglu_limit": 0.6,
            "rope_parameters": YARN | {"rope_theta": 150000.0, "truncate": False},
        },
    ),
    "ministral3": Case(
        "ministral3",
        {
            "head_dim": 10,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 18,
                "max_position_embeddings": 1024,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
        "scanned",
    ),
    "qwen3_5": Case("qwen3_5_text", DELTA_NETS | {"num_hidden_layers": 5}),
    "glm4_moe": Case(
        "glm4_moe",
        {
            "head_dim": 12,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
        },
    ),
    "ernie4_5_moe": Case(
        "ernie4_5_moe",
        {
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_intermediate_size": 40,
            "moe_num_shared_experts": 2,
            "moe_layer_interval": 2,
        },
    ),
    "deepseek_v2": Case(
        "deepseek_v2",
        LATENT
        | {
            "q_lora_rank": None,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "rope_parameters": YARN | {"rope_theta": 1e4, "mscale": 0.707, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3": Case(
        "deepseek_v3",
        LATENT
        | {
            "q_lora_rank": 24,
            "attention_bias": True,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": YARN | {"rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "minicpm3": Case(
        "minicpm3",
        # Values wider than queries and keys.
        LATENT
        | {"v_head_dim": 18, "q_lora_rank": 24, "dim_model_base": 24, "scale_emb": 6, "scale_depth": 1.1},
        "scanned",
    ),
    "llama4": Case(
        "llama4_text",
        {
            "num_hidden_layers": 5,
            "head_dim": 12,
            # No attention_bias: that of keys without positions moves every logit of a query alike, and its gradient is
            # nothing but rounding.
            "attention_chunk_size": 17,
            "floor_scale": 16,
            "attn_scale": 0.5,
            "intermediate_size": 40,
            "intermediate_size_mlp": 80,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "qwen3_next": Case(
        "qwen3_next",
        DELTA_NETS
        | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "rms_norm_eps": 1e-2,  # transformers' two forms differ by 4e-5 with the dense family's
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 64,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_5_moe": Case(
        "qwen3_5_moe_text",
        DELTA_NETS
        | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "rms_norm_eps": 1e-2,  # transformers' two forms differ by 4e-5 with the dense family's
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "falcon_h1": Case("falcon_h1", FALCON_H1 | {"mamba_rms_norm": True}, "scanned"),
    "nemotron_h": Case(
        "nemotron_h",
        {
            "num_hidden_layers": 7,
            "layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp", "mamba", "mlp"],
            "head_dim": 10,
            "mlp_bias": True,
            "layer_norm_epsilon": 1e-5,
            "mamba_num_heads": 6,
            "mamba_head_dim": 8,
            "n_groups": 3,
            "ssm_state_size": 9,
            "chunk_size": 16,
            "use_bias": True,
            "time_step_min": 0.5,
        },
    ),
}

# name -> case of a family that has one above, of another kind: checked alike, and not in the table of docs/models.md.
VARIANTS = {
    "granite4_dense": Case(
        "granitemoehybrid",
        GRANITE_4 | {"num_local_experts": 0, "mamba_n_heads": 32, "layer_types": ["full_attention"] * 2},
        "scanned",
    ),
    "granite4_moe": Case(
        "granitemoehybrid",
        GRANITE_4
        | MAMBA
        | {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "intermediate_size": 40,
            "position_embedding_type": None,
            "attention_bias": False,  # of keys without positions: see Llama 4's
        },
    ),
    "falcon_h1_without_a_norm": Case("falcon_h1", FALCON_H1),
    "falcon_h1_with_the_norm_behind_the_gate": Case(
        "falcon_h1", FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False}
    ),
}
