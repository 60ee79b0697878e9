"""The kernels that finish the rank-r products of a gated MLP, against plain jax.numpy."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pronghorn.pallas_kernels import launch, shapes
from pronghorn.pallas_kernels.gated_activation import gated_activation_reference
from pronghorn.pallas_kernels.lowrank_gated_activation import (
    GatedFactors,
    lowrank_gated_backward,
    lowrank_gated_forward,
)
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import normal
from tests.tolerances import assert_close

SUMS = ("da_down", "db_gate", "db_up")
LARGEST = ("largest_dgate", "largest_dup")
# rows, width, rank of gate and up together, rank of down: no side fits a block; one row; several runs of rows.
SMALL = ((13, 37, 5, 3), (1, 3, 1, 1), (150, 70, 33, 17))


def arguments(rows, width, rank, down_rank, dtype):
    dh, gate, up = (normal(i, (rows, width), dtype) for i in range(3))
    thin = [(rows, rank), (width, rank), (width, rank), (rows, down_rank), (down_rank, width)]
    return dh, gate, up, GatedFactors(*(normal(3 + i, shape, dtype) for i, shape in enumerate(thin)))


def oracle(dh, gate, up, factors, activation):
    """(h, dgate, dup, da_down, db_gate, db_up) in fp32, the 16-bit operands of the last three rounded as they would
    be."""
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    dtype = gate.dtype
    f = GatedFactors(*(a.astype(jnp.float32) for a in factors))
    gate = gate.astype(jnp.float32) + exact(f.t, f.b_gate.T)
    up = up.astype(jnp.float32) + exact(f.t, f.b_up.T)
    h, pullback = jax.vjp(functools.partial(gated_activation_reference, activation=activation), gate, up)
    dgate, dup = pullback(dh.astype(jnp.float32) + exact(f.g, f.a_down))
    rounded = [a.astype(dtype).astype(jnp.float32) for a in (h, dgate, dup)]
    return h, dgate, dup, exact(f.g.T, rounded[0]), exact(f.t.T, rounded[1]), exact(f.t.T, rounded[2])


def assert_kernels_match(shape, dtype, activation="silu", wanted=("h", *SUMS, *LARGEST)):
    dh, gate, up, factors = arguments(*shape, dtype)
    expected = dict(zip(("h", "dgate", "dup", *SUMS), oracle(dh, gate, up, factors, activation), strict=True))
    h = jax.jit(functools.partial(lowrank_gated_forward, activation=activation))(gate, up, factors)
    assert_close(h, expected["h"], dtype=dtype, what="h")
    backward = functools.partial(lowrank_gated_backward, activation=activation, wanted=wanted)
    found = jax.jit(backward)(dh, gate, up, factors)
    for name in ("dgate", "dup"):
        largest = getattr(found, f"largest_{name}")
        assert (
            largest == jnp.max(jnp.abs(getattr(found, name)))
            if f"largest_{name}" in wanted
            else largest is None
        )
    for name in ("dgate", "dup", *(name for name in wanted if name not in LARGEST)):
        assert_close(getattr(found, name), expected[name], dtype=dtype, what=name)
    assert all(getattr(found, name) is None for name in ("h", *SUMS) if name not in wanted)


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
    assert_close(found.dgate, oracle(dh, gate, up, zeros, "silu")[1], what="dgate")


@pytest.mark.parametrize("shape", [(4096, 14336, 32, 16), (577, 1536, 6, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_an_h100(shape, dtype):
    args = jax.eval_shape(lambda: arguments(*shape, dtype))

    def both(dh, gate, up, factors):
        h = lowrank_gated_forward(gate, up, factors, activation="silu")
        return h, lowrank_gated_backward(dh, gate, up, factors, activation="silu", wanted=SUMS)

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
def test_a_rerun_is_bit_exact_on_a_gpu():
    args = arguments(shapes.TOKENS, 8192, 32, 16, "bfloat16")
    call = jax.jit(functools.partial(lowrank_gated_backward, activation="silu", wanted=SUMS))
    first, second = call(*args), call(*args)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
