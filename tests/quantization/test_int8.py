"""INT8 weights against bitsandbytes on the CPU, bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.quantization.int8 import quantize_int8
from tests.quantization import reference


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_codes_scales_and_values_equal_those_of_bitsandbytes(place, dtype):
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional as F

    weight = reference.weight((37, 130), dtype, scale=0.05)
    codes, scales, _ = F.int8_vectorwise_quant(reference.tensor(weight).half())
    ours = quantize_int8(place(weight))
    assert np.array_equal(np.asarray(ours.codes), codes.numpy())
    assert np.array_equal(np.asarray(ours.scales), scales.numpy())
    expected = F.int8_vectorwise_dequant(codes, scales).to(reference.tensor(weight).dtype).float().numpy()
    assert np.array_equal(np.asarray(ours.dequantize(), np.float32), expected)


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_a_row_of_zeros_stays_zero(place):
    weight = np.ones((3, 8), np.float32)
    weight[1] = 0
    assert np.array_equal(np.asarray(quantize_int8(place(weight)).dequantize())[1], np.zeros(8))
