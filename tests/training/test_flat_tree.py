"""Parameters as one vector: a step on it is the step on the tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.lora import split
from pronghorn.training.config import TrainConfig
from pronghorn.training.flat_tree import ALIGNMENT, FlatLayout, as_tree
from pronghorn.training.memory_plan import start_state
from pronghorn.training.optimizers import make_optimizer, treats_all_alike
from pronghorn.training.schedules import make_schedule
from pronghorn.training.step import can_be_flat, compute_dtypes, init_state, leaf_square_sums, make_train_step
from tests.tolerances import assert_close
from tests.training import small


def tree():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (700,), "c": (3, 5), "d": (), "e": (2, 256)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def test_flattening_and_back_changes_nothing():
    flat = FlatLayout.of(tree()).flatten(tree())
    assert small.same_leaves(flat.tree(), tree())
    assert flat.vector.size % ALIGNMENT == 0


def test_square_sums_are_those_of_the_tree_in_its_order():
    sums = leaf_square_sums(FlatLayout.of(tree()).flatten(tree()))
    np.testing.assert_allclose(sums, leaf_square_sums(tree()), rtol=1e-6)


def test_no_two_leaves_share_a_block():
    layout = FlatLayout.of(tree())
    assert all(start % ALIGNMENT == 0 for start in layout.starts.values())


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "max_grad_norm": 0.05}], ids=["plain", "decay"]
)
def test_steps_on_the_vector_are_steps_on_the_tree(options):
    model = small.small_model()
    graph, trainable, frozen = split(model)
    config = TrainConfig(max_steps=20, learning_rate=1e-2, **options)
    optimizer = make_optimizer(config, 20)
    step = jax.jit(
        make_train_step(
            graph, optimizer, config, schedule=make_schedule(config, 20), dtypes=compute_dtypes(trainable)
        ),
        compiler_options=small.QUICK_COMPILE,
    )
    assert can_be_flat(trainable) and treats_all_alike(config, trainable)
    states = [init_state(trainable, optimizer), start_state(trainable, optimizer, config)]
    assert len(jax.tree.leaves(states[1].trainable)) == 1
    for index in range(3):
        batch = small.random_batch(1, 2, 12, seed=index)
        pairs = [step(state, frozen, batch) for state in states]
        states = [state for state, _ in pairs]
        one, other = (metrics for _, metrics in pairs)
        for name in ("loss", "grad_norm", "leaf_grad_norms"):
            np.testing.assert_allclose(one[name], other[name], rtol=2e-6, atol=1e-9)
    for a, b in zip(
        jax.tree.leaves(states[0].trainable), jax.tree.leaves(as_tree(states[1].trainable)), strict=True
    ):
        assert_close(a, b, what="parameter")


def test_trees_that_are_not_treated_alike_stay_trees():
    _, trainable, _ = split(small.small_model(rank=None))
    config = TrainConfig(max_steps=1, weight_decay=0.1)
    assert not treats_all_alike(config, trainable)  # norms are not decayed
    assert not can_be_flat(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trainable))
