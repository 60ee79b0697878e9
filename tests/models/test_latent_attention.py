"""Latent attention: what a layer keeps, and that it computes the same however its layers are run."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.lora import LoRAConfig, add_lora, merge, merge_lora, split
from pronghorn.models import DecoderConfig
from pronghorn.models.latent_config import LatentConfig
from pronghorn.training.flops import count_flops
from tests.models.reference import random_ids, tiny_decoder
from tests.models.test_layer_residuals import BATCH, RANK, SEQ, saved_for_backward
from tests.tolerances import MODEL_GRADIENT, MODEL_LOGITS

HIDDEN, FFN, HEADS, LAYERS = 48, 80, 6, 2
LATENT = LatentConfig(rank=20, content_dim=8, position_dim=6, value_dim=10, query_rank=24)
HEAD_DIM = LATENT.content_dim + LATENT.position_dim


def build(layers="unrolled", latent=LATENT):
    config = DecoderConfig(
        "deepseek_v3", 131, HIDDEN, FFN, LAYERS, HEADS, HEADS, HEAD_DIM, 512,
        rope_interleaved=True, tie_word_embeddings=True, latent=latent,
    )  # fmt: skip
    return tiny_decoder(config, layers=layers)


def test_training_adapters_saves_latent_vectors_in_the_place_of_heads():
    found = saved_for_backward(build(), adapters=True)
    of_layers = collections.Counter({shape: n for shape, n in found.items() if shape[:2] == (BATCH, SEQ)})
    of_layers[BATCH, SEQ, HIDDEN] -= 1  # the final norm's input
    of_layers.pop((BATCH, SEQ, LATENT.position_dim // 2))  # cos and sin, the same in every layer
    saved = [
        (HIDDEN,), (HIDDEN,),  # the layer's input, and the stream after attention
        (LATENT.query_rank,), (LATENT.rank + LATENT.position_dim,),
        (HEADS, HEAD_DIM), (HEADS, LATENT.value_dim),  # attention's output, as it is computed and cut
        (FFN,), (FFN,),  # gate, up
        (), (), (), (),  # inverse rms of two norms of the stream and two of latent vectors
        (2 * RANK,), (RANK,), (RANK,),  # T of q_a and kv_a, of q_b, of kv_b
        (RANK,), (2 * RANK,), (RANK,),  # of o, of gate and up, of down
    ]  # fmt: skip
    expected = collections.Counter((BATCH, SEQ, *features) for features in saved for _ in range(LAYERS))
    assert of_layers == expected
    assert found[BATCH, HEADS, SEQ] == LAYERS  # logsumexp


def test_what_leaves_for_the_host_are_latent_vectors_too():
    found = saved_for_backward(build(), adapters=True, memory_policy="offload_projections")
    assert (
        found[BATCH, SEQ, LATENT.query_rank] == found[BATCH, SEQ, LATENT.rank + LATENT.position_dim] == LAYERS
    )
    assert found[BATCH, SEQ, HEADS, HEAD_DIM] == LAYERS, "attention's output alone"
    assert not found[BATCH, SEQ, HEADS, LATENT.value_dim] and not found[BATCH, SEQ, FFN]


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_gradients_are_the_same_under_every_memory_policy(layers):
    graph, lora, frozen = split(add_lora(build(layers), LoRAConfig(rank=RANK)))
    lora = jax.tree.map(lambda leaf: leaf + 0.05, lora)
    ids = jnp.asarray(random_ids(SEQ, batch=2))

    def gradient(policy):
        def loss(lora):
            return jnp.sum(merge(graph, lora, frozen).hidden_states(ids, memory_policy=policy) ** 2)

        return jax.jit(jax.grad(loss))(lora)

    usual = gradient("keep")
    assert all(np.any(leaf) for leaf in jax.tree.leaves(usual))
    for policy in ("attention", "layer_inputs", "offload_projections"):
        for one, two in zip(jax.tree.leaves(gradient(policy)), jax.tree.leaves(usual), strict=True):
            assert np.linalg.norm(one - two) <= MODEL_GRADIENT * np.linalg.norm(two), policy


def test_adapters_on_every_projection_compute_what_they_merge_to_and_dropout_reaches_them():
    model = build()
    adapted = add_lora(model, LoRAConfig(rank=3, dropout=0.5))
    graph, lora, frozen = split(adapted)
    adapted = merge(graph, jax.tree.map(lambda leaf: leaf + 0.05, lora), frozen)
    names = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    attention = adapted.segments[0].layers[0].self_attn
    assert all(getattr(attention, name).lora_A is not None for name in names)
    ids = jnp.asarray(random_ids(SEQ, batch=2))
    logits = adapted(ids)
    assert np.max(np.abs(logits - model(ids))) > 0.01
    assert np.max(np.abs(logits - merge_lora(adapted)(ids))) <= MODEL_LOGITS
    dropped = [adapted.hidden_states(ids, dropout_key=jax.random.key(seed)) for seed in (0, 1)]
    assert np.max(np.abs(dropped[0] - dropped[1])) > 0.01


def test_a_pair_is_counted_with_the_dims_of_queries_and_of_values():
    count = count_flops(build().config, {}, {})
    assert count.per_pair == 6 * HEADS * (HEAD_DIM + LATENT.value_dim) * LAYERS


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head_dim": 16}, "head_dim 16"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
        ({"qk_norm": True}, "norm of heads"),
        ({"sliding_window": 4, "layer_kinds": ("sliding",) * LAYERS}, "sees all"),
    ],
)
def test_what_latent_attention_does_not_have_is_refused(changes, named):
    sizes = {"num_kv_heads": HEADS, "head_dim": HEAD_DIM} | changes
    with pytest.raises(ValueError, match=named):
        DecoderConfig(
            "deepseek_v3",
            131,
            HIDDEN,
            FFN,
            LAYERS,
            HEADS,
            max_position_embeddings=512,
            latent=LATENT,
            **sizes,
        )
