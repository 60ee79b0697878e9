"""float16 with a scaled loss, the average of the weights, and clipping by value: what a step does beside its update."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pronghorn.data import DataConfig
from pronghorn.lora import split
from pronghorn.models import flat_arrays
from pronghorn.training import TrainConfig, Trainer
from pronghorn.training.loss_scale import GROWTH_STEPS, LEAST, LossScale
from pronghorn.training.step import init_state
from tests.tolerances import assert_close
from tests.training.small import (
    make_step,
    random_batch,
    random_documents,
    same_leaves,
    small_model,
    tokenized,
)


@pytest.fixture(scope="module")
def scaled():
    """(step, state, frozen) of an fp32 model whose loss is scaled: what scaling does, without rounding."""
    graph, trainable, frozen = split(small_model())
    step, state = make_step(graph, trainable, TrainConfig(max_grad_norm=None), optimizer=optax.sgd(1.0))
    return step, dataclasses.replace(state, loss_scale=LossScale.start(1024.0)), frozen


def test_a_scaled_loss_gives_the_same_update(scaled):
    step, state, frozen = scaled
    batch = random_batch(2, 2, 9)
    plain, expected = step(dataclasses.replace(state, loss_scale=None), frozen, batch)
    after, metrics = step(state, frozen, batch)
    for name in ("loss", "grad_norm", "leaf_grad_norms"):
        assert_close(metrics[name], expected[name])
    for one, other in zip(*map(jax.tree.leaves, (after.trainable, plain.trainable)), strict=True):
        assert_close(one, other)
    assert float(metrics["loss_scale"]) == 1024 and not bool(metrics["overflow"])
    assert int(after.loss_scale.good_steps) == 1


def test_a_gradient_that_overflows_halves_the_scale_and_is_counted_apart(scaled):
    step, state, frozen = scaled
    state = dataclasses.replace(
        state, loss_scale=dataclasses.replace(state.loss_scale, scale=jnp.float32(2.0**127))
    )
    after, metrics = step(state, frozen, random_batch(1, 2, 9))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert bool(metrics["overflow"]) and not bool(metrics["applied"])
    assert (int(metrics["overflowed"]), int(metrics["skipped"])) == (1, 0)
    assert same_leaves(after.trainable, state.trainable)
    assert float(after.loss_scale.scale) < float(state.loss_scale.scale) / 2 + 1
    poisoned = random_batch(1, 2, 9)
    poisoned["input_ids"][0, 0, 2] = 10_000
    after, metrics = step(after, frozen, poisoned)
    assert (int(metrics["overflowed"]), int(metrics["skipped"])) == (1, 1)
    assert float(after.loss_scale.scale) == float(metrics["loss_scale"])


def test_the_scale_grows_after_many_good_steps_and_stops_at_its_least():
    yes, no = jnp.bool_(True), jnp.bool_(False)
    scale = LossScale(jnp.float32(8.0), jnp.int32(GROWTH_STEPS - 1), jnp.int32(3)).after(no, yes)
    assert (float(scale.scale), int(scale.good_steps), int(scale.overflowed)) == (16.0, 0, 3)
    assert int(scale.after(no, no).good_steps) == 0
    least = LossScale.start(LEAST)
    assert not bool(least.overflows(jnp.float32(1.0), jnp.float32(jnp.inf)))
    assert float(least.after(yes, no).scale) == LEAST


def test_a_float16_model_trains_with_a_scale_in_its_state_and_resumes_bit_exactly(tmp_path):
    def trainer(folder):
        config = TrainConfig(
            max_steps=4,
            batch_size=2,
            learning_rate=1e-2,
            initial_loss_scale=2.0**24,  # overflows at first
            save_every=2,
            output_dir=str(folder),
            optimizer="adamw_8bit",
            ema_decay=0.5,
        )
        data = DataConfig(max_length=16)
        return Trainer(
            small_model(dtype=jnp.float16), None, tokenized(random_documents(9)), config, data=data
        )

    whole = trainer(tmp_path / "whole")
    result = whole.train()
    assert result.skipped == 0 and np.isfinite(result.losses).all()
    trainer(tmp_path / "parts").train(stop_after=2)
    rest = trainer(tmp_path / "parts")
    assert rest.train(resume=True).losses == result.losses[2:]
    for name, value in flat_arrays(whole.model).items():
        assert np.array_equal(value, flat_arrays(rest.model)[name]), name


def test_gradients_are_clipped_by_value_before_their_norm():
    graph, trainable, frozen = split(small_model())
    batch = random_batch(1, 2, 9)
    free, state = make_step(graph, trainable, TrainConfig(max_grad_norm=None), optimizer=optax.sgd(1.0))
    gradient = jax.tree.map(
        lambda old, new: old - new, state.trainable, free(state, frozen, batch)[0].trainable
    )
    limit = 0.3 * max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    config = TrainConfig(max_grad_norm=None, max_grad_value=limit)
    clipping, state = make_step(graph, trainable, config, optimizer=optax.sgd(1.0))
    after, _ = clipping(state, frozen, batch)
    for old, new, g in zip(*map(jax.tree.leaves, (state.trainable, after.trainable, gradient)), strict=True):
        assert_close(old - new, np.clip(g, -limit, limit), tolerance=1e-4)


def test_the_average_follows_the_weights_and_a_skipped_step_leaves_it():
    graph, trainable, frozen = split(small_model())
    config = TrainConfig(ema_decay=0.75, learning_rate=1e-2)
    step, state = make_step(graph, trainable, config)
    state = dataclasses.replace(state, ema=jax.tree.map(jnp.copy, state.trainable))
    average = jax.tree.map(np.asarray, state.ema)
    for number in range(3):
        state, _ = step(state, frozen, random_batch(1, 2, 9, seed=number))
        average = jax.tree.map(lambda a, w: 0.75 * a + 0.25 * np.asarray(w), average, state.trainable)
    for ours, expected in zip(*map(jax.tree.leaves, (state.ema, average)), strict=True):
        assert_close(ours, expected)
    after, _ = step(state, frozen, random_batch(1, 2, 9, trained=0.0))
    assert same_leaves(after.ema, state.ema)


def test_the_model_that_is_left_holds_the_average_when_asked(tmp_path):
    config = TrainConfig(
        max_steps=3, batch_size=2, learning_rate=1e-2, ema_decay=0.5, save_ema=True, save_every=None
    )
    config = dataclasses.replace(config, output_dir=str(tmp_path))
    documents = tokenized(random_documents(6)), tokenized(random_documents(3, seed=1))
    data = DataConfig(max_length=16)
    trainer = Trainer(small_model(), None, documents[0], config, data=data, eval_dataset=documents[1])
    trainer.train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = next(json.loads(line) for line in lines if "eval_loss" in line)
    assert record["eval_loss"] != record["eval_loss_ema"]
    left = trainer.evaluate().loss
    assert left == pytest.approx(record["eval_loss_ema"], rel=1e-6)


def test_a_state_has_neither_unless_asked():
    _, trainable, _ = split(small_model())
    state = init_state(trainable, optax.sgd(1.0))
    assert state.loss_scale is None and state.ema is None
    state = init_state(trainable, optax.sgd(1.0), loss_scale=8.0, ema=True)
    assert float(state.loss_scale.scale) == 8 and same_leaves(state.ema, state.trainable)
