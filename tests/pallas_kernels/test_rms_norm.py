"""rms_norm: kernel against oracle, what is saved, what is not computed."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import shapes
from pronghorn.pallas_kernels.rms_norm import largest_normalized, rms_norm, rms_norm_reference
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
NAMES = ("y", "dx", "dweight")
kernel = functools.partial(rms_norm, eps=EPS, implementation="pallas")
oracle = functools.partial(rms_norm_reference, eps=EPS)


def arguments(shape, dtype="float32", weight_dtype=None):
    rows, width = shape.rows, shape.width
    weight = normal(1, (width,), weight_dtype or dtype)
    return (normal(0, (rows, width), dtype, scale=3.0), weight), normal(2, (rows, width), dtype)


def assert_shape_matches(shape, dtype):
    inputs, cotangent = arguments(shape, dtype)
    assert_matches_oracle(kernel, oracle, inputs, cotangent, dtype, NAMES)


@pytest.mark.parametrize("shape", shapes.SMALL_RMS_NORM, ids=lambda s: s.name)
def test_matches_oracle(shape):
    assert_shape_matches(shape, "float32")


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", shapes.SMALL_RMS_NORM[:2], ids=lambda s: s.name)
def test_matches_oracle_in_half_precision(shape, dtype):
    assert_shape_matches(shape, dtype)


def test_offset_is_added_to_the_weight():
    inputs, cotangent = arguments(shapes.SMALL_RMS_NORM[1])
    op, reference = (functools.partial(f, weight_offset=1.0) for f in (kernel, oracle))
    assert_matches_oracle(op, reference, inputs, cotangent, "float32", NAMES)
    assert_close(op(*inputs), kernel(inputs[0], inputs[1] + 1.0))


def test_weight_may_have_another_dtype():
    inputs, cotangent = arguments(shapes.SMALL_RMS_NORM[1], "bfloat16", weight_dtype="float32")
    assert_matches_oracle(kernel, oracle, inputs, cotangent, "bfloat16", NAMES)


def test_a_program_adds_up_the_weight_gradient_of_many_blocks(monkeypatch):
    monkeypatch.setattr(sys.modules[rms_norm.__module__], "WEIGHT_GRADIENT_PROGRAMS", 2)
    shape = shapes.RowShape("nine blocks for two programs", 67, 640)
    inputs, _ = arguments(shape)
    assert kernel_outputs(gradient(kernel), *inputs)["rms_norm_backward"] == [(67, 640), (2, 640)]
    assert_shape_matches(shape, "float32")


def test_leading_axes_are_rows():
    x, weight, cotangent = normal(0, (2, 3, 5, 7)), normal(1, (7,)), normal(2, (2, 3, 5, 7))
    assert_matches_oracle(kernel, oracle, (x, weight), cotangent, "float32", NAMES)


def test_frozen_weight_gets_no_gradient_computed():
    (x, weight), _ = arguments(shapes.SMALL_RMS_NORM[1])
    outputs = kernel_outputs(gradient(lambda x: kernel(x, weight)), x)
    assert outputs["rms_norm_backward"] == [x.shape]


def test_input_without_gradient_gets_none_computed():
    (x, weight), cotangent = arguments(shapes.SMALL_RMS_NORM[1])
    op, reference = (lambda w, f=f: f(x, w) for f in (kernel, oracle))
    assert len(kernel_outputs(gradient(op), weight)["rms_norm_backward"]) == 1
    assert_matches_oracle(op, reference, (weight,), cotangent, "float32", ("y", "dweight"))


def test_forward_alone_writes_only_its_output():
    (x, weight), _ = arguments(shapes.SMALL_RMS_NORM[1])
    assert kernel_outputs(kernel, x, weight) == {"rms_norm_forward": [x.shape]}


def test_saves_the_input_and_one_number_a_row():
    (x, weight), _ = arguments(shapes.SMALL_RMS_NORM[1])
    assert saved_shapes(kernel, x, weight) == sorted([x.shape, (x.shape[0],), weight.shape])


@pytest.mark.parametrize("frozen", [False, True], ids=["trained weight", "frozen weight"])
def test_scan_and_checkpoint_keep_the_gradient(frozen):
    x, weights = normal(0, (5, 12)), normal(1, (3, 12)) + 1.0

    def stack(op, x, weights):
        layer = jax.checkpoint(lambda x, w: (x + op(x, w), None))
        return jax.lax.scan(layer, x, jax.lax.stop_gradient(weights) if frozen else weights)[0]

    op, reference = (functools.partial(stack, f) for f in (kernel, oracle))
    assert_matches_oracle(op, reference, (x, weights), normal(2, x.shape), "float32", NAMES)


def test_vmap_keeps_the_gradient():
    x, weight = normal(0, (3, 5, 12)), normal(1, (12,))
    op, reference = (jax.vmap(f, in_axes=(0, None)) for f in (kernel, oracle))
    assert_matches_oracle(op, reference, (x, weight), normal(2, x.shape), "float32", NAMES)


def test_empty_input_gives_empty_output():
    assert kernel(jnp.zeros((0, 4)), jnp.ones(4)).shape == (0, 4)


def test_weight_of_another_width_is_refused():
    with pytest.raises(InputError, match="weight must be"):
        kernel(jnp.zeros((2, 4)), jnp.ones(3))


@pytest.mark.parametrize("shape", shapes.LARGE_RMS_NORM, ids=lambda s: s.name)
def test_lowers_for_an_h100(shape):
    x = jax.ShapeDtypeStruct((shape.rows, shape.width), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((shape.width,), jnp.bfloat16)
    text = lower_for_h100(gradient(kernel), x, weight)
    assert "rms_norm_forward" in text and "rms_norm_backward" in text


def test_no_row_exceeds_its_bound():
    weight = normal(1, (64,))
    x = jnp.zeros((3, 64)).at[0, jnp.argmax(jnp.abs(weight))].set(1e4).at[1].set(normal(0, (64,)))
    largest = largest_normalized(weight, 0.5)
    assert jnp.max(jnp.abs(oracle(x, weight, weight_offset=0.5))) <= largest * (1 + 1e-6)
    assert largest < 1.001 * jnp.max(jnp.abs(oracle(jnp.eye(64) * 1e4, weight, weight_offset=0.5)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", shapes.LARGE_RMS_NORM, ids=lambda s: s.name)
def test_matches_oracle_on_a_gpu(shape):
    assert_shape_matches(shape, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "dtype"), [(37, "bfloat16"), (128, "bfloat16"), (5376, "float32"), *((576, d) for d in DTYPES)]
)
@pytest.mark.parametrize("rows", shapes.EDGE_ROWS)
def test_matches_oracle_on_a_gpu_past_the_last_block(rows, width, dtype):
    assert_shape_matches(shapes.RowShape("", rows, width), dtype)


@pytest.mark.gpu
def test_weight_gradient_is_the_same_bit_for_bit_on_a_gpu():
    inputs, cotangent = arguments(shapes.RowShape("", 4097, 576), "bfloat16")
    runs = [value_and_gradients(kernel, inputs, cotangent)[1][1] for _ in range(5)]
    for run in runs[1:]:
        np.testing.assert_array_equal(np.asarray(run, np.float32), np.asarray(runs[0], np.float32))
