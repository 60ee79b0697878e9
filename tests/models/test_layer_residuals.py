"""What a decoder layer keeps for its backward pass when nothing is recomputed: these arrays, and no other."""

import collections

import jax
import jax.extend
import numpy as np
import pytest

from pronghorn.lora import LoRAConfig, add_lora, merge, split
from pronghorn.models import Decoder, DecoderConfig
from pronghorn.pallas_kernels.launch import kernels
from tests.models.reference import tiny_decoder

LAYERS, BATCH, SEQ, RANK = 3, 2, 17, 4
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 48, 80, 6, 2, 10
KEY_VALUE = (KV_HEADS, HEAD_DIM)

# Features of every array saved in one layer, [batch, seq] in front of them.
SAVED = [
    (HIDDEN,), (HIDDEN,),  # the layer's input, and the stream after attention
    (HEADS, HEAD_DIM), KEY_VALUE, KEY_VALUE,  # q and k after rope, v
    (HEADS, HEAD_DIM),  # attention's output
    (FFN,), (FFN,),  # gate, up
    (), (),  # inverse rms of both norms
    (3 * RANK,), (RANK,), (2 * RANK,), (RANK,),  # T of qkv, o, gate and up, down
]  # fmt: skip
HEAD_NORMS = [(HEADS, HEAD_DIM), KEY_VALUE]  # q and k before their norm


def build(layers: str, **changes) -> Decoder:
    config = DecoderConfig(
        "llama", 131, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, 512, tie_word_embeddings=True, **changes
    )
    return tiny_decoder(config, layers=layers)


def saved_for_backward(model: Decoder, *, adapters: bool, **options) -> collections.Counter:
    """Shapes of all arrays with one row a token that the backward pass of every parameter trained finds."""
    graph, trained, frozen = split(add_lora(model, LoRAConfig(rank=RANK))) if adapters else split(model)
    ids = np.zeros((BATCH, SEQ), np.int32)

    def residuals(trained):
        def hidden(trained):
            return merge(graph, trained, frozen).hidden_states(ids, **options)

        return jax.tree.leaves(jax.vjp(hidden, trained)[1])

    with kernels("pallas"):
        outputs = jax.make_jaxpr(residuals)(trained).jaxpr.outvars
    variables = {v for v in outputs if isinstance(v, jax.extend.core.Var)}
    return collections.Counter(v.aval.shape for v in variables)


def expected(layers: str, saved: list[tuple[int, ...]]) -> collections.Counter:
    if layers == "scanned":
        return collections.Counter((LAYERS, BATCH, SEQ, *features) for features in saved)
    return collections.Counter({(BATCH, SEQ, *f): LAYERS * n for f, n in collections.Counter(saved).items()})


def assert_layers_save(found: collections.Counter, layers: str, saved: list[tuple[int, ...]]):
    layer_axes = (LAYERS,) if layers == "scanned" else ()
    assert found[*layer_axes, BATCH, HEADS, SEQ] == (1 if layer_axes else LAYERS)  # logsumexp
    leading = (*layer_axes, BATCH, SEQ)
    found = collections.Counter({s: n for s, n in found.items() if s[: len(leading)] == leading})
    if layers == "unrolled":
        found[BATCH, SEQ, HIDDEN] -= 1  # the final norm's input
        found.pop((BATCH, SEQ, HEAD_DIM // 2))  # cos and sin, the same arrays in every layer
        found.pop((BATCH, SEQ, 1), None)  # ids, where the embedding is trained
    assert found == expected(layers, saved)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_training_adapters_saves_what_was_chosen(layers):
    found = saved_for_backward(build(layers), adapters=True)
    assert_layers_save(found, layers, SAVED)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_normalised_heads_add_what_was_normalised(layers):
    found = saved_for_backward(build(layers, qk_norm=True), adapters=True)
    assert_layers_save(found, layers, SAVED + HEAD_NORMS)


def test_full_fine_tuning_saves_no_more_than_the_stream_needs():
    found = saved_for_backward(build("unrolled"), adapters=False)
    assert_layers_save(found, "unrolled", SAVED[:-4])


def test_layer_norms_and_mlps_without_a_gate_save_no_more():
    model = build("unrolled", norm="layer", norm_bias=True, gated_mlp=False, activation="gelu_tanh")
    found = saved_for_backward(model, adapters=True)
    one_wide = [*SAVED[:6], (FFN,), (RANK,)]  # W_up n alone, and T of o
    assert_layers_save(found, "unrolled", one_wide)


def test_norms_on_outputs_add_what_they_normalise():
    found = saved_for_backward(build("unrolled", block="post"), adapters=True)
    # Of attention and MLP; T of o, and its input, which is attention's output in another shape.
    outputs = [(HIDDEN,), (HIDDEN,), (RANK,), (HEADS * HEAD_DIM,)]
    assert_layers_save(found, "unrolled", [*SAVED[:8], *outputs])
