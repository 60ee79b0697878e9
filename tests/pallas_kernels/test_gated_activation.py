"""gated_activation: kernel against oracle, the normal distribution, what is saved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import shapes
from pronghorn.pallas_kernels.gated_activation import (
    gated_activation,
    gated_activation_reference,
    normal_cdf_and_pdf,
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
from tests.tolerances import KERNEL, relative_error

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
NAMES = ("h", "dgate", "dup")
kernel = functools.partial(gated_activation, implementation="pallas")
plain = functools.partial(gated_activation, implementation="xla")


def assert_shape_matches(shape, activation, dtype):
    size = (shape.rows, shape.width)
    inputs = normal(0, size, dtype, scale=3.0), normal(1, size, dtype)
    op, oracle = (functools.partial(f, activation=activation) for f in (kernel, gated_activation_reference))
    assert_matches_oracle(op, oracle, inputs, normal(2, size, dtype), dtype, NAMES)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", shapes.SMALL_GATED_ACTIVATION, ids=lambda s: s.name)
def test_matches_oracle(shape, activation):
    assert_shape_matches(shape, activation, "float32")


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_oracle_in_half_precision(activation, dtype):
    assert_shape_matches(shapes.SMALL_GATED_ACTIVATION[1], activation, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_gates_give_finite_gradients(activation):
    gate = jnp.array([[-6e4, -300.0, -14.0, 14.0, 300.0, 6e4]])
    op, oracle = (functools.partial(f, activation=activation) for f in (kernel, gated_activation_reference))
    assert_matches_oracle(op, oracle, (gate, jnp.ones_like(gate)), jnp.ones_like(gate), "float32", NAMES)


def test_normal_distribution_is_right_into_its_tails():
    x = np.linspace(-9.0, 9.0, 9001, dtype=np.float32)
    cdf, pdf = jax.jit(normal_cdf_and_pdf)(x)
    x64 = x.astype(np.float64)
    expected_pdf = np.exp(-0.5 * x64**2) / np.sqrt(2 * np.pi)
    for actual, expected in ((cdf, ndtr(x64)), (pdf, expected_pdf)):
        assert np.max(np.abs(np.asarray(actual, np.float64) / expected - 1.0)) < KERNEL["float32"]


def test_normal_distribution_is_as_exact_as_fp32():
    x = np.linspace(-9.0, 9.0, 9001, dtype=np.float32)
    error = np.abs(np.asarray(jax.jit(normal_cdf_and_pdf)(x)[0], np.float64) - ndtr(x.astype(np.float64)))
    assert np.max(error) <= 2 * np.finfo(np.float32).eps


def test_both_gradients_come_from_one_launch():
    x = jnp.ones((2, 3, 8))
    assert kernel_outputs(gradient(kernel), x, x)["gated_activation_backward"] == [(6, 8), (6, 8)]


def beside_each_other(op):
    """`op` of gate and up in one array."""
    return lambda gate, up, *rest: op(jnp.concatenate([gate, up], axis=-1), None, *rest)


@pytest.mark.parametrize("op", [kernel, plain], ids=["pallas", "xla"])
@pytest.mark.parametrize("shape", shapes.SMALL_GATED_ACTIVATION, ids=lambda s: s.name)
def test_halves_of_one_array_give_what_two_arrays_give(shape, op):
    gate, up, dh = (normal(seed, (shape.rows, shape.width), "bfloat16") for seed in range(3))
    found, expected = (value_and_gradients(f, (gate, up), dh) for f in (beside_each_other(op), op))
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))


def test_halves_of_one_array_are_neither_cut_nor_joined():
    both = jnp.ones((2, 3, 16))
    op = functools.partial(kernel, up=None)
    assert saved_shapes(op, both) == [(2, 3, 16)]
    assert kernel_outputs(gradient(op), both)["gated_activation_backward"] == [(6, 16)]
    assert not {"concatenate", "split", "slice"} & {e.primitive.name for e in equations(gradient(op), both)}


def test_saves_gate_and_up_only():
    gate, up = normal(0, (5, 7)), normal(1, (5, 7))
    assert saved_shapes(kernel, gate, up) == [(5, 7), (5, 7)]


def test_pulling_back_twice_gives_the_same_gradient():
    """The gradients may take the memory of what was saved; what was saved must not change for it."""
    gate, up = normal(0, (5, 7)), normal(1, (5, 7))
    _, pullback = jax.vjp(kernel, gate, up)
    first, second = pullback(gate), pullback(gate)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_scan_checkpoint_and_vmap_keep_the_gradient():
    gate, up = normal(0, (3, 5, 7)), normal(1, (3, 5, 7))

    def layers(op, gate, up):
        step = jax.checkpoint(lambda x, up: (jax.vmap(op)(x, up), None))
        return jax.lax.scan(step, gate, jnp.stack([up, up]))[0]

    op, oracle = (functools.partial(layers, f) for f in (kernel, gated_activation_reference))
    assert_matches_oracle(op, oracle, (gate, up), normal(2, gate.shape), "float32", NAMES)


def test_empty_input_gives_empty_output():
    assert kernel(jnp.zeros((0, 4)), jnp.zeros((0, 4))).shape == (0, 4)


def test_unknown_activation_is_refused():
    with pytest.raises(InputError, match="use one of silu, gelu_tanh, gelu"):
        kernel(jnp.zeros((2, 4)), jnp.zeros((2, 4)), activation="relu")


@pytest.mark.parametrize("up", [jnp.zeros((2, 3)), jnp.zeros((2, 4), jnp.float16)], ids=["shape", "dtype"])
def test_gate_and_up_that_differ_are_refused(up):
    with pytest.raises(InputError, match="must be alike"):
        kernel(jnp.zeros((2, 4)), up)


def test_one_array_of_an_odd_width_is_refused():
    with pytest.raises(InputError, match="even width"):
        kernel(jnp.zeros((2, 5)), None)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", shapes.LARGE_GATED_ACTIVATION, ids=lambda s: s.name)
def test_lowers_for_an_h100(shape, activation):
    x = jax.ShapeDtypeStruct((shape.rows, shape.width), jnp.bfloat16)
    text = lower_for_h100(gradient(functools.partial(kernel, activation=activation)), x, x)
    assert "gated_activation_backward" in text


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", shapes.LARGE_GATED_ACTIVATION, ids=lambda s: s.name)
def test_matches_oracle_on_a_gpu(shape, activation):
    assert_shape_matches(shape, activation, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "dtype"), [(37, "bfloat16"), *((2050, dtype) for dtype in DTYPES)])
@pytest.mark.parametrize("rows", shapes.EDGE_ROWS)
def test_matches_oracle_on_a_gpu_past_the_last_block(rows, width, dtype):
    assert_shape_matches(shapes.RowShape("", rows, width), "silu", dtype)


@pytest.mark.gpu
def test_normal_distribution_inside_a_kernel_on_a_gpu():
    gate = jnp.linspace(-9.0, 9.0, 9001)[None]
    h = kernel(gate, jnp.ones_like(gate), activation="gelu")
    x = np.asarray(gate, np.float64)
    assert relative_error(h, x * ndtr(x)) < KERNEL["float32"]
