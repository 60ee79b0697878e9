"""The architectures that the step benchmarks use: true shapes, random weights."""

from pronghorn.models.config import DecoderConfig, RopeConfig

LLAMA3_ROPE = RopeConfig(
    base=500000.0,
    kind="llama3",
    factor=8.0,
    original_max_position_embeddings=8192,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)

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
}
