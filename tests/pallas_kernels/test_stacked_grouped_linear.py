"""stacked_grouped_linears: against the oracle of each layer, what it launches and saves, and which layers it is for."""

import jax
import jax.numpy as jnp
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch, shapes, tuned
from pronghorn.pallas_kernels.grouped_linear import grouped_linear_reference
from pronghorn.pallas_kernels.stacked_grouped_linear import stack_well, stacked_grouped_linears
from pronghorn.pallas_kernels.stacked_linears import LinearWeights
from pronghorn.quantization import QuantizationConfig, quantize
from tests.compiling import compile_for_h100
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import (
    assert_matches_oracle,
    equations,
    gradient,
    normal,
    saved_shapes,
    shapes_computed,
)

IMPLEMENTATIONS = ("xla", "pallas")
SCALES = (1.5, 0.5)
NAMES = ("y", "dx", "dlora_a", "dlora_b", "dbias", "dlora_a2", "dlora_b2", "dbias2")
PAIR = shapes.GroupedShape("pair", (5, 0, 12, 1), 21, 32, 64, 2)


def weights(shape, kind="nf4"):
    size = (len(shape.sizes), shape.outputs, shape.inputs)
    return [quantize(normal(seed, size, "float32", 0.3), QuantizationConfig(kind)) for seed in (1, 5)]


def inputs(shape, dtype="float32"):
    """x, and A, B and the bias of each of two layers."""
    groups = len(shape.sizes)
    layers = (
        normal(seed + place, size, "float32", 0.3)
        for seed in (2, 6)
        for place, size in enumerate(
            ((groups, shape.rank, shape.inputs), (groups, shape.outputs, shape.rank), (groups, shape.outputs))
        )
    )
    return normal(0, (shape.rows, shape.inputs), dtype), *layers


def ops(shape, implementation, *, kind="nf4", quantized=None):
    """The op and its oracle, layer by layer, as functions of `inputs`."""
    sizes = jnp.asarray(shape.sizes, jnp.int32)
    first, second = weights(shape, kind) if quantized is None else quantized

    def op(x, a, b, bias, a2, b2, bias2):
        layers = (LinearWeights(first, a, b, bias), LinearWeights(second, a2, b2, bias2))
        return stacked_grouped_linears(x, layers, sizes, scales=SCALES, implementation=implementation)

    def oracle(x, a, b, bias, a2, b2, bias2):
        one = grouped_linear_reference(x, first, sizes, a, b, scale=SCALES[0], bias=bias)
        other = grouped_linear_reference(x, second, sizes, a2, b2, scale=SCALES[1], bias=bias2)
        return jnp.concatenate([one, other], axis=1)

    return op, oracle


def assert_equal_the_oracle(shape, implementation, dtype="float32", **options):
    op, oracle = ops(shape, implementation, **options)
    cotangent = normal(9, (shape.rows, 2 * shape.outputs), dtype)
    assert_matches_oracle(op, oracle, inputs(shape, dtype), cotangent, dtype, NAMES)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", (*shapes.SMALL_GROUPED, PAIR), ids=lambda shape: shape.name)
def test_values_and_gradients_equal_the_oracle(shape, implementation):
    assert_equal_the_oracle(shape, implementation)


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp4"])
def test_other_kinds_of_weights_equal_the_oracle(kind):
    assert_equal_the_oracle(PAIR, "pallas", kind=kind)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_equal_the_oracle(dtype, implementation):
    assert_equal_the_oracle(shapes.SMALL_GROUPED[-1], implementation, dtype)


@pytest.mark.parametrize("outputs", [32, 40], ids=["tiles of one layer", "tiles of both"])
def test_groups_and_layers_of_many_tiles_equal_the_oracle(outputs):
    """A tile of columns that lies in one layer reads its T alone; one that lies in both adds up both parts."""
    shape = shapes.GroupedShape("many tiles", (0, 50, 1, 37), 100, 40, outputs, 18)
    small = (16, 16, 16, 1, 1, 2)
    with (
        tuned.candidate("grouped_by_rows", small),
        tuned.candidate("grouped_by_columns", small),
        tuned.candidate("grouped_over_rows", small),
    ):
        assert_equal_the_oracle(shape, "pallas")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layers_without_adapters_or_biases_equal_the_oracle(implementation):
    first, second = weights(PAIR)
    sizes = jnp.asarray(PAIR.sizes, jnp.int32)

    def op(x):
        layers = (LinearWeights(first), LinearWeights(second))
        return stacked_grouped_linears(x, layers, sizes, scales=SCALES, implementation=implementation)

    def oracle(x):
        return jnp.concatenate(
            [grouped_linear_reference(x, weight, sizes) for weight in (first, second)], axis=1
        )

    cotangent = normal(9, (PAIR.rows, 2 * PAIR.outputs))
    assert_matches_oracle(op, oracle, inputs(PAIR)[:1], cotangent, "float32", ("y", "dx"))


