"""Layers that share keys and values, have inputs of their own and more than one stream, beyond what families check."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.converters.huggingface import load_model, save_model
from pronghorn.converters.safetensors_files import TensorSpec, open_weights, write_weights
from pronghorn.errors import InputError
from pronghorn.evaluation.sensitivity import Sensitivity
from pronghorn.lora import merge, split
from pronghorn.models import Decoder, DecoderConfig, RopeConfig
from pronghorn.models.altup import cut_off
from pronghorn.models.extras_config import AltUpConfig, ExtrasConfig
from pronghorn.new_tokens import with_tokens
from tests.models.reference import decoder_results, gradient_error, random_ids, tiny_decoder
from tests.tolerances import MODEL_GRADIENT, MODEL_LOGITS

KINDS = ("sliding", "full") * 3
SHARED = ExtrasConfig(
    sliding_head_dim=4,
    sliding_kv_heads=1,
    value_norm=True,
    keys_as_values=True,
    shared_kv_layers=4,
    layer_widths=(40,) * 2 + (80,) * 4,
    input_width=5,
    input_vocab=131,
    layer_scalar=True,
)

STREAMS = ExtrasConfig(
    value_norm=True,
    shared_kv_layers=4,
    gate_sparsity=(0.5, 0.0, 0.8, 0.8, 0.8, 0.8),
    input_width=5,
    input_vocab=100,
    altup=AltUpConfig(streams=3, active=1, scale_corrected=True, laurel_rank=2),
)


def config_of(extras=SHARED, kinds=KINDS, **changes):
    fields = {
        "family": "gemma4",
        "vocab_size": 131,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_layers": len(kinds),
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-3,
        "activation": "gelu_tanh",
        "qk_norm": True,
        "attention_scale": 1.0,
        "sliding_window": 9,
        "layer_kinds": kinds,
        "layer_ropes": tuple("local" if kind == "sliding" else "global" for kind in kinds),
        "rope": RopeConfig(kind="proportional", base=1e6, partial_rotary_factor=0.25),
        "local_rope": RopeConfig(),
        "tie_word_embeddings": True,
        "block": "sandwich",
    }
    return DecoderConfig(**(fields | changes), extras=extras)


@pytest.mark.parametrize(
    "config", [config_of(), config_of(STREAMS, ("full",) * 6)], ids=["gemma 4", "gemma 3n"]
)
def test_layers_that_are_alike_are_scanned_over_and_compute_what_single_ones_do(config):
    ids = random_ids(30, batch=2)
    single, scanned = (tiny_decoder(config, layers=layers) for layers in ("unrolled", "scanned"))
    assert max(segment.repeats for segment in scanned.segments) > 1
    (logits, gradients), (expected, expected_gradients) = map(decoder_results, (scanned, single), (ids, ids))
    np.testing.assert_allclose(logits, expected, atol=MODEL_LOGITS)
    for name, gradient in expected_gradients.items():
        assert gradient_error(gradients[name], gradient) <= MODEL_GRADIENT, name


def test_a_cache_of_shared_keys_and_values_goes_on_where_one_pass_would_be():
    model = tiny_decoder(config_of(), layers="scanned")
    ids = jnp.asarray(random_ids(20))
    cache, found = model.init_cache(1, 20), []
    graph, trained, frozen = split(model)
    step = jax.jit(lambda *given: merge(graph, trained, frozen).decode(*given))
    for start, end in ((0, 13), (13, 14), (14, 20)):
        logits, cache = step(ids[:, start:end], cache, jnp.arange(start, end)[None])
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), jax.jit(model)(ids), atol=MODEL_LOGITS)
    kept = sum(layer.keys.size for segment in cache for layer in segment)
    assert kept == 20 * (4 + 2 * 8), "layers that read another's keep nothing"


@pytest.mark.parametrize(
    ("layers", "kinds", "shared", "policy"),
    [
        ("unrolled", ("sliding", "full", "sliding"), 1, "offload_projections"),
        ("scanned", ("full",) * 3, 2, "offload"),
    ],
)
def test_residuals_that_wait_on_the_host_give_the_same_gradients(layers, kinds, shared, policy):
    extras = dataclasses.replace(SHARED, shared_kv_layers=shared, layer_widths=(), sliding_head_dim=0)
    model = tiny_decoder(config_of(extras, kinds), layers=layers)
    ids = jnp.asarray(random_ids(16))
    graph, trained, frozen = split(model)

    def gradients(policy):
        def loss(trained):
            hidden = merge(graph, trained, frozen).hidden_states(ids, memory_policy=policy)
            return jnp.sum(hidden * jnp.cos(jnp.arange(hidden.shape[-1])))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(trained))

    expected = gradients("keep")
    for found, leaf in zip(gradients(policy), expected, strict=True):
        assert gradient_error(found, leaf) <= MODEL_GRADIENT


def test_the_cut_of_a_gate_leaves_the_share_of_a_normal_distribution_that_is_over_it():
    gate = np.random.default_rng(0).standard_normal((3, 100_000)).astype(np.float32) * 2 + 5
    kept = np.asarray(cut_off(jnp.asarray(gate), 0.95))
    np.testing.assert_allclose(np.mean(kept > 0, axis=-1), 0.05, atol=0.003)
    mean, deviation = np.mean(gate, axis=-1, keepdims=True), np.std(gate, axis=-1, keepdims=True)
    np.testing.assert_allclose(kept, np.maximum(gate - mean - 1.6448536 * deviation, 0), atol=1e-4)


def test_keys_and_values_that_a_file_holds_and_nothing_reads_are_left_out(tmp_path):
    save_model(tiny_decoder(config_of()), tmp_path / "model")
    arrays = {name: tensor.read() for name, tensor in open_weights(tmp_path / "model").items()}
    unread = {
        f"model.layers.5.self_attn.{p}.weight": np.zeros((16, 32), np.float32) for p in ("k_proj", "k_norm")
    }
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in (arrays | unread).items()}
    for path in (tmp_path / "model").glob("*.safetensors*"):
        path.unlink()
    write_weights(tmp_path / "model", specs, (arrays | unread).__getitem__)
    save_model(load_model(tmp_path / "model"), tmp_path / "again")
    again = open_weights(tmp_path / "again")
    assert set(again) == set(arrays)
    assert all(np.array_equal(again[name].read(), array) for name, array in arrays.items())


def test_what_cannot_be_done_with_such_layers_is_refused():
    model = Decoder.abstract(config_of())
    with pytest.raises(InputError, match="new_tokens: every layer of gemma4"):
        with_tokens(model, 131, 1)
    with pytest.raises(InputError, match="sensitivity: layers of gemma4"):
        Sensitivity(model, random_ids(4))


@pytest.mark.parametrize(
    ("extras", "changes", "said"),
    [
        ({"shared_kv_layers": 5}, {}, "no layer before has"),
        ({"layer_widths": (40, 56)}, {}, "layer_widths has 2 entries"),
        ({"gate_sparsity": (1.5,)}, {}, "share outside"),
        ({"sliding_kv_heads": 3}, {}, "no multiple of 3"),
        ({"sliding_head_dim": 4}, {"layer_ropes": (), "local_rope": None}, "rope of their own"),
        ({}, {"block": "pre"}, "between norms"),
    ],
)
def test_impossible_configurations_are_refused(extras, changes, said):
    with pytest.raises(ValueError, match=said):
        config_of(ExtrasConfig(**extras), **changes)
