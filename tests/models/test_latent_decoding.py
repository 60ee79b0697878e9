"""Decoding with latent attention: what the cache keeps, and that it gives the logits of one full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.lora import LoRAConfig, add_lora, merge, split
from pronghorn.models import DecoderConfig
from pronghorn.models.latent_config import LatentConfig
from pronghorn.models.latent_decoding import absorbs
from pronghorn.quantization import QuantizationConfig, quantize
from tests.models.reference import forward, random_ids, tiny_decoder
from tests.models.test_cache import (
    DYNAMIC,
    LONGROPE,
    check_later_padding,
    check_rows_of_different_lengths,
    close,
    decode_in_pieces,
)
from tests.tolerances import MODEL_LOGITS

LATENT = LatentConfig(rank=20, content_dim=8, position_dim=10, value_dim=14, query_rank=24)
CONFIG = DecoderConfig(
    "deepseek_v3", 131, 48, 80, 2, 6, 6, LATENT.content_dim + LATENT.position_dim, 512,
    rope_interleaved=True, latent=LATENT,
)  # fmt: skip
TOKENS, PIECES = 17, [12, 1, 1, 1, 1, 1]


def build(layers="unrolled", **changes):
    return tiny_decoder(dataclasses.replace(CONFIG, **changes), layers=layers)


def with_adapters(model, **options):
    """Every adapter away from its start, that of kv_b_proj large enough to matter."""
    graph, lora, frozen = split(add_lora(model, LoRAConfig(rank=3, alpha=6, **options)))
    leaves, structure = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return merge(graph, jax.tree.unflatten(structure, noisy), frozen)


def with_quantized(model, config):
    """kv_b_proj quantised, and nothing else."""
    for segment in model.segments:
        for layer in segment.layers:
            weight = layer.self_attn.kv_b_proj.weight
            weight.set_value(quantize(weight.get_value(), config))
    return model


def matters(model, other):
    ids = random_ids(TOKENS)
    assert np.max(np.abs(forward(model, ids) - forward(other, ids))) > 100 * MODEL_LOGITS


@pytest.mark.parametrize(("layers", "leading"), [("unrolled", ()), ("scanned", (2,))])
def test_the_cache_keeps_a_latent_vector_and_a_position_key_a_token(layers, leading):
    cache = build(layers).init_cache(3, 7)
    shapes = [(layer.keys.shape, layer.values.size) for segment in cache for layer in segment]
    assert shapes == [((*leading, 3, 7, 1, LATENT.rank + LATENT.position_dim), 0)] * (1 if leading else 2)


def test_single_tokens_are_absorbed_and_long_prefills_expand_heads():
    found = {tokens: absorbs(CONFIG, tokens, TOKENS) for tokens in (1, 4, 12)}
    assert found == {1: True, 4: True, 12: False}, "the pieces below are of both kinds"
    deepseek_v3 = dataclasses.replace(
        CONFIG,
        num_heads=128,
        num_kv_heads=128,
        head_dim=192,
        latent=LatentConfig(512, 128, 64, 128, query_rank=1536),
    )
    assert absorbs(deepseek_v3, 64, 4096) and not absorbs(deepseek_v3, 512, 4096)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_interleaved": False, "latent": dataclasses.replace(LATENT, query_rank=0)},
        {"layer_ropes": ("none", "global")},
    ],
    ids=["neighbours", "halves", "no rope"],
)
def test_pieces_of_every_size_equal_the_full_forward_pass(layers, changes):
    model, ids = build(layers, **changes), random_ids(TOKENS, batch=2)
    close(decode_in_pieces(model, ids, [12, 1, 3, 1], max_length=TOKENS), forward(model, ids))


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"init": "pissa"}], ids=["lora", "dora", "pissa"]
)
def test_adapters_of_the_expansion_are_absorbed_with_it(layers, options):
    plain = build(layers)
    model = with_adapters(plain, targets=("kv_b_proj",), **options)
    matters(model, plain)
    ids = random_ids(TOKENS, batch=2)
    close(decode_in_pieces(model, ids, PIECES, max_length=TOKENS), forward(model, ids))


@pytest.mark.parametrize(
    ("layers", "how"),
    [
        ("unrolled", QuantizationConfig("nf4")),
        ("scanned", QuantizationConfig("nf4")),
        ("unrolled", QuantizationConfig("int8")),
        # With rounded activations no two cuts of a row are equal: a scale is that of a call.
        ("unrolled", QuantizationConfig("fp8", fp8_activations="unrounded")),
    ],
    ids=["nf4", "nf4 scanned", "int8", "fp8"],
)
def test_a_quantized_expansion_with_an_adapter_is_absorbed(layers, how):
    plain = build(layers)
    model = with_adapters(with_quantized(build(layers), how))
    matters(model, plain)
    ids = random_ids(TOKENS, batch=2)
    close(decode_in_pieces(model, ids, PIECES, max_length=TOKENS), forward(model, ids))


def test_rows_of_different_lengths_equal_each_row_alone():
    check_rows_of_different_lengths(build())


def test_padding_to_the_right_at_later_positions_is_overwritten_before_it_is_seen():
    check_later_padding(build())


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_position_keys_from_before_a_change_of_frequencies_are_rotated_as_after_it(rope):
    # One layer: no hidden state depends on the frequencies, so crossing the switch is exact.
    model, ids = build(rope=rope, num_layers=1, layer_kinds=("full",)), random_ids(24)
    logits = decode_in_pieces(model, ids, [13, 3, 1, 1, 1, 1, 1, 1, 1, 1], max_length=30)
    full = forward(model, ids)
    close(logits[:, -1:], full[:, -1:])
    assert np.max(np.abs(np.asarray(forward(model, ids[:, :16])) - full[:, :16])) > 100 * MODEL_LOGITS, (
        "the switch matters"
    )


def test_bf16_rounds_no_more_than_the_full_forward_pass():
    exact = build()
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact)
    model.dtype = jnp.dtype(jnp.bfloat16)
    ids = random_ids(TOKENS, batch=2)
    wanted = forward(exact, ids)
    full = np.linalg.norm(forward(model, ids) - wanted)
    decoded = np.linalg.norm(decode_in_pieces(model, ids, [1] * TOKENS, max_length=TOKENS) - wanted)
    assert decoded < 1.5 * full
