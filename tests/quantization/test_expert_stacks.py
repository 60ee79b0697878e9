"""Stacks of experts' weights in few bits: each expert's blocks its own, dequantised in the layer and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.grouped_linear import grouped_linear, grouped_linear_reference
from pronghorn.pallas_kernels.launch import kernels
from pronghorn.quantization import NF4Array, QuantizationConfig, quantize
from pronghorn.quantization.quantize_model import empty_like
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import gradient, saved_shapes, shapes_computed, value_and_gradients
from tests.quantization import reference
from tests.quantization.test_mxfp4 import random_array
from tests.tolerances import assert_close

EXPERTS, OUT, IN, ROWS = 3, 16, 64, 21
SIZES = jnp.asarray([5, 0, 14], jnp.int32)  # an expert without rows, and two rows of none
KINDS = {
    "nf4": QuantizationConfig("nf4"),
    "nf4, plain scales": QuantizationConfig("nf4", nested=False),
    "fp4": QuantizationConfig("fp4"),
    "int8": QuantizationConfig("int8"),
}


def stack(dtype="float32", shape=(EXPERTS, OUT, IN)):
    """Experts of sizes that are far from each other, so that scales of one would not do for another."""
    return np.stack([reference.weight(shape[1:], dtype, seed=i, scale=10.0**i) for i in range(shape[0])])


@pytest.mark.parametrize("where", [np.asarray, jnp.asarray], ids=["host", "device"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_is_quantised_as_if_it_were_alone(kind, where):
    # 5 x 39 is no multiple of a block: every expert has a last, partial one.
    for shape in ((EXPERTS, OUT, IN), (EXPERTS, 5, 39)):
        weights = stack("bfloat16", shape)
        whole = quantize(where(weights), KINDS[kind])
        form = empty_like(weights.shape, weights.dtype, KINDS[kind])
        assert whole.shape == weights.shape == form.shape
        assert jax.tree.structure(whole) == jax.tree.structure(form)
        for leaf, like in zip(jax.tree.leaves(whole), jax.tree.leaves(form), strict=True):
            assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        for i, weight in enumerate(weights):
            alone = quantize(where(weight), KINDS[kind])
            own = jax.tree.map(lambda leaf, i=i: leaf[i], whole)
            for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(alone), strict=True):
                assert np.array_equal(one, other)
            assert np.array_equal(whole.dequantize()[i], alone.dequantize())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_scales_of_each_are_those_of_bitsandbytes(kind):
    pytest.importorskip("bitsandbytes")
    weights = stack("bfloat16")
    ours = quantize(jnp.asarray(weights), QuantizationConfig(kind, nested=False))
    for i, weight in enumerate(weights):
        codes, state = reference.quantize_4bit(weight, kind, nested=False)
        assert np.array_equal(ours.codes[i], codes.numpy()[:, 0])
        assert np.array_equal(ours.absmax[i], state.absmax.numpy())


def inputs(seed=0):
    """x, A, B and a cotangent."""
    draw = np.random.default_rng(seed)
    shapes = (ROWS, IN), (EXPERTS, 2, IN), (EXPERTS, OUT, 2), (ROWS, OUT)
    return [jnp.asarray(draw.standard_normal(shape, np.float32)) for shape in shapes]


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("kind", [*KINDS, "mxfp4"])
def test_values_and_gradients_are_those_of_the_dequantised_weights(kind, implementation):
    x, a, b, dy = inputs()
    if kind == "mxfp4":
        weight = random_array((EXPERTS, OUT, IN), scales=(125, 128))
    else:
        weight = quantize(jnp.asarray(stack()), KINDS[kind])
    bias = jnp.ones((EXPERTS, OUT))

    def ours(x, a, b):
        return grouped_linear(x, weight, SIZES, a, b, scale=0.5, bias=bias, implementation=implementation)

    def oracle(x, a, b):
        return grouped_linear_reference(x, weight.dequantize(), SIZES, a, b, scale=0.5, bias=bias)

    found, expected = (value_and_gradients(f, (x, a, b), dy) for f in (ours, oracle))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_fewer_rows_than_experts_dequantise_no_more_matrices_than_rows(implementation):
    """Five experts, three rows of two of them, the first and one in the middle without any."""
    sizes = jnp.asarray([0, 2, 0, 1, 0], jnp.int32)
    draw = np.random.default_rng(1)
    shapes = (3, IN), (5, 2, IN), (5, OUT, 2), (3, OUT)
    x, a, b, dy = (jnp.asarray(draw.standard_normal(shape, np.float32)) for shape in shapes)
    weight = quantize(jnp.asarray(stack(shape=(5, OUT, IN))), KINDS["nf4"])
    bias = jnp.asarray(draw.standard_normal((5, OUT), np.float32))
    dense = weight.dequantize()

    def ours(x, a, b):
        return grouped_linear(x, weight, sizes, a, b, scale=0.5, bias=bias, implementation=implementation)

    def oracle(x, a, b):
        return grouped_linear_reference(x, dense, sizes, a, b, scale=0.5, bias=bias)

    found, expected = (value_and_gradients(f, (x, a, b), dy) for f in (ours, oracle))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(one, other)
    computed = shapes_computed(gradient(ours), x, a, b)
    assert (3, OUT, IN) in computed and (5, OUT, IN) not in computed


def test_no_matrix_in_16_bits_is_kept_for_the_backward_pass_and_none_is_trained():
    x, a, b, _ = inputs()
    weight = quantize(jnp.asarray(stack()), KINDS["nf4"])
    shapes = saved_shapes(lambda x, a, b: grouped_linear(x, weight, SIZES, a, b), x, a, b)
    assert (ROWS, IN) in shapes and weight.codes.shape in shapes
    assert (EXPERTS, OUT, IN) not in shapes
    with pytest.raises(InputError, match="quantised weight cannot be trained"):
        jax.grad(lambda w: jnp.sum(grouped_linear(x, w, SIZES)), allow_int=True)(weight)


@pytest.mark.parametrize("kind", ["nf4", "nf4, plain scales"])
def test_the_kernel_dequantises_a_stack_and_lowers_for_an_h100(kind):
    weight = quantize(jnp.asarray(stack("bfloat16")), KINDS[kind])
    with kernels("pallas"):
        found = jax.jit(NF4Array.dequantize)(weight)
    assert np.array_equal(found, weight.dequantize())
    form = empty_like((128, 768, 2048), "bfloat16", KINDS[kind])
    with kernels("pallas"):
        assert "nf4_dequantize" in lower_for_h100(NF4Array.dequantize, form)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("kind", ["nf4", "nf4, plain scales", "fp4"])
def test_two_stacks_lie_above_each_other_expert_by_expert(kind, implementation):
    """As if their matrices had been joined, to the bit."""
    first, second = (quantize(jnp.asarray(factor * stack("bfloat16")), KINDS[kind]) for factor in (1, -3))
    with kernels(implementation):
        found = jax.jit(NF4Array.dequantize_above)(first, second)
        expected = jnp.concatenate([first.dequantize(), second.dequantize()], axis=1)
    assert found.dtype == jnp.bfloat16 and np.array_equal(found, expected)


def test_two_stacks_of_a_mixture_are_dequantised_by_one_launch_that_lowers_for_an_h100():
    form = empty_like((128, 768, 2048), "bfloat16", KINDS["nf4"])
    with kernels("pallas"):
        text = lower_for_h100(NF4Array.dequantize_above, form, form)
    assert text.count("nf4_dequantize") and "stablehlo.concatenate" not in text
