"""The architectures that the step benchmarks use: true shapes, random weights."""

import dataclasses

from pronghorn.models import gpt_oss, qwen3_5
from pronghorn.models.config import DecoderConfig, RopeConfig
from pronghorn.models.experts_config import ExpertsConfig

LLAMA3_ROPE = RopeConfig(
    base=500000.0,
    kind="llama3",
    factor=8.0,
    original_max_position_embeddings=8192,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)

OSS = "gpt-oss-20b"  # its job is a LoRA within 16 GiB: adapters of attention, experts stay as they are published
MODELS = {
    "llama-3.1-8b": DecoderConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=LLAMA3_ROPE,
    ),
    "llama-3.2-1b": DecoderConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=LLAMA3_ROPE,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": DecoderConfig(
        family="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope=RopeConfig(base=100000.0),
        tie_word_embeddings=True,
    ),
    # The text tower of Gemma 3 4B: five sliding layers to a full one, each kind with a rope of its own.
    "gemma-3-4b": DecoderConfig(
        family="gemma3",
        vocab_size=262208,
        hidden_size=2560,
        intermediate_size=10240,
        num_layers=34,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        max_position_embeddings=131072,
        norm_weight_offset=1.0,
        activation="gelu_tanh",
        qk_norm=True,
        attention_scale=256**-0.5,
        sliding_window=1024,
        layer_kinds=(("sliding",) * 5 + ("full",)) * 5 + ("sliding",) * 4,
        rope=RopeConfig(base=1000000.0, kind="linear", factor=8.0, original_max_position_embeddings=131072),
        tie_word_embeddings=True,
        block="sandwich",
        embedding_scale=2560**0.5,
        layer_ropes=(("local",) * 5 + ("global",)) * 5 + ("local",) * 4,
        local_rope=RopeConfig(base=10000.0),
    ),
    "qwen3-0.6b": DecoderConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        qk_norm=True,
        rope=RopeConfig(base=1000000.0),
        tie_word_embeddings=True,
    ),
    "qwen3-30b-a3b": DecoderConfig(
        family="qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        max_position_embeddings=40960,
        qk_norm=True,
        rope=RopeConfig(base=1000000.0),
        experts=ExpertsConfig(num_experts=128, experts_per_token=8, width=768, normalized=True),
    ),
    OSS: gpt_oss.config_from_hf({
        "head_dim": 64, "hidden_size": 2880, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-05, "rope_theta": 150000,
        "sliding_window": 128, "swiglu_limit": 7.0, "vocab_size": 201088,
    }),
    # The text tower of Qwen3.5 9B: three gated delta nets to one gated attention. Sizes are the defaults of
    # Qwen3_5TextConfig in transformers ("Qwen3.5-9B style"); rope_theta, the context length and the dtype of the state
    # are from memory, since the published file was not at hand.
    "qwen3.5-9b": qwen3_5.config_from_hf({
        "attention_bias": False, "attn_output_gate": True, "full_attention_interval": 4, "head_dim": 256,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
        "model_type": "qwen3_5_text", "num_attention_heads": 16, "num_hidden_layers": 32, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default"},
        "tie_word_embeddings": False, "vocab_size": 248320,
    }),
    # The same in small, to try scripts out on a machine without a GPU.
    "qwen3.5-tiny": qwen3_5.config_from_hf({
        "head_dim": 32, "hidden_size": 64, "intermediate_size": 96, "linear_key_head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 16,
        "model_type": "qwen3_5_text", "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2,
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default"},
        "vocab_size": 512,
    }),
}  # fmt: skip
# So many layers of a model too large to be written for the peers in the time of a run.
MODELS["qwen3-30b-a3b-6-layers"] = dataclasses.replace(
    MODELS["qwen3-30b-a3b"], num_layers=6, layer_kinds=("full",) * 6
)


def lora_targets(name: str) -> str | tuple[str, ...]:
    """Every linear inside the layers: of Qwen's mixtures those of the experts too, which "all-linear" leaves out."""
    if MODELS[name].experts is None or name == OSS:
        return "all-linear"
    of_experts = tuple(f"experts.{part}_proj" for part in ("gate", "up", "down"))
    return ("q_proj", "k_proj", "v_proj", "o_proj", *of_experts)
