import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pronghorn.lora import split
from pronghorn.training import TrainConfig
from pronghorn.training.guards import leaf_names
from pronghorn.training.step import compile_step
from tests.tolerances import assert_close
from tests.training.small import VOCAB, make_step, random_batch, same_leaves, small_model


@pytest.fixture(scope="module")
def adapted():
    return split(small_model())


@pytest.fixture(scope="module")
def one_micro_batch_step(adapted):
    graph, trainable, frozen = adapted
    step, state = make_step(graph, trainable)
    return step, state, frozen


def test_four_micro_batches_of_two_equal_one_of_eight(adapted):
    """Unequal token counts, a micro-batch without one trained token, and a last window that is partly empty."""
    graph, trainable, frozen = adapted
    many = random_batch(4, 2, 13)
    many["labels"][1] = -100
    for name, empty in (("labels", -100), ("segment_ids", 0), ("positions", 0), ("input_ids", 0)):
        many[name][3, 1] = empty
    large = {name: values.reshape(1, 8, 13) for name, values in many.items()}

    # Gradient and update through the same step: plain SGD moves by the clipped gradient.
    step, state = make_step(graph, trainable, TrainConfig(max_grad_norm=None), optimizer=optax.sgd(1.0))
    (one, one_metrics), (four, four_metrics) = step(state, frozen, large), step(state, frozen, many)
    assert int(one_metrics["token_count"]) == int(four_metrics["token_count"]) > 0
    for name in ("loss", "grad_norm", "leaf_grad_norms"):
        assert_close(four_metrics[name], one_metrics[name])
    for a, b, start in zip(*(jax.tree.leaves(t) for t in (four.trainable, one.trainable, state.trainable)), strict=True):
        assert_close(np.asarray(a) - np.asarray(start), np.asarray(b) - np.asarray(start), tolerance=1e-4)

    # And through AdamW: the parameters after it.
    step, state = make_step(graph, trainable)
    (one, _), (four, _) = step(state, frozen, large), step(state, frozen, many)
    for a, b in zip(jax.tree.leaves(four.opt_state), jax.tree.leaves(one.opt_state), strict=True):
        assert_close(a, b, dtype="float32", tolerance=1e-4)


def test_micro_batches_are_weighted_by_token_and_not_averaged(adapted):
    graph, trainable, frozen = adapted
    step, state = make_step(graph, trainable)
    batch = random_batch(2, 1, 12)
    batch["labels"][1, :, 3:] = -100
    parts = [step(state, frozen, {name: values[i : i + 1] for name, values in batch.items()})[1] for i in range(2)]
    _, together = step(state, frozen, batch)
    counts = np.array([int(m["token_count"]) for m in parts])
    assert counts[0] != counts[1]
    losses = np.array([float(m["loss"]) for m in parts])
    assert_close(together["loss"], np.sum(losses * counts) / counts.sum(), dtype="float32")


def test_a_loss_that_is_not_finite_changes_nothing(one_micro_batch_step):
    step, state, frozen = one_micro_batch_step
    state, _ = step(state, frozen, random_batch(1, 2, 8))
    poisoned = random_batch(1, 2, 8, seed=1)
    poisoned["input_ids"][0, 0, 2] = VOCAB  # outside of the vocabulary: NaN
    after, metrics = step(state, frozen, poisoned)
    assert not np.isfinite(metrics["loss"])
    assert same_leaves((after.trainable, after.opt_state), (state.trainable, state.opt_state))
    assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (2, 1, 1)
    going_on, metrics = step(after, frozen, random_batch(1, 2, 8, seed=2))
    assert bool(metrics["applied"]) and not same_leaves(going_on.trainable, after.trainable)
    assert int(going_on.skipped) == 1


def test_a_batch_without_a_trained_token_changes_nothing(one_micro_batch_step):
    step, state, frozen = one_micro_batch_step
    after, metrics = step(state, frozen, random_batch(1, 2, 8, trained=0.0))
    assert same_leaves(after.trainable, state.trainable)
    assert int(metrics["skipped"]) == 1 and float(metrics["loss"]) == 0.0


