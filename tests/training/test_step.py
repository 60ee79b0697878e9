import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pronghorn.lora import split
from pronghorn.models import assign, flat_arrays
from pronghorn.training import TrainConfig
from pronghorn.training.guards import leaf_names
from pronghorn.training.step import compile_step
from tests.tolerances import assert_close
from tests.training.small import VOCAB, make_step, random_batch, same_leaves, small_model


@pytest.fixture(scope="module")
def adapted():
    return split(small_model())


@pytest.fixture(scope="module")
def adam(adapted):
    graph, trainable, frozen = adapted
    return *make_step(graph, trainable), frozen


@pytest.fixture(scope="module")
def plain_descent(adapted):
    """SGD with learning rate 1 and without clipping: the parameters move by the gradient."""
    graph, trainable, frozen = adapted
    config = TrainConfig(max_grad_norm=None)
    return *make_step(graph, trainable, config, optimizer=optax.sgd(1.0)), frozen


def movement(after, before):
    return [
        np.asarray(a - b)
        for a, b in zip(*map(jax.tree.leaves, (after.trainable, before.trainable)), strict=True)
    ]


def test_four_micro_batches_of_two_equal_one_of_eight(plain_descent):
    """Unequal token counts, a micro-batch without one trained token, and a last window that is partly empty."""
    step, state, frozen = plain_descent
    many = random_batch(4, 2, 9, seed=5)
    many["labels"][1] = -100
    for name, empty in (("labels", -100), ("segment_ids", 0), ("positions", 0), ("input_ids", 0)):
        many[name][3, 1] = empty
    counts = np.sum(many["labels"] != -100, axis=(1, 2))
    assert len(set(counts.tolist())) == 4
    large = {name: values.reshape(1, 8, 9) for name, values in many.items()}
    (one, one_metrics), (four, four_metrics) = step(state, frozen, large), step(state, frozen, many)
    assert int(one_metrics["token_count"]) == int(four_metrics["token_count"]) > 0
    for name in ("loss", "grad_norm", "leaf_grad_norms"):
        assert_close(four_metrics[name], one_metrics[name])
    for a, b in zip(movement(four, state), movement(one, state), strict=True):
        assert_close(a, b, tolerance=1e-4)  # of a difference of parameters, which rounds at their size


def test_a_loss_that_is_not_finite_changes_nothing(adam):
    step, state, frozen = adam
    state, _ = step(state, frozen, random_batch(1, 2, 9))
    poisoned = random_batch(1, 2, 9, seed=1)
    poisoned["input_ids"][0, 0, 2] = VOCAB  # outside of the vocabulary: NaN
    after, metrics = step(state, frozen, poisoned)
    assert not np.isfinite(metrics["loss"])
    assert same_leaves((after.trainable, after.opt_state), (state.trainable, state.opt_state))
    assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (2, 1, 1)
    going_on, metrics = step(after, frozen, random_batch(1, 2, 9, seed=2))
    assert bool(metrics["applied"]) and not same_leaves(going_on.trainable, after.trainable)
    assert int(going_on.skipped) == 1


def test_a_batch_without_a_trained_token_changes_nothing(adam):
    step, state, frozen = adam
    after, metrics = step(state, frozen, random_batch(1, 2, 9, trained=0.0))
    assert same_leaves(after.trainable, state.trainable)
    assert int(metrics["skipped"]) == 1 and float(metrics["loss"]) == 0.0


def test_gradients_are_clipped_by_their_global_norm_and_the_norm_is_of_before(adapted, plain_descent):
    graph, trainable, _ = adapted
    free, state, frozen = plain_descent
    batch = random_batch(1, 2, 9)
    _, metrics = free(state, frozen, batch)
    limit = float(metrics["grad_norm"]) / 3
    clipped, _ = make_step(graph, trainable, TrainConfig(max_grad_norm=limit), optimizer=optax.sgd(1.0))
    after, clipped_metrics = clipped(state, frozen, batch)
    assert_close(clipped_metrics["grad_norm"], metrics["grad_norm"])
    norm = np.sqrt(sum(np.sum(np.square(move)) for move in movement(after, state)))
    assert_close(norm, np.float32(limit), tolerance=1e-4)


