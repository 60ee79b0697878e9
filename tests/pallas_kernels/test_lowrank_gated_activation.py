"""The kernels that finish the rank-r products of a gated MLP, against plain jax.numpy."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pronghorn.pallas_kernels import launch, shapes, tuned
from pronghorn.pallas_kernels.lowrank_gated_activation import (
    BACKWARD,
    BACKWARD_AND_LARGEST,
    FORWARD,
    GatedFactors,
    lowrank_gated_backward,
    lowrank_gated_forward,
    lowrank_gated_reference,
)
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import kernel_outputs, normal
from tests.tolerances import assert_close

SUMS = ("da_down", "db_gate", "db_up")
LARGEST = ("largest_dgate", "largest_dup")
# rows, width, rank of gate and up together, rank of down: no side fits a block; one row; several runs of rows.
SMALL = ((13, 37, 5, 3), (1, 3, 1, 1), (150, 70, 33, 17), (19, 100, 16, 64))


def arguments(rows, width, rank, down_rank, dtype):
    dh, gate, up = (normal(i, (rows, width), dtype) for i in range(3))
    thin = [(rows, rank), (width, rank), (width, rank), (rows, down_rank), (down_rank, width)]
    return dh, gate, up, GatedFactors(*(normal(3 + i, shape, dtype) for i, shape in enumerate(thin)))


def assert_kernels_match(shape, dtype, activation="silu", wanted=("h", *SUMS, *LARGEST)):
    dh, gate, up, factors = arguments(*shape, dtype)
    h, t_down, expected = lowrank_gated_reference(dh, gate, up, factors, activation=activation)
    forward = jax.jit(functools.partial(lowrank_gated_forward, activation=activation))
    found_h, found_t = forward(gate, up, factors._replace(g=None))
    assert_close(found_h, h, dtype=dtype, what="h")
    assert found_t.dtype == gate.dtype
    assert_close(found_t, t_down, dtype=dtype, what="T of down")
    h_alone, nothing = forward(gate, up, factors._replace(g=None, a_down=None))
    assert nothing is None
    assert_close(h_alone, h, dtype=dtype, what="h without T")
    backward = functools.partial(lowrank_gated_backward, activation=activation, wanted=wanted)
    found = jax.jit(backward)(dh, gate, up, factors)
    for name in ("dgate", "dup", *wanted):
        if name in LARGEST:
            assert getattr(found, name) == jnp.max(jnp.abs(getattr(found, name.removeprefix("largest_"))))
        else:
            assert_close(getattr(found, name), getattr(expected, name), dtype=dtype, what=name)
    assert all(getattr(found, name) is None for name in ("h", *SUMS, *LARGEST) if name not in wanted)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_matches_oracle(shape):
    assert_kernels_match(shape, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matches_oracle_in_half_precision(dtype):
    assert_kernels_match(SMALL[0], dtype)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_other_activations_match_oracle(activation):
    assert_kernels_match(SMALL[0], "float32", activation)


def test_only_what_is_wanted_is_computed():
    assert_kernels_match(SMALL[0], "float32", wanted=("db_up",))


def test_without_an_adapter_on_down_its_gradient_is_used_as_it_is():
    dh, gate, up, factors = arguments(*SMALL[0], "float32")
    found = lowrank_gated_backward(
        dh, gate, up, factors._replace(g=None, a_down=None), activation="silu", wanted=()
    )
    zeros = factors._replace(g=jnp.zeros_like(factors.g))
    expected = lowrank_gated_reference(dh, gate, up, zeros, activation="silu")[2]
    assert_close(found.dgate, expected.dgate, what="dgate")


# rows, columns, warps, programs, ahead: several runs of columns, and one.
@pytest.mark.parametrize("tile", [(16, 16, 1, 20, 0), (32, 16, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_forward_tiles_match_oracle(tile, dtype):
    with tuned.candidate("lowrank_gated_forward", tile):
        assert_kernels_match((37, 128, 16, 8), dtype, wanted=())


# rows, columns, warps, runs, ahead, tall, with G. The last block of the first one's last run has no row.
@pytest.mark.parametrize(
    "tile", [(16, 32, 1, 3, 0, 1, 1), (16, 64, 2, 8, 1, 0, 1), (32, 16, 1, 1, 1, 1, 0)], ids=str
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_backward_tiles_match_oracle(tile, dtype):
    wanted = ("h", *SUMS, *(("g_both",) if tile[-1] else ()), *LARGEST)
    with tuned.candidate(BACKWARD_AND_LARGEST, tile):
        assert_kernels_match((77, 70, 24, 5), dtype, wanted=wanted)


def test_g_is_left_to_cublas_where_the_tile_says_so():
    args = arguments(*SMALL[0], "float32")
    with tuned.candidate("lowrank_gated_backward", BACKWARD):
        assert lowrank_gated_backward(*args, activation="silu", wanted=("g_both",)).g_both is None


def test_how_often_a_sum_is_split_follows_from_the_shape():
    """1024 programs or as many as there are tiles; runs divide the tiles."""
    for rows, width, runs in ((4096, 14336, 16), (4096, 8192, 16), (65536, 14336, 1), (256, 64 * 6, 6)):
        _, gate, up, factors = jax.eval_shape(
            lambda shape=(rows, width): arguments(*shape, 32, 16, "bfloat16")
        )
        call = functools.partial(lowrank_gated_forward, activation="silu")
        with tuned.candidate("lowrank_gated_forward", FORWARD):
            outputs = kernel_outputs(call, gate, up, factors._replace(g=None))["lowrank_gated_forward"]
        assert outputs == [(rows, width), (runs * rows, 16)]


@pytest.mark.parametrize("shape", [(4096, 14336, 32, 16), (577, 1536, 6, 3), (1000, 2050, 128, 64)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_an_h100(shape, dtype):
    args = jax.eval_shape(lambda: arguments(*shape, dtype))

    def both(dh, gate, up, factors):
        h_and_t = lowrank_gated_forward(gate, up, factors._replace(g=None), activation="silu")
        return h_and_t, lowrank_gated_backward(dh, gate, up, factors, activation="silu", wanted=SUMS)

    text = lower_for_h100(both, *args)
    assert "lowrank_gated_forward" in text and "lowrank_gated_backward" in text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape", [*SMALL, (577, 1536, 32, 16), (4096, 8192, 32, 16), (1000, 2050, 128, 64)], ids=str
)
def test_matches_oracle_on_a_gpu(shape, dtype):
    with launch.interpret(False):
        assert_kernels_match(shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(32, 64, 4, 7, 1, 1, 0), (32, 128, 16, 7, 1, 0, 1)], ids=str)
@pytest.mark.parametrize("shape", [SMALL[2], (577, 1536, 16, 8), (4096, 8192, 32, 16)], ids=str)
def test_backward_tiles_match_oracle_on_a_gpu(shape, tile):
    wanted = ("h", *SUMS, *(("g_both",) if tile[-1] else ()))
    with launch.interpret(False), tuned.candidate("lowrank_gated_backward", tile):
        assert_kernels_match(shape, "bfloat16", wanted=wanted)


@pytest.mark.gpu
def test_a_rerun_is_bit_exact_on_a_gpu():
    args = arguments(shapes.TOKENS, 8192, 32, 16, "bfloat16")

    @jax.jit
    def call(dh, gate, up, factors):
        forward = lowrank_gated_forward(gate, up, factors._replace(g=None), activation="silu")
        return forward, lowrank_gated_backward(dh, gate, up, factors, activation="silu", wanted=SUMS)

    first, second = call(*args), call(*args)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