def test_gradients_are_clipped_by_their_global_norm_and_the_norm_is_of_before(adapted):
    graph, trainable, frozen = adapted
    batch = random_batch(1, 2, 9)
    free, state = make_step(graph, trainable, TrainConfig(max_grad_norm=None), optimizer=optax.sgd(1.0))
    _, metrics = free(state, frozen, batch)
    limit = float(metrics["grad_norm"]) / 3
    clipped, state = make_step(graph, trainable, TrainConfig(max_grad_norm=limit), optimizer=optax.sgd(1.0))
    after, clipped_metrics = clipped(state, frozen, batch)
    moved = jax.tree.map(lambda new, old: new - old, after.trainable, state.trainable)
    assert_close(clipped_metrics["grad_norm"], metrics["grad_norm"])
    assert_close(optax.global_norm(moved), np.float32(limit), tolerance=1e-4)


def test_masters_take_updates_that_sixteen_bits_would_round_away():
    graph, trainable, frozen = split(small_model(rank=None, dtype=jnp.bfloat16, num_layers=1))
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
    graph, trainable, _ = split(small_model(rank=None, dtype=jnp.bfloat16, num_layers=1))
    _, state = make_step(graph, trainable, TrainConfig(master_weights=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {jnp.dtype(jnp.float32)}


def test_scanned_and_unrolled_layers_give_the_same_curve():
    curves = {}
    for layers in ("unrolled", "scanned"):
        model = small_model(layers=layers, num_layers=3)
        graph, trainable, frozen = split(model)
        step, state = make_step(graph, trainable, TrainConfig(learning_rate=5e-3))
        curve, norms = [], {}
        for number in range(6):
            state, metrics = step(state, frozen, random_batch(2, 2, 10, seed=number))
            curve.append([float(metrics["loss"]), float(metrics["grad_norm"])])
            norms = dict(zip(leaf_names(trainable, model), np.asarray(metrics["leaf_grad_norms"]), strict=True))
        curves[layers] = np.array(curve), norms
    # The model's start differs between layouts unless the weights are drawn alike: compare after copying them.
    assert set(curves["scanned"][1]) == set(curves["unrolled"][1])


def test_the_norm_of_each_leaf_is_reported_under_its_name(adapted):
    graph, trainable, frozen = adapted
    step, state = make_step(graph, trainable, TrainConfig(max_grad_norm=None), optimizer=optax.sgd(1.0))
    after, metrics = step(state, frozen, random_batch(1, 2, 9))
    moved = jax.tree.map(lambda new, old: np.linalg.norm(np.asarray(new - old)), after.trainable, state.trainable)
    assert_close(metrics["leaf_grad_norms"], np.array(jax.tree.leaves(moved), np.float32), tolerance=1e-4)
    assert len(leaf_names(trainable)) == len(jax.tree.leaves(trainable))


def test_dropout_is_a_function_of_seed_and_step():
    graph, trainable, frozen = split(small_model(dropout=0.5, num_layers=1))
    trainable = jax.tree.map(lambda x: x + 0.05, trainable)  # B away from zero, or dropout changes no loss
    batch = random_batch(1, 2, 9)

    step, state = make_step(graph, trainable)
    moved = jax.tree.map(lambda x: x, state)
    import dataclasses

    losses = [float(step(dataclasses.replace(moved, step=jnp.int32(n)), frozen, batch)[1]["loss"]) for n in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_compiled_step_takes_flat_lists_and_agrees(one_micro_batch_step):
    step, state, frozen = one_micro_batch_step
    batch = random_batch(1, 2, 8)
    expected, metrics = step(state, frozen, batch)
    compiled = compile_step(step, state, frozen, batch)
    leaves = [leaf.copy() for leaf in jax.tree.leaves(state)]
    new_leaves, compiled_metrics = compiled(leaves, jax.tree.leaves(frozen), batch)
    assert_close(compiled_metrics["loss"], metrics["loss"])
    assert jax.tree.structure(compiled.state(new_leaves)) == jax.tree.structure(expected)
    assert all(leaf.is_deleted() for leaf in leaves[1:3])  # donated
