"""weighted_gated_activation: kernel against oracle, the gradient of the weights, what is saved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import shapes
from pronghorn.pallas_kernels.weighted_gated_activation import (
    weighted_gated_activation,
    weighted_gated_activation_reference,
)
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import (
    DTYPES,
    assert_matches_oracle,
    equations,
    gradient,
    kernel_outputs,
    normal,
    saved_shapes,
    value_and_gradients,
)

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
NAMES = ("h", "dgate", "dup", "dweights")
kernel = functools.partial(weighted_gated_activation, implementation="pallas")
plain = functools.partial(weighted_gated_activation, implementation="xla")


def assert_shape_matches(op, shape, activation, dtype):
    size = (shape.rows, shape.width)
    weights = jax.random.uniform(jax.random.key(3), (shape.rows, 1), jnp.float32)
    inputs = normal(0, size, dtype, scale=3.0), normal(1, size, dtype), weights
    ours, oracle = (
        functools.partial(f, activation=activation) for f in (op, weighted_gated_activation_reference)
    )
    assert_matches_oracle(ours, oracle, inputs, normal(2, size, dtype), dtype, NAMES)


@pytest.mark.parametrize("op", [kernel, plain], ids=["pallas", "xla"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", shapes.SMALL_GATED_ACTIVATION, ids=lambda s: s.name)
def test_matches_oracle(shape, activation, op):
    assert_shape_matches(op, shape, activation, "float32")


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_oracle_in_half_precision(activation, dtype):
    assert_shape_matches(kernel, shapes.SMALL_GATED_ACTIVATION[1], activation, dtype)


def test_the_weights_gradient_is_summed_over_blocks_of_columns():
    """Three blocks of 256 columns, as of an expert 768 wide, and rows that end inside of a block."""
    assert_shape_matches(kernel, shapes.RowShape("", 21, 768), "silu", "float32")


def test_all_gradients_come_from_one_launch():
    x, weights = jnp.ones((6, 8)), jnp.ones((6, 1))
    outputs = kernel_outputs(gradient(kernel), x, x, weights)["weighted_gated_activation_backward"]
    assert outputs == [(6, 8), (6, 8), (1, 6)]


def beside_each_other(op):
    """`op` of gate and up in one array."""
    return lambda gate, up, *rest: op(jnp.concatenate([gate, up], axis=-1), None, *rest)


@pytest.mark.parametrize("op", [kernel, plain], ids=["pallas", "xla"])
@pytest.mark.parametrize("width", [7, 768])
def test_halves_of_one_array_give_what_two_arrays_give(width, op):
    gate, up, dh = (normal(seed, (21, width), "bfloat16") for seed in range(3))
    arguments = gate, up, normal(3, (21, 1))
    found, expected = (value_and_gradients(f, arguments, dh) for f in (beside_each_other(op), op))
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))


def test_halves_of_one_array_are_neither_cut_nor_joined():
    both, weights = jnp.ones((6, 16)), jnp.ones((6, 1))
    pull = gradient(lambda both, weights: kernel(both, None, weights))
    assert kernel_outputs(pull, both, weights)["weighted_gated_activation_backward"] == [(6, 16), (1, 6)]
    cut = {e.outvars[0].aval.shape for e in equations(pull, both, weights) if e.primitive.name == "slice"}
    assert not {(6, 8), (6, 16)} & cut


def test_gradients_of_halves_of_one_array_take_its_memory():
    both, weights = jnp.ones((6, 16)), jnp.ones((6, 1))
    pull = gradient(lambda both, weights: kernel(both, None, weights))
    aliases = [
        tuple(e.params["input_output_aliases"])
        for e in equations(pull, both, weights)
        if e.primitive.name == "pallas_call"
    ]
    assert aliases == [(), ((1, 0),)]


def test_saves_gate_up_and_weights_only():
    gate, up, weights = normal(0, (5, 7)), normal(1, (5, 7)), jnp.ones((5, 1))
    assert sorted(saved_shapes(kernel, gate, up, weights)) == [(5, 1), (5, 7), (5, 7)]


def test_pulling_back_twice_gives_the_same_gradient():
    """The gradients may take the memory of what was saved; what was saved must not change for it."""
    gate, up, weights = normal(0, (5, 7)), normal(1, (5, 7)), normal(2, (5, 1))
    _, pullback = jax.vjp(kernel, gate, up, weights)
    for first, second in zip(pullback(gate), pullback(gate), strict=True):
        np.testing.assert_array_equal(first, second)


def test_empty_input_gives_empty_output():
    assert kernel(jnp.zeros((0, 4)), jnp.zeros((0, 4)), jnp.zeros((0, 1))).shape == (0, 4)


@pytest.mark.parametrize(
    ("up", "weights"),
    [(jnp.zeros((2, 3)), jnp.zeros((2, 1))), (jnp.zeros((2, 4)), jnp.zeros(2))],
    ids=["up", "weights"],
)
def test_arguments_that_do_not_fit_are_refused(up, weights):
    with pytest.raises(InputError, match="must be"):
        kernel(jnp.zeros((2, 4)), up, weights)


def test_unknown_activation_is_refused():
    with pytest.raises(InputError, match="use one of silu, gelu_tanh, gelu"):
        kernel(jnp.zeros((2, 4)), jnp.zeros((2, 4)), jnp.zeros((2, 1)), activation="relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lowers_for_an_h100(activation):
    x = jax.ShapeDtypeStruct((32768, 768), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((32768, 1), jnp.float32)
    text = lower_for_h100(gradient(functools.partial(kernel, activation=activation)), x, x, weights)
    assert "weighted_gated_activation_backward" in text


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(32768, 768, "bfloat16"), (1001, 1408, "bfloat16"), *((513, 2050, dtype) for dtype in DTYPES)],
)
def test_matches_oracle_on_a_gpu(rows, width, dtype, activation):
    assert_shape_matches(kernel, shapes.RowShape("", rows, width), activation, dtype)
