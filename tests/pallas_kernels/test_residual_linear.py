"""residual_linear: hand gradient against oracle, and that attention's output is saved as it came."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import shapes
from pronghorn.pallas_kernels.norm_linears import Dropout
from pronghorn.pallas_kernels.residual_linear import residual_linear, residual_linear_reference
from tests.pallas_kernels.comparison import assert_matches_oracle, normal
from tests.pallas_kernels.linear_inputs import linear, names, quantized, saved_of_tokens, split

ROWS, HEADS, HEAD_DIM, WIDTH = 13, 3, 4, 7
hand = functools.partial(residual_linear, scale=0.75)
oracle = functools.partial(residual_linear_reference, scale=0.75)
FIELDS = ("weight", "lora_a", "lora_b", "bias")


def inputs(dtype="float32"):
    return normal(0, (ROWS, WIDTH), dtype), normal(1, (ROWS, HEADS, HEAD_DIM), dtype)


def layer(dtype="float32", rank=3):
    return linear(10, HEADS * HEAD_DIM, WIDTH, rank=rank, bias=True, dtype=dtype)


def assert_gradients_match(linear_, fields=FIELDS, dtype="float32", op=hand, reference=oracle):
    flat, put = split([linear_], fields)
    op, reference = (lambda r, x, *a, f=f: f(r, x, *put(a)) for f in (op, reference))
    arguments = (*inputs(dtype), *flat)
    labels = names(("y", "dresidual", "dx"), len(flat))
    assert_matches_oracle(op, reference, arguments, normal(2, (ROWS, WIDTH), dtype), dtype, labels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_matches_oracle(dtype):
    assert_gradients_match(layer(dtype), dtype=dtype)


def test_the_layer_may_lack_an_adapter():
    assert_gradients_match(layer(rank=0))


def test_quantised_weight_matches_its_dense_twin():
    codes, dense = quantized(layer())
    residual, x = inputs()
    op, reference = (
        lambda r, x, a, b, f=f, w=w: f(r, x, w._replace(lora_a=a, lora_b=b))
        for f, w in ((hand, codes), (oracle, dense))
    )
    arguments = residual, x, codes.lora_a, codes.lora_b
    labels = names(("y", "dresidual", "dx"), 2)
    assert_matches_oracle(op, reference, arguments, normal(2, residual.shape), "float32", labels)


def test_saves_attentions_output_as_the_array_that_came_in():
    residual, x = inputs()
    flat, put = split([layer()], ("lora_a", "lora_b"))
    saved = saved_of_tokens(lambda r, x, *a: hand(r, x, *put(a)), ROWS, residual, x, *flat)
    assert saved == [(ROWS, 3), x.shape]


def test_dropout_draws_the_mask_of_lora_linear():
    dropout = Dropout((0.4,), (jax.random.key(3),))
    op, reference = (functools.partial(f, dropout=dropout) for f in (hand, oracle))
    assert_gradients_match(layer(), ("lora_a", "lora_b"), op=op, reference=reference)


@pytest.mark.parametrize(
    "residual", [jnp.zeros((ROWS, WIDTH + 1)), jnp.zeros((ROWS, WIDTH), jnp.float16)], ids=["shape", "dtype"]
)
def test_residual_that_does_not_fit_is_refused(residual):
    with pytest.raises(InputError, match="residual"):
        hand(residual, inputs()[1], layer())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", shapes.EDGE_ROWS)
def test_matches_oracle_on_a_gpu(rows, dtype):
    residual, x = normal(0, (rows, 576), dtype), normal(1, (rows, 9, 64), dtype)
    flat, put = split([linear(10, 576, 576, rank=16, dtype=dtype)], ("lora_a", "lora_b"))
    op, reference = (lambda r, x, *a, f=f: f(r, x, *put(a)) for f in (hand, oracle))
    labels = names(("y", "dresidual", "dx"), len(flat))
    assert_matches_oracle(
        op, reference, (residual, x, *flat), normal(2, residual.shape, dtype), dtype, labels
    )
