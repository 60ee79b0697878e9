"""Frequencies equal those of transformers for every scaling, at published sizes and whatever the length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pronghorn.models import RopeConfig, rope
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import read_rope
from pronghorn.pallas_kernels.rope import apply_rope
from tests.tolerances import KERNEL, assert_close

# Name -> (head_dim, max_position_embeddings, theta, scaling): as published, and what nobody published.
SCALINGS = {
    "default": (64, 8192, 100000.0, None),
    "linear": (64, 4096, 10000.0, {"type": "linear", "factor": 8.0}),
    "dynamic": (128, 64, 10000.0, {"type": "dynamic", "factor": 4.0}),
    "llama_3_1": (
        128,
        131072,
        500000.0,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "qwen_2_5_yarn": (
        128,
        32768,
        1000000.0,
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn_with_everything": (
        64,
        65536,
        10000.0,
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    ),
    "yarn_attention_factor": (
        64,
        65536,
        10000.0,
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.25,
        },
    ),
    "longrope_by_ratio": (
        32,
        131072,
        10000.0,
        {
            "rope_type": "longrope",
            "short_factor": [1 + i / 50 for i in range(16)],
            "long_factor": [1 + i * 1.5 for i in range(16)],
            "original_max_position_embeddings": 100,
        },
    ),
    "longrope_by_factor": (
        32,
        131072,
        10000.0,
        {
            "rope_type": "longrope",
            "factor": 32.0,
            "short_factor": [1 + i / 50 for i in range(16)],
            "long_factor": [1 + i * 1.5 for i in range(16)],
            "original_max_position_embeddings": 100,
        },
    ),
}


def config_with(head_dim: int, max_position_embeddings: int, rope_config: RopeConfig) -> DecoderConfig:
    return DecoderConfig("llama", 131, 48, 80, 1, 6, 2, head_dim, max_position_embeddings, rope=rope_config)


@pytest.mark.parametrize("length", [64, 333])
@pytest.mark.parametrize("name", SCALINGS)
def test_cos_and_sin_equal_transformers(name, length):
    head_dim, max_positions, theta, scaling = SCALINGS[name]
    hf = {"max_position_embeddings": max_positions, "rope_theta": theta, "rope_scaling": scaling}
    config = config_with(head_dim, max_positions, read_rope(hf, head_dim=head_dim))
    reference = LlamaRotaryEmbedding(LlamaConfig(head_dim=head_dim, **hf))
    positions = np.arange(length)[None]
    cos, sin = reference(torch.zeros(1), torch.from_numpy(positions))

    ours = jax.jit(lambda p: rope.cos_sin(config, p))(jnp.asarray(positions))

    for actual, expected in zip(ours, (cos, sin), strict=True):
        assert actual.dtype == jnp.float32 and actual.shape == (1, length, head_dim // 2)
        assert_close(actual, expected[..., : head_dim // 2].numpy(), tolerance=2e-5, what=name)


def test_the_new_and_the_old_way_of_writing_rope_are_read_alike():
    head_dim, context, theta, scaling = SCALINGS["llama_3_1"]
    old = {"max_position_embeddings": context, "rope_theta": theta, "rope_scaling": scaling}
    new = {"max_position_embeddings": context, "rope_parameters": {**scaling, "rope_theta": theta}}
    assert read_rope(old, head_dim=head_dim) == read_rope(new, head_dim=head_dim)


def test_longrope_changes_factors_past_the_original_context():
    head_dim, context, theta, scaling = SCALINGS["longrope_by_ratio"]
    hf = {"max_position_embeddings": context, "rope_theta": theta, "rope_scaling": scaling}
    config = config_with(head_dim, context, read_rope(hf, head_dim=head_dim))
    frequencies = jax.jit(lambda length: rope.inverse_frequencies(config, length))
    np.testing.assert_array_equal(frequencies(100), frequencies(1))
    assert frequencies(101)[5] < frequencies(100)[5] / 5


def test_dynamic_grows_past_the_context_only():
    head_dim, context, theta, scaling = SCALINGS["dynamic"]
    hf = {"max_position_embeddings": context, "rope_theta": theta, "rope_scaling": scaling}
    config = config_with(head_dim, context, read_rope(hf, head_dim=head_dim))
    frequencies = jax.jit(lambda length: rope.inverse_frequencies(config, length))
    np.testing.assert_array_equal(frequencies(64), frequencies(1))
    assert frequencies(65)[40] < frequencies(64)[40]
    assert frequencies(130)[40] < frequencies(65)[40]


def test_rotate_equals_the_rope_op_and_leaves_the_rest_of_a_head_alone():
    config = config_with(10, 64, RopeConfig(partial_rotary_factor=0.6))
    keys = jax.random.split(jax.random.key(0), 2)
    q, k = (jax.random.normal(key, (2, 7, heads, 10)) for key, heads in zip(keys, (3, 1), strict=True))
    cos, sin = rope.cos_sin(config, jnp.arange(14).reshape(2, 7))
    assert cos.shape == (2, 7, 3)
    for actual, expected in zip(
        (rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)), apply_rope(q, k, cos, sin), strict=True
    ):
        assert_close(actual, expected, tolerance=KERNEL["float32"])
    np.testing.assert_array_equal(rope.rotate(q, cos, sin)[..., 6:], q[..., 6:])
