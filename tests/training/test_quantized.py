"""QLoRA: adapters on a quantised base, through the ops and the trainer that 16-bit models use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.converters.huggingface import load_model, save_model
from pronghorn.converters.merged import save_merged
from pronghorn.converters.peft import load_adapter, save_adapter
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig, add_lora, remove_lora, split
from pronghorn.models.parameters import assign, named_parameters
from pronghorn.quantization import QuantizationConfig
from pronghorn.training import TrainConfig, Trainer, losses, plan_memory
from tests.training import small

SIZES = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "num_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("base") / "model"
    save_model(small.small_model(rank=None, **SIZES), out)
    return out


def adapted(folder, *, kind="nf4", layers="unrolled"):
    """A quantised model with adapters whose B is not zero."""
    model = add_lora(load_model(folder, quantization=kind, layers=layers), LoRAConfig(rank=2))
    random = np.random.default_rng(0)
    named = {n: p for n, p in named_parameters(model).items() if n.endswith("lora_B")}
    assign(
        model,
        {n: 0.1 * random.standard_normal(p.shape).astype(np.float32) for n, p in named.items()},
        strict=False,
    )
    return model


def dequantized(tree):
    is_weight = lambda leaf: hasattr(leaf, "dequantize")  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_weight(leaf) else leaf, tree, is_leaf=is_weight)


@pytest.mark.parametrize("kind,layers", [("nf4", "unrolled"), ("nf4", "scanned"), ("int8", "unrolled")])
def test_gradients_equal_those_of_the_dequantised_model(folder, kind, layers):
    graph, trainable, frozen = split(adapted(folder, kind=kind, layers=layers))
    batch = jax.tree.map(lambda x: x[0], small.random_batch(1, 2, 12))
    loss_fn = losses.next_token(graph)
    run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, _), gradients = run(trainable, frozen, batch)
    (expected_loss, _), expected = run(trainable, dequantized(frozen), batch)
    assert jnp.allclose(loss, expected_loss, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert jnp.any(one != 0)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


def test_memory_policies_train_the_same(folder):
    graph, trainable, frozen = split(adapted(folder, layers="scanned"))
    batch = jax.tree.map(lambda x: x[0], small.random_batch(1, 2, 12))
    results = [
        jax.jit(jax.grad(lambda t, f, b, p=policy: losses.next_token(graph, memory_policy=p)(t, f, b)[0]))(
            trainable, frozen, batch
        )
        for policy in ("keep", "attention", "layer_inputs")
    ]
    for one, *others in zip(*map(jax.tree.leaves, results), strict=True):
        for other in others:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
def test_offloaded_layer_inputs_train_the_same(folder):
    graph, trainable, frozen = split(adapted(folder))
    batch = jax.tree.map(lambda x: x[0], small.random_batch(1, 2, 12))
    one, other = (
        jax.jit(jax.grad(lambda t, f, b, p=policy: losses.next_token(graph, memory_policy=p)(t, f, b)[0]))(
            trainable, frozen, batch
        )
        for policy in ("layer_inputs", "offload")
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_codes_are_never_trainable(folder):
    _, trainable, frozen = split(load_model(folder, quantization="nf4"))
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(trainable))
    assert any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(frozen))


def test_full_fine_tuning_of_a_quantised_model_is_refused(folder):
    model = load_model(folder, quantization="nf4")
    with pytest.raises(InputError, match="quantised weights cannot be trained"):
        Trainer(model, None, small.tokenized(small.random_documents(4)), TrainConfig(max_steps=1))


def trainer(folder, out, **changes):
    config = TrainConfig(
        max_steps=4, batch_size=2, learning_rate=1e-2, output_dir=str(out), save_every=2, **changes
    )
    data = small.tokenized(small.random_documents(12))
    from pronghorn.data import DataConfig

    return Trainer(adapted(folder), None, data, config, data=DataConfig(max_length=16))


def test_a_resumed_run_equals_one_that_was_never_stopped(folder, tmp_path):
    whole = trainer(folder, tmp_path / "whole")
    whole.train()
    trainer(folder, tmp_path / "cut").train(stop_after=2)
    resumed = trainer(folder, tmp_path / "cut")
    resumed.train(resume=True)
    assert small.same_leaves(split(whole.model)[1], split(resumed.model)[1])
    start = split(adapted(folder))[1]
    assert not small.same_leaves(start, split(whole.model)[1])


def test_an_adapter_comes_back_from_peft_onto_the_quantised_base(folder, tmp_path):
    model = adapted(folder)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(remove_lora(model), tmp_path / "adapter")
    ids = np.arange(10, dtype=np.int32)[None]
    assert np.array_equal(model(ids), again(ids))


def test_merging_says_which_base_it_took(folder, tmp_path):
    model = adapted(folder)
    own = save_merged(model, None, tmp_path / "own")
    assert own["base"] == "dequantised" and own["kl_mean"] <= own["kl_mean_limit"]
    onto = save_merged(model, None, tmp_path / "onto", base=folder)
    assert onto["base"] == str(folder) and onto["kl_mean"] <= onto["kl_mean_limit"]
    assert onto["live_kl_mean"] > own["kl_mean"]
    merged = named_parameters(load_model(tmp_path / "onto"))
    assert not any(hasattr(p.get(), "dequantize") for p in merged.values())
    other = dataclasses.replace(small.small_config(**SIZES), vocab_size=small.VOCAB + 1)
    save_model(small.small_model(rank=None, **SIZES | {"vocab_size": other.vocab_size}), tmp_path / "other")
    with pytest.raises(InputError, match="not the model"):
        save_merged(model, None, tmp_path / "third", base=tmp_path / "other")


def test_adapters_train_on_an_fp8_base(folder, tmp_path):
    graph, trainable, frozen = split(adapted(folder, kind="fp8"))
    batch = jax.tree.map(lambda x: x[0], small.random_batch(1, 2, 12))
    run = jax.jit(jax.grad(losses.next_token(graph), has_aux=True))
    (rounded, _), (exact, _) = run(trainable, frozen, batch), run(trainable, dequantized(frozen), batch)
    for one, other in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        cosine = jnp.vdot(one, other) / (jnp.linalg.norm(one) * jnp.linalg.norm(other))
        assert 0.98 < cosine < 1 - 1e-6
    merged = save_merged(adapted(folder, kind="fp8"), None, tmp_path / "merged")
    assert merged["base"] == "dequantised" and merged["kl_mean"] <= merged["kl_mean_limit"]
    assert merged["live_kl_mean"] > merged["kl_mean"]


def test_the_plan_of_a_quantised_model_counts_its_codes():
    config, train = small.small_config(**SIZES), TrainConfig(max_steps=2, batch_size=1)
    plans = [
        plan_memory(config, LoRAConfig(rank=2), train, jnp.float32, max_length=16, quantization=q)
        for q in (None, QuantizationConfig("nf4"))
    ]
    assert plans[0].frozen_parameters == plans[1].frozen_parameters
    linears = 2 * 4 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64)  # bytes in fp32
    saved = plans[0].arguments - plans[1].arguments
    assert linears * 0.6 < saved < linears * (1 - 4.127 / 32)
    with pytest.raises(InputError, match="cannot be trained"):
        plan_memory(config, None, train, max_length=16, quantization=QuantizationConfig("nf4"))
