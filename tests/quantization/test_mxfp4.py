"""MXFP4 against transformers' own dequantisation on the CPU, bit for bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.quantization import MXFP4Array, QuantizationConfig, quantize, read_quantization
from pronghorn.quantization.mxfp4 import empty_like_mxfp4
from pronghorn.quantization.quantize_model import finite_scales

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def random_array(shape=(3, 8, 96), *, scales=(110, 140), dtype="float32", seed=0) -> MXFP4Array:
    """Any codes, and scales within these bounds."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    return MXFP4Array(codes, draw.integers(*scales, (*shape[:-1], shape[-1] // 32), np.uint8), dtype)


def by_transformers(array: MXFP4Array) -> np.ndarray:
    """[experts, out, in] of the array's dtype."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.from_numpy(array.codes.reshape(*array.scales.shape, 16))
    dtype = getattr(torch, array.dtype_name)
    weight = convert_moe_packed_tensors(blocks, torch.from_numpy(array.scales), dtype=dtype)
    # An fp16 or bf16 value is exact in fp32, and so is the way back.
    return weight.float().numpy().swapaxes(-1, -2).astype(DTYPES[array.dtype_name])


def same_bits(one, other) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    return (one.shape, one.dtype) == (other.shape, other.dtype) and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_transformers(dtype):
    array = random_array(dtype=dtype)
    assert same_bits(jax.jit(MXFP4Array.dequantize)(array), by_transformers(array))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_code_and_every_scale_of_normal_numbers_is_that_of_transformers(dtype):
    codes = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (1, 252, 1)).reshape(1, 16, -1)
    array = MXFP4Array(codes, np.tile(np.arange(3, 255, dtype=np.uint8), (1, 16, 1)), dtype)
    expected = by_transformers(array)
    assert np.isinf(np.asarray(expected, np.float32)).any(), "the largest scale is beyond both dtypes"
    assert same_bits(array.dequantize(), expected)


def test_a_stack_of_layers_is_dequantised_as_each_layer():
    layers = [random_array(seed=seed) for seed in range(2)]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    assert stack.shape == (2, 3, 8, 96)
    for one, other in zip(layers, stack.dequantize(), strict=True):
        assert same_bits(one.dequantize(), other)


def test_the_abstract_form_is_that_of_the_array():
    array, form = random_array(), empty_like_mxfp4((3, 8, 96), "float32")
    assert jax.tree.structure(array) == jax.tree.structure(form) and array.shape == form.shape
    for leaf, like in zip(jax.tree.leaves(array), jax.tree.leaves(form), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 254), ("bfloat16", 254), ("float16", 140)])
def test_scales_that_give_no_finite_number_are_seen(dtype, largest):
    for scale, fine in ((largest, True), (largest + 1, False)):
        array = random_array(scales=(100, 101), dtype=dtype)
        array.scales[1, 2, 0] = scale
        assert bool(finite_scales([array])[0]) is fine
    if dtype == "float16":
        assert 6 * 2.0 ** (largest - 127) <= float(np.finfo(np.float16).max) < 6 * 2.0 ** (largest + 1 - 127)


def test_it_is_read_and_never_made():
    with pytest.raises(InputError, match="never made"):
        read_quantization("mxfp4")
    with pytest.raises(InputError, match="mxfp4"):
        quantize(jnp.ones((4, 32)), QuantizationConfig("mxfp4"))
