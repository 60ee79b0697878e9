"""FP8 weights: codes, scales, and the products that linear layers take from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.stacked_linears import LinearWeights, apply_linears, input_gradient
from pronghorn.quantization import FP8Array, QuantizationConfig, quantize, quantize_fp8
from pronghorn.quantization.quantize_model import empty_like, finite_scales

KINDS = ("tensor", "row", "block")


def matrix(shape=(150, 140), dtype="float32", seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("scales", KINDS)
def test_host_and_device_make_the_same_codes(scales):
    weight = matrix(dtype="bfloat16")
    host, device = quantize_fp8(weight, scales=scales), quantize_fp8(jnp.asarray(weight), scales=scales)
    assert isinstance(host.codes, np.ndarray) and isinstance(device.codes, jax.Array)
    assert np.array_equal(host.codes.view(np.uint8), np.asarray(device.codes).view(np.uint8))
    assert np.array_equal(host.scales, device.scales)
    form = empty_like(weight.shape, weight.dtype, QuantizationConfig("fp8", fp8_scales=scales))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), device)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(form)
    assert jax.tree.structure(device) == jax.tree.structure(form)


@pytest.mark.parametrize("scales", KINDS)
def test_values_are_within_half_a_unit_of_the_last_place(scales):
    weight = matrix()
    weight[0] *= 100
    values = np.asarray(quantize_fp8(weight, scales=scales).dequantize())
    least = {"tensor": 2.0**-14 * np.abs(weight).max(), "row": 2e-6, "block": 2e-4}[scales]
    close = np.abs(values - weight) <= np.maximum(2.0**-4 * np.abs(weight), least)
    assert close.all()


def test_values_are_exact_in_16_bits():
    weight = quantize_fp8(matrix(dtype="bfloat16"))
    exact = weight.codes.astype(np.float32) * weight.scales
    assert np.array_equal(np.asarray(weight.dequantize(), np.float32), exact)
    again = quantize_fp8(np.asarray(weight.dequantize()))
    assert np.array_equal(again.codes.view(np.uint8), weight.codes.view(np.uint8))


def test_a_stack_dequantises_matrix_by_matrix():
    one, other = quantize_fp8(jnp.asarray(matrix())), quantize_fp8(jnp.asarray(3 * matrix(seed=1)))
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    assert stack.shape == (2, 150, 140)
    assert np.array_equal(stack.dequantize()[1], other.dequantize())


def test_what_is_not_finite_shows_in_the_scales():
    broken = matrix()
    broken[3, 4] = np.inf
    values = [quantize_fp8(matrix()), quantize_fp8(broken), quantize_fp8(jnp.asarray(broken), scales="block")]
    assert finite_scales(values).tolist() == [True, False, False]


@pytest.mark.parametrize("scales", KINDS)
def test_linear_layers_multiply_by_the_weights_own_products(scales):
    weight = quantize_fp8(jnp.asarray(matrix((48, 40))), scales=scales)
    linear, plain = LinearWeights(weight), LinearWeights(weight.dequantize())
    random = np.random.default_rng(1)
    n, dy = (jnp.asarray(random.standard_normal((6, size)), jnp.float32) for size in (40, 48))
    for run in (
        lambda layer: apply_linears(n, (layer,), (1.0,))[0][0],
        lambda layer: input_gradient((dy,), None, (layer,)),
    ):
        rounded, exact = run(linear), run(plain)
        distance = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
        # An operand in e4m3 is about 2.6 % off, a block's weight is multiplied with operands as they are.
        assert (distance < 1e-6) if scales == "block" else (0.01 < distance < 0.04)


def test_unrounded_gradients_are_those_of_the_dequantised_weight():
    weight = quantize_fp8(jnp.asarray(matrix((48, 40))), gradients="unrounded")
    dy = jnp.asarray(matrix((6, 48), seed=1))
    assert np.array_equal(weight.times(dy, jnp.float32), dy @ weight.dequantize())


def test_unknown_options_are_refused():
    with pytest.raises(InputError, match="fp8_scales"):
        QuantizationConfig("fp8", fp8_scales="column")
    with pytest.raises(InputError, match="fp8_gradients"):
        QuantizationConfig("fp8", fp8_gradients="e3m4")
    assert isinstance(quantize(matrix(), QuantizationConfig("fp8")), FP8Array)
