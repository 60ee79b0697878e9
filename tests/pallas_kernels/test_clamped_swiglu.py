"""clamped_swiglu: kernel and XLA form against the oracle, and gpt-oss's own function in torch, at its limits too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import shapes
from pronghorn.pallas_kernels.clamped_swiglu import clamped_swiglu, clamped_swiglu_reference
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
from tests.tolerances import KERNEL, relative_error

NAMES = ("h", "dgate", "dup")
kernel = functools.partial(clamped_swiglu, implementation="pallas")
plain = functools.partial(clamped_swiglu, implementation="xla")


LIMIT = 2.1  # no number of bf16 or fp16


def assert_shape_matches(shape, implementation, dtype):
    """A standard deviation of 3: half of the elements lie beyond the limit.

    fp32 elements are numbers of bf16 too, so that none lies on the limit, where the oracle's gradient is another: of 16
    million random ones, one does.
    """
    size = (shape.rows, shape.width)
    drawn = "bfloat16" if dtype == "float32" else dtype
    inputs = tuple(normal(seed, size, drawn, scale=3.0).astype(dtype) for seed in (0, 1))
    op = functools.partial(clamped_swiglu, limit=LIMIT, implementation=implementation)
    oracle = functools.partial(clamped_swiglu_reference, limit=LIMIT)
    assert_matches_oracle(op, oracle, inputs, normal(2, size, dtype), dtype, NAMES)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("shape", shapes.SMALL_GATED_ACTIVATION, ids=lambda s: s.name)
def test_matches_oracle(shape, implementation):
    assert_shape_matches(shape, implementation, "float32")


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_matches_oracle_in_half_precision(implementation, dtype):
    assert_shape_matches(shapes.SMALL_GATED_ACTIVATION[1], implementation, dtype)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_values_and_gradients_are_those_of_gpt_oss_on_its_limits_too(implementation):
    import torch
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    experts = GptOssExperts(GptOssConfig(hidden_size=1, intermediate_size=1, num_local_experts=1))
    edges = np.array([-300, -7.0000005, -7, -6.9999995, -1, 0, 0.5, 6.9999995, 7, 7.0000005, 300], np.float32)
    gate, up = (a.reshape(1, -1) for a in np.meshgrid(edges, edges))
    pairs = torch.from_numpy(np.stack([gate, up], axis=-1).reshape(1, -1)).requires_grad_()
    expected = experts._apply_gate(pairs)
    expected.sum().backward()
    moved = pairs.grad.numpy().reshape(-1, 2).T
    op = functools.partial(clamped_swiglu, implementation=implementation)
    h, gradients = value_and_gradients(op, (jnp.asarray(gate), jnp.asarray(up)), jnp.ones(gate.shape))
    for found, wanted in zip((h, *gradients), (expected.detach().numpy(), *moved), strict=True):
        assert relative_error(np.ravel(found), np.ravel(wanted)) <= KERNEL["float32"]
        assert np.array_equal(np.ravel(found) == 0, np.ravel(wanted) == 0), (
            "what is beyond a limit has no gradient"
        )


def test_saves_gate_and_up_and_gradients_come_from_one_launch():
    gate, up = normal(0, (2, 3, 8)), normal(1, (2, 3, 8))
    assert saved_shapes(kernel, gate, up) == [(2, 3, 8), (2, 3, 8)]
    assert kernel_outputs(gradient(kernel), gate, up)["clamped_swiglu_backward"] == [(6, 8), (6, 8)]


def beside_each_other(op):
    """`op` of gate and up in one array."""
    return lambda gate, up, *rest: op(jnp.concatenate([gate, up], axis=-1), None, *rest)


@pytest.mark.parametrize("op", [kernel, plain], ids=["pallas", "xla"])
def test_halves_of_one_array_give_what_two_arrays_give(op):
    gate, up, dh = (normal(seed, (5, 7), "bfloat16", 9.0) for seed in range(3))
    found, expected = (value_and_gradients(f, (gate, up), dh) for f in (beside_each_other(op), op))
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))


def test_halves_of_one_array_are_saved_as_it_and_have_one_gradient():
    both = normal(0, (2, 3, 16))
    op = functools.partial(kernel, up=None)
    assert saved_shapes(op, both) == [(2, 3, 16)]
    assert kernel_outputs(gradient(op), both)["clamped_swiglu_backward"] == [(6, 16)]


def test_pulling_back_twice_gives_the_same_gradient():
    """The gradients may take the memory of what was saved; what was saved must not change for it."""
    gate, up = normal(0, (5, 7)), normal(1, (5, 7))
    _, pullback = jax.vjp(kernel, gate, up)
    for one, other in zip(pullback(gate), pullback(gate), strict=True):
        np.testing.assert_array_equal(one, other)


def test_empty_input_gives_empty_output():
    assert kernel(jnp.zeros((0, 4)), jnp.zeros((0, 4))).shape == (0, 4)


@pytest.mark.parametrize(
    ("up", "limit", "said"),
    [
        (jnp.zeros((2, 3)), 7.0, "must be alike"),
        (jnp.zeros((2, 4), jnp.float16), 7.0, "must be alike"),
        (jnp.zeros((2, 4)), 0.0, "over zero"),
    ],
)
def test_what_cannot_be_computed_is_refused(up, limit, said):
    with pytest.raises(InputError, match=said):
        kernel(jnp.zeros((2, 4)), up, limit=limit)


@pytest.mark.parametrize("shape", shapes.LARGE_GATED_ACTIVATION[:1], ids=lambda s: s.name)
def test_lowers_for_an_h100(shape):
    x = jax.ShapeDtypeStruct((shape.rows, shape.width), jnp.bfloat16)
    assert "clamped_swiglu_backward" in lower_for_h100(gradient(kernel), x, x)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "dtype"), [(37, "bfloat16"), (2880, "bfloat16"), (2880, "float16"), (2050, "float32")]
)
@pytest.mark.parametrize("rows", [1, 129, 8192])
def test_matches_oracle_on_a_gpu(rows, width, dtype):
    assert_shape_matches(shapes.RowShape("", rows, width), "pallas", dtype)
