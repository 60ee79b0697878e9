import importlib

import jax
import jax.numpy as jnp
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import shapes, tuned
from pronghorn.pallas_kernels.autotune import LIMIT, error
from pronghorn.pallas_kernels.autotune_grouped import grouped_linear_jobs
from pronghorn.pallas_kernels.grouped_kernels import row_tiles
from pronghorn.pallas_kernels.grouped_linear import (
    grouped_linear,
    grouped_linear_reference,
    grouped_linears,
)
from pronghorn.pallas_kernels.grouped_products import by_columns, by_rows
from pronghorn.pallas_kernels.stacked_linears import LinearWeights
from pronghorn.quantization import QuantizationConfig, quantize
from tests.compiling import compile_for_h100
from tests.lowering import lower_defaults_for_h100, lower_for_h100
from tests.pallas_kernels.comparison import (
    assert_matches_oracle,
    equations,
    gradient,
    normal,
    saved_shapes,
    shapes_computed,
    value_and_gradients,
)

NAMES = ("y", "dx", "dweight", "dlora_a", "dlora_b", "dbias")
IMPLEMENTATIONS = ("xla", "pallas")


def inputs(shape, dtype="float32", master="float32"):
    """x, weight, A, B, bias of one `GroupedShape`."""
    groups = len(shape.sizes)
    return (
        normal(0, (shape.rows, shape.inputs), dtype),
        normal(1, (groups, shape.outputs, shape.inputs), dtype, 0.3),
        normal(2, (groups, shape.rank, shape.inputs), master, 0.3),
        normal(3, (groups, shape.outputs, shape.rank), master, 0.3),
        normal(4, (groups, shape.outputs), dtype),
    )


def ops(shape, implementation):
    """The op and its oracle as functions of `inputs`."""
    sizes = jnp.asarray(shape.sizes, jnp.int32)

    def op(x, weight, a, b, bias):
        return grouped_linear(x, weight, sizes, a, b, scale=1.5, bias=bias, implementation=implementation)

    def oracle(x, weight, a, b, bias):
        return grouped_linear_reference(x, weight, sizes, a, b, scale=1.5, bias=bias)

    return op, oracle


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", shapes.SMALL_GROUPED, ids=lambda shape: shape.name)
def test_values_and_gradients_equal_the_oracle(shape, implementation):
    op, oracle = ops(shape, implementation)
    cotangent = normal(9, (shape.rows, shape.outputs))
    assert_matches_oracle(op, oracle, inputs(shape), cotangent, "float32", NAMES)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_equal_the_oracle(dtype, implementation):
    shape = shapes.SMALL_GROUPED[-1]
    op, oracle = ops(shape, implementation)
    cotangent = normal(9, (shape.rows, shape.outputs), dtype)
    assert_matches_oracle(op, oracle, inputs(shape, dtype), cotangent, dtype, NAMES)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_no_group_are_zero_whatever_they_hold(implementation):
    shape = shapes.SMALL_GROUPED[-1]
    held = sum(shape.sizes)
    assert held < shape.rows
    op, _ = ops(shape, implementation)
    x, *rest = inputs(shape)
    poisoned = x.at[held:].set(jnp.nan)
    cotangent = normal(9, (shape.rows, shape.outputs))
    y, gradients = value_and_gradients(op, (x, *rest), cotangent)
    other, other_gradients = value_and_gradients(op, (poisoned, *rest), cotangent)
    assert not jnp.any(y[held:]) and jnp.array_equal(y, other)
    for name, a, b in zip(NAMES[1:], gradients, other_gradients, strict=True):
        assert jnp.array_equal(a, b), name
    assert not jnp.any(gradients[0][held:])


