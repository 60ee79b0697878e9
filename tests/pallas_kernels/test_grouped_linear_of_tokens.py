"""Layers whose rows are copies of tokens, read and summed up through an order, against layers of the copies."""

import jax
import jax.numpy as jnp
import pytest

from pronghorn.errors import InputError
from pronghorn.models.experts import order_by_expert
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.grouped_linear import grouped_linear_reference, grouped_linears
from pronghorn.pallas_kernels.stacked_linears import LinearWeights
from pronghorn.quantization import QuantizationConfig, quantize
from tests.pallas_kernels.comparison import (
    assert_matches_oracle,
    equations,
    gradient,
    normal,
    value_and_gradients,
)
from tests.tolerances import assert_close

IMPLEMENTATIONS = ("xla", "pallas")


def of_tokens(tokens, choices, groups, widths, implementation, dtype):
    """(gate and up of copies of tokens, and down summed up again; its oracle, which copies; their arguments).

    The first group and the last one are empty, one has a single row."""
    hidden, width = widths
    experts = (
        jax.random.randint(jax.random.key(0), (tokens, choices), 2, groups - 1).at[tokens // 2, 0].set(1)
    )
    order = order_by_expert(experts, groups)

    def adapter(seed, out, into, rank):
        return normal(seed, (groups, rank, into), "float32", 0.3), normal(
            seed + 1, (groups, out, rank), "float32", 0.3
        )

    x = normal(1, (tokens, hidden), dtype)
    ups = [normal(2 + i, (groups, width, hidden), dtype, 0.3) for i in range(2)]
    down = normal(4, (groups, hidden, width), dtype, 0.3)
    bias = normal(5, (groups, hidden), dtype, 0.3)
    adapters = [adapter(10, width, hidden, 4), adapter(12, width, hidden, 3), adapter(14, hidden, width, 5)]

    def op(x, ups, down, bias, adapters):
        layers = [LinearWeights(w, *ab) for w, ab in zip(ups, adapters[:2], strict=True)]
        common = {"implementation": implementation}
        gate, up = grouped_linears(
            x, layers, order.group_sizes, scales=(1.5, 0.5), read=order.tokens(), **common
        )
        last = [LinearWeights(down, *adapters[2], bias)]
        summed = order.tokens()
        return grouped_linears(gate * up, last, order.group_sizes, scales=(2.0,), summed=summed, **common)[0]

    def oracle(x, ups, down, bias, adapters):
        rows = x[order.choice // choices]
        gate, up = (
            grouped_linear_reference(rows, w, order.group_sizes, *ab, scale=scale)
            for w, ab, scale in zip(ups, adapters[:2], (1.5, 0.5), strict=True)
        )
        y = grouped_linear_reference(gate * up, down, order.group_sizes, *adapters[2], scale=2.0, bias=bias)
        return y[order.place].astype(jnp.float32).sum(axis=1).astype(dtype)

    return op, oracle, (x, ups, down, bias, adapters)


def assert_tokens_match(tokens, choices, groups, widths, implementation, dtype):
    op, oracle, arguments = of_tokens(tokens, choices, groups, widths, implementation, dtype)
    cotangent = normal(9, (tokens, widths[0]), dtype)
    y, gradients = value_and_gradients(op, arguments, cotangent)
    expected, wanted = value_and_gradients(oracle, arguments, cotangent)
    assert_close(y, expected, dtype=dtype, what="y")
    found = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, leaf), right in zip(found, jax.tree.leaves(wanted), strict=True):
        assert_close(leaf, right, dtype=dtype, what=jax.tree_util.keystr(path))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_read_and_summed_through_an_order_equal_their_copies(implementation, dtype):
    assert_tokens_match(19, 3, 6, (24, 10), implementation, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens, choices, groups, widths", [(1, 1, 4, (3, 2)), (3, 2, 9, (5, 7))])
def test_few_tokens_equal_their_copies(tokens, choices, groups, widths, implementation):
    """One row, and fewer rows than groups, as in decoding."""
    assert_tokens_match(tokens, choices, groups, widths, implementation, "float32")


@pytest.mark.parametrize("tokens", [2, 9])
def test_quantised_weights_of_tokens_equal_those_of_their_copies(tokens):
    """Fewer rows than groups have the matrices of their own groups dequantised."""
    choices, groups, hidden, width = 2, 6, 32, 64
    experts = jax.random.randint(jax.random.key(0), (tokens, choices), 1, groups)
    order = order_by_expert(experts, groups)
    up, down = (
        LinearWeights(
            quantize(normal(1, (groups, out, into), "float32", 0.3), QuantizationConfig("nf4")),
            normal(2, (groups, 3, into), "float32", 0.3),
            normal(3, (groups, out, 3), "float32", 0.3),
        )
        for out, into in ((width, hidden), (hidden, width))
    )

    def layer(x, linear, adapter, **rows):
        linear = linear._replace(lora_a=adapter[0], lora_b=adapter[1])
        sizes = order.group_sizes
        return grouped_linears(x, (linear,), sizes, scales=(1.5,), implementation="pallas", **rows)[0]

    def op(x, up_adapter, down_adapter):
        h = jnp.tanh(layer(x, up, up_adapter, read=order.tokens()))
        return layer(h, down, down_adapter, summed=order.tokens())

    def of_copies(x, up_adapter, down_adapter):
        h = jnp.tanh(layer(x[order.choice // choices], up, up_adapter))
        return jnp.sum(layer(h, down, down_adapter)[order.place], axis=1)

    arguments = (normal(4, (tokens, hidden)), (up.lora_a, up.lora_b), (down.lora_a, down.lora_b))
    names = ("y", "dx", "dup_a", "dup_b", "ddown_a", "ddown_b")
    assert_matches_oracle(op, of_copies, arguments, normal(9, (tokens, hidden)), "float32", names)


def test_tokens_that_do_not_fit_are_refused():
    order = order_by_expert(jnp.asarray([[0, 1], [2, 0], [1, 2]]), 3)
    tokens, sizes = order.tokens(), order.group_sizes
    layers = (LinearWeights(jnp.zeros((3, 4, 8))),)
    wrong = (
        tokens._replace(token=tokens.token[:, None]),
        tokens._replace(place=tokens.place[1:]),
        tokens._replace(place=tokens.place.reshape(-1)),
        tokens._replace(token=tokens.token.astype(jnp.int16)),
    )
    for one in wrong:
        with pytest.raises(InputError, match="`read`"):
            grouped_linears(jnp.zeros((3, 8)), layers, sizes, scales=(1.0,), read=one)
        with pytest.raises(InputError, match="`summed`"):
            grouped_linears(jnp.zeros((6, 8)), layers, sizes, scales=(1.0,), summed=one)
    with pytest.raises(InputError, match="`read`"):
        grouped_linears(jnp.zeros((2, 8)), layers, sizes, scales=(1.0,), read=tokens)


def test_no_copy_of_tokens_is_written():
    """Of [rows, hidden] there is what down gives, and the gradient that the tokens' is the sum of: no gathered rows."""
    op, _, arguments = of_tokens(32, 4, 6, (16, 8), "pallas", "bfloat16")
    by = {
        equation.primitive.name
        for equation in equations(gradient(op), *arguments)
        if (128, 16) in [getattr(v.aval, "shape", ()) for v in equation.outvars]
    }
    assert "pallas_call" in by and "gather" not in by


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tokens_read_and_summed_through_an_order_equal_their_copies_on_a_gpu(dtype):
    with launch.interpret(False):
        assert_tokens_match(1000, 8, 32, (512, 384), "pallas", dtype)
