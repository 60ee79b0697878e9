import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pronghorn.lora import split
from pronghorn.models import Decoder
from pronghorn.pallas_kernels.blockwise_8bit import Blockwise
from pronghorn.training import TrainConfig, make_optimizer, plan_memory
from pronghorn.training.optimizers import init_optimizer
from pronghorn.training.optimizers_8bit import (
    SelfGating,
    scale_by_adam_8bit,
    scale_by_lion_8bit,
    to_host_memory,
)
from pronghorn.training.step import TrainState, compile_step, make_train_step
from tests.tolerances import assert_close
from tests.training.small import make_step, random_batch, same_leaves, small_config, small_model

# Embedding and MLP are large enough for 8 bits, norms and attention are not.
SIZES = {"vocab_size": 300, "hidden_size": 24, "intermediate_size": 200, "rank": None}


@pytest.fixture(scope="module")
def full():
    return split(small_model(**SIZES))


def batches(count):
    """The same few rows again and again, so that there is something to learn."""
    return [random_batch(1, 2, 9, seed=number % 2) for number in range(count)]


def trained(full, config, steps=12):
    """(losses, state) after some steps of full fine-tuning."""
    graph, trainable, frozen = full
    step, state = make_step(graph, trainable, config, total_steps=steps)
    losses = []
    for batch in batches(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


def quantized_leaves(state):
    is_moment = lambda node: isinstance(node, Blockwise)  # noqa: E731
    return [leaf for leaf in jax.tree.leaves(state, is_leaf=is_moment) if is_moment(leaf)]


@pytest.mark.parametrize(("name", "bound"), [("adamw", 0.02), ("lion", 0.05)])
def test_eight_bits_track_thirty_two(full, name, bound):
    config = TrainConfig(
        optimizer=name, learning_rate=3e-3 if name == "adamw" else 1e-3, schedule="constant", beta2=0.99
    )
    exact, _ = trained(full, config)
    coarse, state = trained(full, dataclasses.replace(config, optimizer=f"{name}_8bit"))
    assert exact[-1] < 0.95 * exact[0]
    assert coarse[0] == pytest.approx(exact[0], rel=1e-6)
    assert np.max(np.abs(np.array(coarse) - exact)) < bound * exact[0]
    assert quantized_leaves(state.opt_state)


def test_only_leaves_of_a_size_are_quantised_and_they_take_two_bytes(full):
    _, trainable, _ = full
    state = init_optimizer(make_optimizer(TrainConfig(optimizer="adamw_8bit"), 9), trainable)
    found = quantized_leaves(state)
    large = [leaf.size for leaf in jax.tree.leaves(trainable) if leaf.size >= 4096]
    assert len(found) == 2 * len(large) > 0
    assert sum(leaf.nbytes for moment in found for leaf in moment) / sum(large) <= 2.1
    small = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.dtype == jnp.float32]
    assert {leaf.size for leaf in small} >= {24}


def test_stacked_layers_count_as_single_ones():
    sizes = {name: value for name, value in SIZES.items() if name != "rank"}
    _, trainable, _ = split(Decoder.abstract(small_config(**sizes, num_layers=200), layers="scanned"))
    optimizer = make_optimizer(TrainConfig(optimizer="lion_8bit"), 9)
    state = jax.eval_shape(lambda t: init_optimizer(optimizer, t), trainable)
    shapes = {leaf.codes.shape for leaf in quantized_leaves(state)}
    assert (200, 200, 24) in shapes and (200, 24) not in shapes


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_a_skipped_step_changes_no_bit(full, name):
    graph, trainable, frozen = full
    config = TrainConfig(optimizer=name, weight_decay=0.1, warmup_steps=1)
    step, state = make_step(graph, trainable, config)
    state, _ = step(state, frozen, batches(1)[0])
    poisoned = random_batch(1, 2, 9)
    poisoned["input_ids"][0, 0, 2] = 300
    after, metrics = step(state, frozen, poisoned)
    assert not bool(metrics["applied"])
    assert same_leaves((after.trainable, after.opt_state), (state.trainable, state.opt_state))
    going_on, _ = step(after, frozen, batches(1)[0])
    straight_on, _ = step(state, frozen, batches(1)[0])
    assert same_leaves(going_on.opt_state, straight_on.opt_state)


