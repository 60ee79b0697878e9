"""Feed-forward networks a tile of tokens at a time: the same result, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.lora import LoRAConfig, add_lora, merge, split
from pronghorn.models import DecoderConfig
from pronghorn.models.token_tiles import in_token_tiles
from tests.models.reference import gradient_error, random_ids, tiny_decoder
from tests.tolerances import MODEL_GRADIENT, assert_close


def config(num_layers=2, **changes):
    return DecoderConfig("llama", 131, 48, 80, num_layers, 6, 2, 10, 512, tie_word_embeddings=True, **changes)


CONFIG = config()


def gradients(model, ids, tile, policy="keep"):
    graph, trained, frozen = split(model)

    def loss(trained):
        hidden = merge(graph, trained, frozen).hidden_states(ids, memory_policy=policy, mlp_tile_tokens=tile)
        return jnp.sum(jnp.sin(hidden)), hidden

    (_, hidden), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    return hidden, [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


def trained_adapters(model):
    """Adapters whose B is not zero, so that every factor has a gradient."""
    model = add_lora(model, LoRAConfig(rank=3))
    graph, lora, frozen = split(model)
    noise = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda leaf: leaf + jnp.float32(0.1) * noise.standard_normal(leaf.shape, np.float32), lora
    )
    return merge(graph, lora, frozen)


@pytest.mark.parametrize(
    ("changes", "layers", "policy"),
    [
        ({}, "scanned", "offload_attention"),  # 2 x 150 tokens: three tiles of 128, the last one with padding
        ({"block": "parallel", "norm": "layer", "num_layers": 1}, "unrolled", "keep"),
        ({"gated_mlp": False, "activation": "relu2", "num_layers": 1}, "unrolled", "layer_inputs"),
    ],
)
def test_tiles_change_neither_output_nor_gradients(changes, layers, policy):
    model = trained_adapters(tiny_decoder(config(**changes), layers=layers))
    ids = random_ids(150, batch=2)
    hidden, expected = gradients(model, ids, None, policy)
    tiled_hidden, found = gradients(model, ids, 128, policy)
    assert_close(tiled_hidden, hidden)
    assert all(
        gradient_error(one, other) < MODEL_GRADIENT for one, other in zip(found, expected, strict=True)
    )


def test_weights_and_norms_are_trained_through_tiles():
    model = tiny_decoder(config(num_layers=1))
    ids = random_ids(64, batch=4)
    expected, found = (gradients(model, ids, tile)[1] for tile in (None, 128))
    assert all(
        gradient_error(one, other) < MODEL_GRADIENT for one, other in zip(found, expected, strict=True)
    )


def test_nothing_wider_than_a_tile_is_made():
    model = trained_adapters(tiny_decoder(CONFIG, layers="scanned"))
    graph, lora, frozen = split(model)
    ids = random_ids(512)

    def loss(lora):
        hidden = merge(graph, lora, frozen).hidden_states(
            ids, memory_policy="layer_inputs", mlp_tile_tokens=128
        )
        return jnp.sum(hidden)

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(lora))
    wide = CONFIG.intermediate_size
    assert f"f32[128,{wide}]" in jaxpr or f"f32[1,128,{wide}]" in jaxpr
    assert f"[1,512,{wide}]" not in jaxpr and f"[512,{wide}]" not in jaxpr


def test_preparation_runs_once_a_pass_and_not_in_every_tile():
    calls = []

    def prepare(operands):
        calls.append(1)
        return operands

    def function(operands, rows, tile):
        return rows[0] * operands

    def total(w, x):
        return jnp.sum(in_token_tiles(function, w, (x,), tile_tokens=128, prepare=prepare) ** 2)

    x = jnp.ones((1, 512, 2))
    dw, dx = jax.grad(total, (0, 1))(jnp.full((2,), 3.0), x)
    np.testing.assert_allclose(dw, [2 * 3.0 * 512] * 2)
    np.testing.assert_allclose(dx, 2 * 9.0 * x)
    assert len(calls) == 2
