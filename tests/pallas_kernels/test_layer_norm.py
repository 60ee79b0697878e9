"""layer_norm: kernel against oracle, what is saved, what is not computed."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import shapes
from pronghorn.pallas_kernels.layer_norm import layer_norm, layer_norm_reference
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import (
    DTYPES,
    assert_matches_oracle,
    gradient,
    kernel_outputs,
    normal,
    saved_shapes,
    value_and_gradients,
)
from tests.tolerances import assert_close

EPS = 1e-5
NAMES = ("y", "dx", "dweight", "dbias")
kernel = functools.partial(layer_norm, eps=EPS, implementation="pallas")
oracle = functools.partial(layer_norm_reference, eps=EPS)


def arguments(shape, dtype="float32", parameter_dtype=None, bias=True):
    rows, width = shape.rows, shape.width
    # Far from a mean of zero, where a variance taken as a difference of squares would be lost.
    x = normal(0, (rows, width), dtype, scale=3.0) + jnp.asarray(5.0, dtype)
    parameters = [normal(seed, (width,), parameter_dtype or dtype) for seed in ((1, 3) if bias else (1,))]
    return (x, *parameters), normal(2, (rows, width), dtype)


def assert_shape_matches(shape, dtype, bias=True):
    inputs, cotangent = arguments(shape, dtype, bias=bias)
    assert_matches_oracle(kernel, oracle, inputs, cotangent, dtype, NAMES[: 1 + len(inputs)])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", shapes.SMALL_RMS_NORM[1:], ids=lambda s: s.name)
def test_matches_oracle(shape, bias):
    assert_shape_matches(shape, "float32", bias)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_matches_oracle_in_half_precision(dtype):
    assert_shape_matches(shapes.SMALL_RMS_NORM[1], dtype)


def test_offset_is_added_to_the_weight_and_parameters_may_have_another_dtype():
    inputs, cotangent = arguments(shapes.SMALL_RMS_NORM[1], "bfloat16", parameter_dtype="float32")
    op, reference = (functools.partial(f, weight_offset=1.0) for f in (kernel, oracle))
    assert_matches_oracle(op, reference, inputs, cotangent, "bfloat16", NAMES)
    assert_close(op(*inputs), kernel(inputs[0], inputs[1] + 1.0, inputs[2]))


def test_a_program_adds_up_the_gradients_of_many_blocks(monkeypatch):
    monkeypatch.setattr(sys.modules[layer_norm.__module__], "PARAMETER_GRADIENT_PROGRAMS", 2)
    shape = shapes.RowShape("nine blocks for two programs", 67, 640)
    inputs, _ = arguments(shape)
    outputs = kernel_outputs(gradient(kernel), *inputs)["layer_norm_backward"]
    assert outputs == [(67, 640), (2, 640), (2, 640)]
    assert_shape_matches(shape, "float32")


def test_frozen_parameters_get_no_gradient_computed():
    (x, weight, bias), _ = arguments(shapes.SMALL_RMS_NORM[1])
    outputs = kernel_outputs(gradient(lambda x: kernel(x, weight, bias)), x)
    assert outputs["layer_norm_backward"] == [x.shape]
    outputs = kernel_outputs(gradient(lambda bias: kernel(x, weight, bias)), bias)
    assert len(outputs["layer_norm_backward"]) == 1


def test_two_numbers_a_row_are_saved_beside_the_input():
    (x, weight, bias), _ = arguments(shapes.SMALL_RMS_NORM[1])
    expected = sorted([x.shape, (x.shape[0],), (x.shape[0],), weight.shape, bias.shape])
    assert saved_shapes(kernel, x, weight, bias) == expected
    assert kernel_outputs(kernel, x, weight, bias)["layer_norm_forward"] == [x.shape]


def test_leading_axes_scan_checkpoint_and_empty_inputs():
    x, weights, biases = normal(0, (2, 5, 12)), normal(1, (3, 12)) + 1.0, normal(3, (3, 12))

    def stack(op, x, weights, biases):
        layer = jax.checkpoint(lambda x, p: (x + op(x, *p), None))
        return jax.lax.scan(layer, x, (weights, biases))[0]

    op, reference = (functools.partial(stack, f) for f in (kernel, oracle))
    assert_matches_oracle(op, reference, (x, weights, biases), normal(2, x.shape), "float32", NAMES)
    assert kernel(jnp.zeros((0, 4)), jnp.ones(4)).shape == (0, 4)


def test_parameters_of_another_width_are_refused():
    with pytest.raises(InputError, match="weight has shape"):
        kernel(jnp.zeros((2, 4)), jnp.ones(3))
    with pytest.raises(InputError, match="bias has shape"):
        kernel(jnp.zeros((2, 4)), jnp.ones(4), jnp.ones((1, 4)))


@pytest.mark.parametrize("shape", shapes.LARGE_LAYER_NORM, ids=lambda s: s.name)
def test_lowers_for_an_h100(shape):
    x = jax.ShapeDtypeStruct((shape.rows, shape.width), jnp.bfloat16)
    parameter = jax.ShapeDtypeStruct((shape.width,), jnp.bfloat16)
    text = lower_for_h100(gradient(kernel), x, parameter, parameter)
    assert "layer_norm_forward" in text and "layer_norm_backward" in text


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", shapes.LARGE_LAYER_NORM, ids=lambda s: s.name)
def test_matches_oracle_on_a_gpu(shape, bias):
    assert_shape_matches(shape, "bfloat16", bias)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "dtype"), [(37, "bfloat16"), (6144, "float32"), *((576, d) for d in DTYPES)]
)
@pytest.mark.parametrize("rows", shapes.EDGE_ROWS)
def test_matches_oracle_on_a_gpu_past_the_last_block(rows, width, dtype):
    assert_shape_matches(shapes.RowShape("", rows, width), dtype)


@pytest.mark.gpu
def test_parameter_gradients_are_the_same_bit_for_bit_on_a_gpu():
    inputs, cotangent = arguments(shapes.RowShape("", 4097, 576), "bfloat16")
    runs = [value_and_gradients(kernel, inputs, cotangent)[1][1:] for _ in range(5)]
    for run in runs[1:]:
        for one, other in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