def pair_of(shape, implementation, *, quantized):
    """(`grouped_linears` of two layers, its oracle, their arguments): the second has another rank, and no bias."""
    sizes = jnp.asarray(shape.sizes, jnp.int32)
    x, weight, a, b, bias = inputs(shape)
    groups, outputs, width = weight.shape
    more = normal(5, weight.shape, "float32", 0.3)
    a2, b2 = (normal(6, (groups, 3, width), "float32", 0.3), normal(7, (groups, outputs, 3), "float32", 0.3))
    if quantized:
        weight, more = (quantize(w, QuantizationConfig("nf4")) for w in (weight, more))

    def op(x, a, b, bias, a2, b2):
        layers = (LinearWeights(weight, a, b, bias), LinearWeights(more, a2, b2))
        return grouped_linears(x, layers, sizes, scales=(1.5, 0.5), implementation=implementation)

    def oracle(x, a, b, bias, a2, b2):
        first = grouped_linear_reference(x, weight, sizes, a, b, scale=1.5, bias=bias)
        return first, grouped_linear_reference(x, more, sizes, a2, b2, scale=0.5)

    return op, oracle, (x, a, b, bias, a2, b2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_layers_of_one_input_equal_the_oracle(implementation, quantized, together, monkeypatch):
    module = importlib.import_module(
        "pronghorn.pallas_kernels.grouped_linear"
    )  # the package has the op by this name
    monkeypatch.setattr(module, "_worth_together", lambda *_: together)
    shape = shapes.GroupedShape("pair", (5, 0, 12, 1), 21, 32, 64, 2)
    op, oracle, arguments = pair_of(shape, implementation, quantized=quantized)
    cotangent = tuple(normal(seed, (shape.rows, shape.outputs)) for seed in (8, 9))
    names = ("y", "y2", "dx", "dlora_a", "dlora_b", "dbias", "dlora_a2", "dlora_b2")
    assert_matches_oracle(op, oracle, arguments, cotangent, "float32", names)


def test_layers_of_one_input_read_it_once_for_their_adapters_and_write_one_gradient():
    shape = shapes.GroupedShape("pair", (5, 0, 12, 1), 21, 32, 64, 2)
    op, _, arguments = pair_of(shape, "pallas", quantized=False)
    launched = [
        (str(e.params["name"]), e.outvars[0].aval.shape)
        for e in equations(gradient(op), *arguments)
        if e.primitive.name == "pallas_call"
    ]
    assert launched.count(("grouped_by_rows", (21, 5))) == 1  # T
    assert launched.count(("grouped_over_rows", (4, 5, 32))) == 1  # dA
    assert [shape for name, shape in launched if name == "grouped_by_columns"].count((21, 32)) == 1  # dX


def test_layers_that_do_not_read_one_input_are_refused():
    shape = shapes.SMALL_GROUPED[1]
    x, weight, *_ = inputs(shape)
    sizes = jnp.asarray(shape.sizes, jnp.int32)
    with pytest.raises(InputError, match="one scale a layer"):
        grouped_linears(x, (LinearWeights(weight), LinearWeights(weight)), sizes, scales=(1.0,))
    with pytest.raises(InputError, match="weight"):
        grouped_linears(x, (LinearWeights(weight), LinearWeights(weight[..., 1:])), sizes, scales=(1.0, 1.0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_frozen_weights_get_no_gradient_and_no_matrix_of_their_size_is_computed(implementation):
    shape = shapes.GroupedShape("frozen", (3, 0, 6), 9, 24, 40, 2)
    x, weight, a, b, _ = inputs(shape)
    sizes = jnp.asarray(shape.sizes, jnp.int32)

    def op(x, a, b):
        return grouped_linear(x, weight, sizes, a, b, implementation=implementation)

    computed = shapes_computed(gradient(op), x, a, b)
    groups = len(shape.sizes)
    assert (groups, 40, 24) not in computed and (40, 24) not in computed
    assert saved_shapes(op, x, a, b).count((9, 24)) == 1  # X, and nothing else of its size
    assert (9, 2) in saved_shapes(op, x, a, b)


def test_adapters_are_saved_as_the_products_read_them():
    """Not their masters: sliced out of a vector, these would be kept for the backward pass in fp32."""
    x, weight, a, b, _ = inputs(shapes.GroupedShape("half", (3, 0, 6), 9, 24, 40, 2))
    sizes = jnp.asarray((3, 0, 6), jnp.int32)

    def op(x, a, b):
        return grouped_linear(x, weight, sizes, a, b)

    _, pullback = jax.vjp(op, x.astype(jnp.bfloat16), a, b)
    kept = [leaf.dtype for leaf in jax.tree.leaves(pullback) if leaf.shape in (a.shape, b.shape)]
    assert kept == [jnp.bfloat16, jnp.bfloat16]
    assert [gradient.dtype for gradient in pullback(jnp.ones((9, 40), jnp.bfloat16))[1:]] == [
        a.dtype,
        b.dtype,
    ]


def test_shapes_that_do_not_fit_are_refused():
    x, weight, a, b, bias = inputs(shapes.SMALL_GROUPED[1])
    sizes = jnp.asarray(shapes.SMALL_GROUPED[1].sizes, jnp.int32)
    with pytest.raises(InputError, match="weight"):
        grouped_linear(x[:, 1:], weight, sizes)
    with pytest.raises(InputError, match="group_sizes"):
        grouped_linear(x, weight, sizes[1:])
    with pytest.raises(InputError, match="both"):
        grouped_linear(x, weight, sizes, a)
    with pytest.raises(InputError, match="lora_b"):
        grouped_linear(x, weight, sizes, a, b[:, 1:])
    with pytest.raises(InputError, match="bias"):
        grouped_linear(x, weight, sizes, bias=bias[:1])


def test_a_group_of_many_tiles_equals_the_oracle():
    shape = shapes.GroupedShape("many tiles", (0, 150, 1, 37), 200, 40, 35, 3)
    op, oracle = ops(shape, "pallas")
    cotangent = normal(9, (shape.rows, shape.outputs))
    small = (16, 16, 16, 1, 1, 2)
    with (
        tuned.candidate("grouped_by_rows", small),
        tuned.candidate("grouped_by_columns", small),
        tuned.candidate("grouped_over_rows", small),
    ):
        assert_matches_oracle(op, oracle, inputs(shape), cotangent, "float32", NAMES)


@pytest.mark.parametrize("sizes", [(0, 1, 33, 0, 16), (0, 0, 0), (64,), (1, 1, 1, 1)])
def test_tiles_cover_every_row_once_and_stay_inside_of_a_group(sizes):
    rows, block, covered = 64, 16, []
    group = [g for g, size in enumerate((*sizes, rows - sum(sizes))) for _ in range(size)]
    for tile_group, first, end in row_tiles(jnp.asarray(sizes, jnp.int32), rows, block).tolist():
        for row in range(first, min(first + block, end)):
            assert group[row] == tile_group
            covered.append(row)
    assert sorted(covered) == list(range(rows))


def whole_gradient(dtype):
    """A function of abstract arrays that launches every kernel, with groups that blocks do not divide."""
    shape = shapes.GroupedShape("lowered", (70, 0, 130), 210, 200, 330, 6)
    op, _ = ops(shape, "pallas")
    return gradient(op), [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs(shape, dtype)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_an_h100(dtype):
    function, arguments = whole_gradient(dtype)
    text = lower_for_h100(function, *arguments)
    # Both directions and the sums over rows: the values of a pullback alone are not computed, T is.
    assert all(name in text for name in ("grouped_by_rows", "grouped_by_columns", "grouped_over_rows"))


def test_a_gpu_takes_the_kernels_where_nothing_is_asked_for():
    shape = shapes.SMALL_GROUPED[-1]
    op, _ = ops(shape, None)
    text = lower_defaults_for_h100(gradient(op), *inputs(shape))
    assert all(name in text for name in ("grouped_by_rows", "grouped_by_columns", "grouped_over_rows"))


def test_compiles_for_an_h100():
    function, arguments = whole_gradient("bfloat16")
    assert "grouped_over_rows" in compile_for_h100(function, *arguments)


@pytest.mark.parametrize("product", [by_rows, by_columns], ids=["by_rows", "by_columns"])
def test_the_loop_of_a_product_always_has_its_steps(product):
    """A loop that may have none, a `while` for jax, made ptxas round sums before they were there."""
    sizes = jnp.asarray([3, 0, 60], jnp.int32)
    x, weight = jnp.zeros((70, 96)), jnp.zeros((3, 96, 96))
    text = str(jax.make_jaxpr(lambda *a: product(*a, implementation="pallas"))(x, weight, sizes))
    assert "pallas_call" in text and "scan[" in text and "while[" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("shape", shapes.LARGE_GROUPED, ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_equal_the_oracle_on_a_gpu_at_the_size_of_a_real_layer(shape, dtype):
    op, oracle = ops(shape, "pallas")
    cotangent = normal(9, (shape.rows, shape.outputs), dtype)
    # True fp32 products in the oracle, as in the kernels.
    with jax.default_matmul_precision("highest"):
        assert_matches_oracle(op, oracle, inputs(shape, dtype), cotangent, dtype, NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", shapes.TUNED_GROUPED, ids=lambda shape: shape.name)
def test_chosen_tiles_give_right_sums_on_a_gpu_at_the_sizes_of_whole_mixtures(shape):
    """128 experts too: at that size sums by columns were wrong once."""
    for job in grouped_linear_jobs(shape, jnp.bfloat16):
        assert error(job, jax.jit(job.run)(*job.arguments()), job.expected()) <= LIMIT, job.op
