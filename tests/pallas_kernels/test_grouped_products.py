"""Products that read their rows through an index give what they give of rows that were gathered, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch, shapes, tuned
from pronghorn.pallas_kernels.grouped_products import LowRank, by_columns, by_rows, over_rows
from tests.compiling import compile_for_h100
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import equations, normal

KERNELS = ("grouped_by_rows", "grouped_by_columns", "grouped_over_rows")
# Rows, columns and summed elements, warps, stages, tiles beside each other: with two stages each step of a sum over
# rows loads its own index, with three that of the step after it.
TILES = {2: (16, 16, 16, 1, 2, 2), 3: (16, 16, 16, 1, 3, 2)}
RANK = 3


def arguments(shape, tokens, dtype):
    """x [tokens, in], an index [rows] into it, W [groups, out, in], rows [rows, out], T [rows, RANK] and B."""
    index = jnp.asarray(np.random.default_rng(5).integers(0, tokens, shape.rows), jnp.int32)
    groups = len(shape.sizes)
    return (
        normal(0, (tokens, shape.inputs), dtype),
        index,
        normal(1, (groups, shape.outputs, shape.inputs), dtype, 0.3),
        normal(2, (shape.rows, shape.outputs), dtype),
        normal(3, (shape.rows, RANK), dtype),
        normal(4, (groups, shape.outputs, RANK), dtype, 0.3),
    )


def products(sizes, x, index, weight, rows, t, b, *, implementation=None):
    """Every product with x read through an index, or with an index of None with x as it is."""
    sizes = jnp.asarray(sizes, jnp.int32)
    common = {"implementation": implementation}
    columns = jnp.swapaxes(weight, 1, 2)
    return {
        "by_rows": by_rows(x, weight, sizes, LowRank(t, b), b[..., 0], index=index, **common),
        "by_columns": by_columns(x, columns, sizes, LowRank(t, jnp.swapaxes(b, 1, 2)), index=index, **common),
        "of pairs": by_columns(x, columns, sizes, more=[(x + x, columns)], index=index, **common),
        "over_rows, a": over_rows(x, rows, sizes, a_index=index, **common),
        "over_rows, b": over_rows(rows, x, sizes, b_index=index, **common),
        "over_rows, both": over_rows(x, x * 0.5, sizes, a_index=index, b_index=index, **common),
        "over_rows, a rank": over_rows(t, x, sizes, b_index=index, **common),
    }


def compiled(shape, implementation):
    """`products` as one program. Interpreted kernels run once and take long to compile: the compiler is spared its
    passes."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    function = functools.partial(products, shape.sizes, implementation=implementation)
    return jax.jit(function, compiler_options=quick)


def assert_an_index_is_a_gather(shape, tokens, dtype, implementation):
    x, index, *others = arguments(shape, tokens, dtype)
    run = compiled(shape, implementation)
    found, expected = run(x, index, *others), run(x[index], None, *others)
    for name, array in expected.items():
        assert jnp.array_equal(found[name], array), name


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("shape", shapes.SMALL_GROUPED[1::2], ids=lambda shape: shape.name)
def test_an_index_reads_what_a_gather_would_copy(shape, implementation):
    assert_an_index_is_a_gather(shape, 23, "float32", implementation)


def test_one_token_is_read_by_every_row():
    assert_an_index_is_a_gather(shapes.SMALL_GROUPED[1], 1, "float32", "pallas")


@pytest.mark.parametrize("stages", sorted(TILES))
def test_an_index_reads_what_a_gather_would_copy_in_loops_of_many_steps(stages):
    shape = shapes.GroupedShape("many tiles", (0, 50, 1, 32), 87, 40, 35, RANK)
    first, second, third = (tuned.candidate(op, TILES[stages]) for op in KERNELS)
    with first, second, third:
        assert_an_index_is_a_gather(shape, 29, "float32", "pallas")


def test_rows_past_the_groups_come_into_no_sum():
    """Theirs is a token of NaN, and the array's last, which a tile that goes past the end reads."""
    shape = shapes.GroupedShape("rows left over", (5, 0, 30), 41, 24, 40, RANK)
    x, index, *others = arguments(shape, 9, "float32")
    held = sum(shape.sizes)
    index = index.at[:held].set(index[:held] % 8).at[held:].set(8)
    run = compiled(shape, "pallas")
    found, expected = (run(x.at[8].set(value), index, *others) for value in (jnp.nan, 0))
    for name, array in expected.items():
        assert jnp.array_equal(found[name], array), name


def carries_of_loops(stages):
    """The types that the loops of a sum over rows, read through an index, hand from step to step."""
    x, index, rows = jnp.zeros((40, 80)), jnp.zeros(90, jnp.int32), jnp.zeros((90, 96))
    sizes = jnp.asarray([3, 0, 60], jnp.int32)
    with tuned.candidate("grouped_over_rows", TILES[stages]):
        found = equations(
            lambda *a: over_rows(a[0], a[1], sizes, a_index=a[2], implementation="pallas"), x, rows, index
        )
    return [str(v.aval) for e in found if e.primitive.name == "while" for v in e.outvars]


def test_an_index_is_loaded_a_step_before_its_rows_where_tiles_are_loaded_further_ahead():
    """Or addresses that a step loads keep Triton from loading its tiles early."""
    assert "int32[16]" in carries_of_loops(3)
    assert "int32[16]" not in carries_of_loops(2)


@pytest.mark.parametrize("index", [jnp.zeros((7, 1), jnp.int32), jnp.zeros(7, jnp.int16)])
def test_an_index_that_is_none_is_refused(index):
    x, weight, rows = jnp.zeros((4, 8)), jnp.zeros((2, 8, 8)), jnp.zeros((7, 8))
    sizes = jnp.asarray([3, 4], jnp.int32)
    for product in (by_rows, by_columns):
        with pytest.raises(InputError, match="index"):
            product(x, weight, sizes, index=index)
    with pytest.raises(InputError, match="index"):
        over_rows(x, rows, sizes, a_index=index)
    with pytest.raises(InputError, match="same rows"):
        over_rows(x, rows, sizes, b_index=jnp.zeros(7, jnp.int32))


def whole(dtype):
    """Every product as a function of abstract arrays, with groups and widths that tiles do not divide."""
    shape = shapes.GroupedShape("lowered", (70, 0, 130), 210, 200, 330, RANK)
    structs = jax.eval_shape(lambda: arguments(shape, 90, dtype))
    return functools.partial(products, shape.sizes, implementation="pallas"), structs


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_an_h100(dtype):
    function, structs = whole(dtype)
    text = lower_for_h100(function, *structs)
    assert all(name in text for name in KERNELS)


def test_compiles_for_an_h100():
    function, structs = whole("bfloat16")
    with launch.interpret(False):
        assert "grouped_over_rows" in compile_for_h100(function, *structs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", shapes.LARGE_GROUPED, ids=lambda shape: shape.name)
def test_an_index_reads_what_a_gather_would_copy_on_a_gpu(shape, dtype):
    assert_an_index_is_a_gather(shape, shape.rows // 4, dtype, "pallas")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", shapes.TUNED_GROUPED, ids=lambda shape: shape.name)
def test_an_index_reads_what_a_gather_would_copy_at_the_sizes_of_whole_mixtures(shape):
    routed = shapes.GroupedShape(
        shape.name, tuple(shape.sizes.tolist()), shape.rows, shape.inputs, shape.outputs, RANK
    )
    assert_an_index_is_a_gather(routed, shape.rows // 8, "bfloat16", "pallas")