def test_they_are_optax_transformations_that_chain():
    optimizer = optax.chain(scale_by_adam_8bit(), optax.scale_by_learning_rate(1e-2))
    weights = {"w": jnp.ones((64, 64)), "b": jnp.ones(3)}
    state = optimizer.init(weights)

    @jax.jit
    def update(weights, state):
        updates, state = optimizer.update(weights, state, weights)  # the gradient of |w|^2 / 2
        return optax.apply_updates(weights, updates), state

    for _ in range(3):
        weights, state = update(weights, state)
    for leaf in weights.values():
        assert_close(leaf, jnp.full(leaf.shape, 0.97), tolerance=1e-3)


@pytest.mark.parametrize(("scale", "bits"), [(scale_by_adam_8bit, 8), (scale_by_lion_8bit, 32)])
def test_paged_moments_stay_in_host_memory_and_are_the_same(full, scale, bits):
    _, trainable, _ = full
    gradients = [jax.tree.map(lambda x, seed=seed: jnp.sin(100 * x + seed), trainable) for seed in range(3)]
    outcomes = []
    for paged in (False, True):
        optimizer = scale(bits=bits, paged=paged)
        state = init_optimizer(optimizer, trainable)
        state = to_host_memory(state) if paged else state
        update = jax.jit(optimizer.update)
        for gradient in gradients:
            direction, state = update(gradient, state)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)}
        assert ("pinned_host" in kinds) == paged
        outcomes.append((direction, state))
    assert same_leaves(*outcomes)


def test_paging_is_asked_of_shapes_too(full):
    _, trainable, _ = full
    state = jax.eval_shape(lambda t: init_optimizer(scale_by_adam_8bit(paged=True), t), trainable)
    kinds = {getattr(leaf.sharding, "memory_kind", None) for leaf in jax.tree.leaves(to_host_memory(state))}
    assert kinds == {"pinned_host", None}


def test_the_plan_counts_two_bytes_a_parameter():
    sizes = {name: value for name, value in SIZES.items() if name != "rank"}
    plans = [
        plan_memory(
            small_config(**sizes),
            None,
            TrainConfig(max_steps=3, save_every=None, optimizer=name),
            np.float32,
            max_length=16,
        )
        for name in ("adamw", "adamw_8bit")
    ]
    saved = plans[0].checkpoint - plans[1].checkpoint
    quantised = 300 * 24 + 3 * 200 * 24
    assert saved >= (8 - 2.1) * quantised


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_paged_moments_are_host_memory_of_the_compiled_step_on_a_gpu(name):
    graph, trainable, frozen = split(small_model(**SIZES | {"intermediate_size": 4096}))
    batch = batches(1)[0]
    compiled, states = {}, {}
    for paged in (False, True):
        config = TrainConfig(optimizer=name, paged_optimizer=paged)
        # The step takes its state over, and the weights with it.
        step, state = make_step(graph, jax.tree.map(jnp.copy, trainable), config)
        step = make_train_step(graph, make_optimizer(config, 20), config)
        if paged:
            assert isinstance(make_optimizer(config, 20), SelfGating)
            state = dataclasses.replace(state, opt_state=to_host_memory(state.opt_state))
        compiled[paged] = compile_step(step, state, frozen, batch)
        leaves = jax.tree.leaves(state)
        for _ in range(3):
            leaves, _ = compiled[paged](leaves, jax.tree.leaves(frozen), batch)
        states[paged] = compiled[paged].state(leaves)
        assert isinstance(states[paged], TrainState)
    moved = 3 * 4096 * 24 * (2 if name == "adamw_8bit" else 8)
    memory = {paged: compiled[paged].executable.memory_analysis() for paged in compiled}
    assert memory[True].host_argument_size_in_bytes >= moved
    assert memory[False].argument_size_in_bytes - memory[True].argument_size_in_bytes >= moved
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(states[True].opt_state)}
    assert "pinned_host" in kinds
    for one, other in zip(
        *map(jax.tree.leaves, (states[True].trainable, states[False].trainable)), strict=True
    ):
        assert_close(one, other, tolerance=1e-4)
