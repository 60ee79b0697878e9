"""Gated delta nets in a decoder: packing leaks nothing, and decoding takes padding, restarts and stacked layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pronghorn.models import Decoder, DecoderConfig
from pronghorn.pallas_kernels import kernels
from tests.models.decoding_checks import check_packed_document, check_pieces_and_restart
from tests.models.reference import random_ids, tiny_decoder
from tests.pallas_kernels.comparison import segments
from tests.tolerances import MODEL_LOGITS, assert_close

CONFIG = DecoderConfig(
    "qwen3_5", 131, 24, 40, 3, 2, 1, 8, 512, qk_norm=True, attention_gate=True, norm_weight_offset=1.0,
    rms_norm_eps=1e-3, layer_kinds=("linear", "linear", "full"), conv_width=4, linear_key_heads=1, linear_value_heads=2,
    linear_key_dim=8, linear_value_dim=6,
)  # fmt: skip
IDS = random_ids(30, batch=2)
MODEL = tiny_decoder(CONFIG, layers="scanned")


def close(actual, expected):
    assert np.std(expected) > 0.1
    assert np.max(np.abs(np.asarray(actual) - np.asarray(expected))) <= MODEL_LOGITS


def test_a_packed_document_is_the_document_alone():
    check_packed_document(MODEL, IDS, close)


def test_padded_pieces_single_tokens_and_a_row_that_starts_anew_equal_full_passes():
    check_pieces_and_restart(MODEL, IDS, close)


def loss_gradients(model: Decoder, implementation: str):
    """Of every parameter, with segments."""
    graph, state = nnx.split(model)
    ids = segments(2, 30, 3, 17)

    def loss(state):
        hidden = nnx.merge(graph, state).hidden_states(IDS, segment_ids=ids)
        return jnp.sum(jnp.square(hidden.astype(jnp.float32)))

    with kernels(implementation):
        return jax.tree.leaves(jax.jit(jax.grad(loss))(state))


def test_kernels_of_convolution_and_rule_give_the_gradients_of_xla():
    config = dataclasses.replace(CONFIG, linear_key_dim=8, linear_value_dim=8)
    model = tiny_decoder(config, layers="scanned")
    pairs = zip(loss_gradients(model, "pallas"), loss_gradients(model, "xla"), strict=True)
    for found, wanted in pairs:
        assert_close(found, wanted)


@pytest.mark.parametrize(("policy", "kept"), [("keep", 2), ("attention", 0), ("layer_inputs", 0)])
def test_the_inverse_of_the_rule_is_kept_where_nothing_is_computed_again(policy, kept):
    model = tiny_decoder(dataclasses.replace(CONFIG, linear_key_dim=8, linear_value_dim=8))
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)

    def residuals(state):
        def hidden(state):
            return nnx.merge(graph, state).hidden_states(IDS, memory_policy=policy)

        return jax.tree.leaves(jax.vjp(hidden, state)[1])

    with kernels("pallas"):
        outputs = jax.make_jaxpr(residuals)(state).jaxpr.outvars
    assert [v.aval.shape for v in outputs].count(
        (1, 2, 2, 64, 64)
    ) == kept  # chunks, batch, value heads, C, C