def test_masters_take_updates_that_sixteen_bits_would_round_away():
    graph, trainable, frozen = split(small_model(rank=None, dtype=jnp.bfloat16))
    batch = random_batch(1, 2, 9)

    def norm_after(master_weights):
        config = TrainConfig(master_weights=master_weights, max_grad_norm=None, learning_rate=1e-4)
        step, state = make_step(graph, trainable, config, total_steps=100)
        for _ in range(3):
            state, metrics = step(state, frozen, batch)
        assert bool(metrics["applied"])
        return np.asarray(jax.tree.leaves(state.trainable["norm"])[0], np.float32)

    assert np.all(norm_after(False) == 1.0)  # 1 + 1e-4 is 1 in bfloat16
    assert np.all(np.abs(norm_after(True) - 1.0) > 1e-4)


def test_moments_are_fp32_for_sixteen_bit_parameters():
    graph, trainable, _ = split(small_model(rank=None, dtype=jnp.bfloat16))
    _, state = make_step(graph, trainable, TrainConfig(master_weights=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {jnp.dtype(jnp.float32)}


def test_scanned_and_unrolled_layers_give_the_same_curve():
    unrolled = small_model(num_layers=2)
    scanned = small_model(num_layers=2, layers="scanned")
    assign(scanned, flat_arrays(unrolled))
    curves = []
    for model in (unrolled, scanned):
        graph, trainable, frozen = split(model)
        step, state = make_step(graph, trainable, TrainConfig(learning_rate=5e-3))
        curve = []
        for number in range(5):
            state, metrics = step(state, frozen, random_batch(2, 2, 9, seed=number))
            norms = dict(
                zip(leaf_names(trainable, model), np.asarray(metrics["leaf_grad_norms"]), strict=True)
            )
            curve.append([float(metrics["loss"]), *(norms[name] for name in sorted(norms))])
        curves.append(np.array(curve))
    assert_close(curves[1], curves[0], tolerance=1e-4)


def test_the_norm_of_each_leaf_is_reported_under_its_name(plain_descent):
    step, state, frozen = plain_descent
    after, metrics = step(state, frozen, random_batch(1, 2, 9))
    norms = np.array([np.linalg.norm(move) for move in movement(after, state)], np.float32)
    assert_close(metrics["leaf_grad_norms"], norms, tolerance=1e-4)
    assert len(leaf_names(state.trainable)) == len(norms)


def test_dropout_is_a_function_of_seed_and_step():
    graph, trainable, frozen = split(small_model(dropout=0.5))
    step, state = make_step(
        graph, jax.tree.map(lambda x: x + 0.05, trainable)
    )  # with B = 0 no loss would change

    def loss(number):
        return float(
            step(dataclasses.replace(state, step=jnp.int32(number)), frozen, random_batch(1, 2, 9))[1]["loss"]
        )

    assert loss(0) == loss(0) != loss(1)


def test_the_compiled_step_takes_flat_lists_and_agrees(adam):
    step, state, frozen = adam
    batch = random_batch(1, 2, 9)
    expected, metrics = step(state, frozen, batch)
    compiled = compile_step(step.__wrapped__, state, frozen, batch)
    leaves = [leaf.copy() for leaf in jax.tree.leaves(state)]
    new_leaves, compiled_metrics = compiled(leaves, jax.tree.leaves(frozen), batch)
    assert_close(compiled_metrics["loss"], metrics["loss"])
    assert jax.tree.structure(compiled.state(new_leaves)) == jax.tree.structure(expected)
    assert all(leaf.is_deleted() for leaf in leaves[1:3])  # donated