def test_one_launch_a_product_and_none_with_blocks_of_zeros():
    op, _ = ops(PAIR, "pallas")
    launched = [
        (str(e.params["name"]), [v.aval.shape for v in e.invars[-2:]], e.outvars[0].aval.shape)
        for e in equations(lambda *a: jax.vjp(op, *a)[1](jnp.ones((21, 128))), *inputs(PAIR))
        if e.primitive.name == "pallas_call"
    ]
    of = {name: [shape for n, _, shape in launched if n == name] for name, _, _ in launched}
    assert of["grouped_by_rows"] == [(21, 4), (21, 128)]  # T, Y
    assert of["grouped_by_columns"] == [(21, 4), (21, 32)]  # G, dX
    assert of["grouped_over_rows"] == [(4, 4, 32), (4, 128, 2), (4, 128, 1)]  # dA, dB, the biases'
    assert ("grouped_by_columns", [(21, 128), (4, 128, 2)], (21, 4)) in launched


def test_what_is_saved_is_what_the_layers_one_by_one_save():
    op, _ = ops(PAIR, "xla")
    saved = saved_shapes(op, *inputs(PAIR))
    assert saved.count((21, 32)) == 1 and saved.count((21, 4)) == 1  # X, T
    assert saved.count((4, 4, 32)) == 1 and saved.count((4, 128, 2)) == 1  # A, B
    assert (4, 128, 32) not in saved and (4, 64, 32) not in saved


def test_the_dequantised_weights_are_written_where_they_are_multiplied():
    """No array of one layer's weight: not one that would be joined with the other's afterwards."""
    op, _ = ops(PAIR, "pallas")
    with launch.kernels("pallas"):
        computed = shapes_computed(gradient(op), *inputs(PAIR))
    assert (4, 128, 32) in computed and (4, 64, 32) not in computed


def stacks(shape=PAIR, rows=None, **changes):
    """`stack_well` of two layers, the second with `changes`."""
    first, second = weights(shape)
    x, a, b, bias, a2, b2, bias2 = inputs(shape)
    one = LinearWeights(first, a, b, bias)
    other = LinearWeights(second, a2, b2, bias2)._replace(**changes)
    return stack_well(x if rows is None else jnp.zeros((rows, shape.inputs)), (one, other))


def test_layers_that_are_quantised_alike_stack():
    assert stacks(rows=1000)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": jnp.zeros((4, 64, 32))},
        {"weight": weights(PAIR, "int8")[0]},
        {"lora_a": jnp.zeros((4, 3, 32)), "lora_b": jnp.zeros((4, 64, 3))},
        {"lora_a": None, "lora_b": None},
        {"bias": None},
    ],
    ids=["an array", "another kind", "another rank", "no adapter", "no bias"],
)
def test_layers_that_are_not_alike_do_not_stack(changes):
    assert not stacks(rows=1000, **changes)


def test_arrays_do_not_stack():
    """Their matrices exist: a stack would be a copy."""
    linear = LinearWeights(jnp.zeros((4, 64, 32)))
    assert not stack_well(jnp.zeros((1000, 32)), (linear, linear))


def test_few_rows_do_not_stack():
    """Two matrices at once are then much memory for little time; and in decoding most groups have no row."""
    assert not stacks() and not stacks(rows=3)


def test_a_quantised_weight_is_not_trained():
    first, second = weights(PAIR)
    sizes = jnp.asarray(PAIR.sizes, jnp.int32)

    def op(x, weight):
        return stacked_grouped_linears(
            x, (LinearWeights(weight), LinearWeights(second)), sizes, scales=SCALES
        )

    with pytest.raises(InputError, match="quantised weight"):
        jax.vjp(op, inputs(PAIR)[0], first)


def test_shapes_that_do_not_fit_are_refused():
    first, second = weights(PAIR)
    sizes, layers = jnp.asarray(PAIR.sizes, jnp.int32), (LinearWeights(first), LinearWeights(second))
    with pytest.raises(InputError, match="one scale a layer"):
        stacked_grouped_linears(inputs(PAIR)[0], layers, sizes, scales=(1.0,))
    with pytest.raises(InputError, match="weight"):
        stacked_grouped_linears(inputs(PAIR)[0][:, 1:], layers, sizes, scales=SCALES)


def whole_gradient(outputs):
    shape = shapes.GroupedShape("lowered", (70, 0, 130), 210, 192, outputs, 6)
    op, _ = ops(shape, "pallas")
    return gradient(op), [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs(shape, "bfloat16")]


@pytest.mark.parametrize("outputs", [256, 330], ids=["tiles of one layer", "tiles of both"])
def test_lowers_for_an_h100(outputs):
    function, arguments = whole_gradient(outputs)
    with launch.kernels("pallas"):
        text = lower_for_h100(function, *arguments)
    assert all(
        name in text
        for name in ("grouped_by_rows", "grouped_by_columns", "grouped_over_rows", "nf4_dequantize")
    )


@pytest.mark.parametrize("outputs", [256, 330], ids=["tiles of one layer", "tiles of both"])
def test_compiles_for_an_h100(outputs):
    function, arguments = whole_gradient(outputs)
    assert "grouped_over_rows" in compile_for_h100(function, *arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", shapes.LARGE_GROUPED, ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_equal_the_oracle_on_a_gpu_at_the_size_of_a_real_layer(shape, dtype):
    # True fp32 products in the oracle, as in the kernels.
    with jax.default_matmul_precision("highest"):
        assert_equal_the_oracle(shape, "pallas", dtype)
