import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.fp8_transpose import fp8_transpose
from tests.lowering import lower_for_h100


def codes(shape, dtype=jnp.uint8):
    random = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    return jax.lax.bitcast_convert_type(jnp.asarray(random), dtype)


@pytest.mark.parametrize("shape", [(4, 4), (132, 20), (8, 260), (7, 12)])
def test_kernel_equals_its_oracle_to_the_bit(shape):
    x = codes(shape)
    assert np.array_equal(fp8_transpose(x, implementation="pallas"), np.asarray(x).T)


def test_every_byte_of_a_float_format_survives():
    x = codes((16, 64), jnp.float8_e4m3fn)
    actual = fp8_transpose(x, implementation="pallas")
    assert actual.dtype == x.dtype
    assert np.array_equal(np.asarray(actual).view(np.uint8), np.asarray(x).view(np.uint8).T)


def test_lowers_for_an_h100():
    text = lower_for_h100(
        lambda x: fp8_transpose(x, implementation="pallas"), codes((256, 512), jnp.float8_e4m3fn)
    )
    assert "fp8_transpose" in text


def test_what_is_no_matrix_of_bytes_is_refused():
    for x in (jnp.ones((4, 4)), codes((2, 4, 4))):
        with pytest.raises(InputError, match="matrix of bytes"):
            fp8_transpose(x)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(14336, 4096), (1024, 4096), (516, 140), (36, 4)])
def test_kernel_equals_its_oracle_on_a_gpu(shape):
    x = codes(shape, jnp.float8_e4m3fn)
    actual, expected = fp8_transpose(x, implementation="pallas"), fp8_transpose(x, implementation="xla")
    assert jnp.array_equal(*(jax.lax.bitcast_convert_type(y, jnp.uint8) for y in (actual, expected)))
