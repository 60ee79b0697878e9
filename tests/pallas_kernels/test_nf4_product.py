import jax
import jax.numpy as jnp
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.nf4_product import MOST_ROWS, nf4_product, nf4_product_reference
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import normal
from tests.pallas_kernels.test_nf4_dequantize import arguments
from tests.tolerances import assert_close


@pytest.mark.parametrize("nested,dtype", [(True, "float32"), (True, "bfloat16"), (False, "float16")])
def test_kernel_equals_its_oracle(nested, dtype):
    for rows, shape, block_size in (
        ((1,), (37, 192), 64),
        ((2, 7), (21, 320), 64),
        ((17,), (35, 96), 32),
    ):
        weight = arguments(shape, nested=nested, block_size=block_size)
        x = normal(1, (*rows, shape[1]), dtype)
        options = {"shape": shape, "block_size": block_size}
        kernel = nf4_product(x, *weight, **options, implementation="pallas")
        assert kernel.dtype == x.dtype
        assert_close(kernel, nf4_product_reference(x, *weight, **options), what=f"{rows} {shape}")


def test_gradient_is_that_of_the_dequantised_weight():
    weight, x = arguments((40, 128), nested=True), normal(3, (3, 128))

    def gradient(function, **options):
        return jax.grad(lambda x: jnp.sum(jnp.sin(function(x, *weight, shape=(40, 128), **options))))(x)

    assert_close(gradient(nf4_product, implementation="pallas"), gradient(nf4_product_reference))


@pytest.mark.parametrize("rows", [1, 24])
@pytest.mark.parametrize("nested", [False, True])
def test_lowers_for_an_h100(nested, rows):
    weight = arguments((48, 320), nested=nested)
    text = lower_for_h100(
        lambda x, *w: nf4_product(x, *w, shape=(48, 320), implementation="pallas"),
        normal(0, (rows, 320), "bfloat16"),
        *weight,
    )
    assert "nf4_product" in text


def test_what_does_not_fit_is_refused():
    weight = arguments((8, 96), nested=False)
    with pytest.raises(InputError, match="whole blocks"):
        nf4_product(jnp.ones((1, 96)), *weight, shape=(8, 96))
    with pytest.raises(InputError, match="rows"):
        nf4_product(jnp.ones((MOST_ROWS + 1, 64)), *weight, shape=(8, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
def test_kernel_equals_its_oracle_on_a_gpu_at_the_size_of_a_real_layer(nested):
    for shape in ((14336, 4096), (4096, 14336), (1023, 576)):
        weight = arguments(shape, nested=nested)
        for dtype in ("bfloat16", "float16", "float32"):
            for rows in (1, 3, 8, 33):
                x = normal(4, (rows, shape[1]), dtype)
                kernel = nf4_product(x, *weight, shape=shape, implementation="pallas")
                # True fp32 products in the oracle, as in the kernel.
                with jax.default_matmul_precision("highest"):
                    expected = nf4_product_reference(x, *weight, shape=shape)
                assert_close(kernel, expected, what=f"{rows} {shape} {dtype}")
