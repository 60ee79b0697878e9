"""What the tuner measures of the kernels that finish the rank-r products of a gated MLP, at the size of one layer.

Backward always ends with G of gate and up, so that a kernel that sums it is compared with one that leaves it to cuBLAS.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pronghorn.pallas_kernels import shapes, tuned
from pronghorn.pallas_kernels.autotune import Job
from pronghorn.pallas_kernels.lora_linear import times
from pronghorn.pallas_kernels.lowrank_gated_activation import (
    BACKWARD_AND_LARGEST,
    GatedFactors,
    GatedGradients,
    lowrank_gated_backward,
    lowrank_gated_forward,
    lowrank_gated_reference,
)

# Read off compiled kernels for an H100, ranks 32 and 16: none of them spills, and a multiprocessor holds 8 to 32 warps.
# Several programs wait at their barriers one at a time; eight and sixteen warps pass half as many barriers as four do.
# Each run of rows costs backward a partial sum, and each strip of columns one of G: strips are wide where G is summed.
FORWARD_TILES = (
    (64, 64, 4, 1024, 1), (64, 64, 4, 512, 1), (64, 64, 4, 2048, 1), (64, 64, 4, 256, 1),
    (64, 64, 4, 512, 0), (64, 64, 4, 1024, 0), (64, 64, 4, 2048, 0),
    (64, 32, 4, 1024, 1), (64, 32, 4, 512, 1), (64, 32, 4, 2048, 1), (64, 32, 4, 1024, 0), (64, 32, 8, 1024, 1),
    (128, 32, 8, 512, 1), (128, 32, 8, 1024, 1), (128, 32, 4, 1024, 1), (256, 32, 16, 512, 1),
    (128, 64, 8, 256, 1), (128, 64, 8, 512, 1), (128, 64, 8, 1024, 1), (128, 64, 8, 512, 0),
    (64, 64, 8, 512, 1), (64, 64, 8, 1024, 1), (64, 128, 8, 512, 0), (32, 64, 4, 1024, 1), (32, 64, 4, 1024, 0),
    (32, 32, 4, 1024, 1), (32, 32, 4, 2048, 1), (64, 16, 4, 1024, 1), (128, 16, 8, 1024, 1),
    # Two warps are too few for wgmma, and nothing waits for loads that are under way before each of its products.
    (32, 32, 2, 1024, 1), (32, 32, 2, 2048, 1), (32, 32, 2, 1024, 0), (32, 32, 2, 2048, 0), (64, 32, 2, 1024, 1),
    (64, 32, 2, 1024, 0), (32, 64, 2, 1024, 0), (32, 64, 2, 1024, 1),
)  # fmt: skip
BACKWARD_TILES = (
    (32, 64, 4, 8, 1, 0, 0), (32, 64, 8, 8, 1, 0, 0), (32, 64, 8, 4, 1, 0, 0), (32, 64, 8, 7, 1, 0, 0),
    (32, 64, 8, 2, 1, 0, 0), (32, 64, 8, 16, 1, 0, 0), (32, 64, 8, 8, 0, 0, 0), (32, 64, 8, 8, 0, 1, 0),
    (32, 64, 4, 8, 1, 1, 0), (32, 64, 4, 7, 1, 1, 0), (32, 64, 4, 4, 1, 1, 0), (32, 64, 4, 8, 0, 1, 0),
    (16, 64, 4, 8, 1, 0, 0), (16, 64, 4, 8, 1, 1, 0), (16, 128, 8, 8, 1, 0, 0), (16, 128, 8, 8, 1, 1, 0),
    (32, 128, 16, 8, 1, 0, 0), (32, 128, 16, 7, 1, 0, 0), (32, 128, 16, 8, 1, 1, 0), (32, 128, 8, 8, 1, 1, 0),
    (16, 256, 16, 7, 1, 0, 0), (64, 64, 8, 8, 1, 0, 0), (64, 64, 8, 8, 0, 1, 0), (32, 32, 4, 8, 1, 0, 0),
    (32, 128, 16, 8, 1, 0, 1), (32, 128, 16, 7, 1, 0, 1), (32, 128, 16, 4, 1, 0, 1), (32, 128, 16, 8, 0, 0, 1),
    (16, 256, 16, 7, 1, 0, 1), (16, 256, 16, 4, 1, 0, 1), (16, 256, 16, 2, 1, 0, 1), (16, 256, 16, 7, 0, 0, 1),
    (16, 256, 16, 4, 0, 1, 1), (16, 256, 16, 7, 0, 1, 1), (16, 256, 8, 7, 1, 0, 1), (16, 128, 8, 8, 0, 0, 1),
    (32, 128, 8, 8, 1, 0, 1), (32, 128, 8, 8, 0, 1, 1),
)  # fmt: skip

# With maxima: 120 to 168 registers, two to four programs on a multiprocessor.
BACKWARD_AND_LARGEST_TILES = (
    (32, 64, 8, 8, 1, 0, 0), (32, 64, 8, 7, 1, 0, 0), (32, 64, 8, 4, 1, 0, 0), (32, 64, 8, 8, 0, 0, 0),
    (16, 128, 8, 8, 1, 0, 0), (16, 64, 4, 8, 0, 0, 0), (16, 64, 4, 8, 1, 0, 0), (16, 256, 16, 7, 1, 0, 0),
    (32, 128, 16, 8, 1, 0, 0), (32, 16, 2, 8, 0, 0, 0), (32, 16, 2, 8, 1, 0, 0), (64, 16, 4, 8, 1, 0, 0),
)  # fmt: skip

GRADIENTS = ("da_down", "db_gate", "db_up", "g_both")
LARGEST = ("largest_dgate", "largest_dup")


def lowrank_gated_jobs(shape: shapes.LowrankShape, dtype) -> list[Job]:
    def forward(dh, gate, up, factors):
        return lowrank_gated_forward(gate, up, factors._replace(g=None), activation="silu")

    def oracle():
        return lowrank_gated_reference(*lowrank_gated_inputs(shape, dtype), activation="silu")

    def inputs():
        return lowrank_gated_inputs(shape, dtype)

    size = shape.rows * shape.width * jnp.dtype(dtype).itemsize
    common: dict[str, Any] = {
        "key": tuned.key(dtype, shape.rank),
        "label": f"{shape.name}, [{shape.rows}, {shape.width}], ranks {shape.rank} and {shape.down_rank}",
        "arguments": inputs,
        "part": lambda found: found,
    }
    return [
        Job(
            op="lowrank_gated_forward",
            run=forward,
            expected=lambda: oracle()[:2],
            candidates=FORWARD_TILES,
            work=(3 * size / 1e12, "B"),
            **common,
        ),
        Job(
            op="lowrank_gated_backward",
            run=backward_and_g,
            expected=lambda: _named(oracle()[2], GRADIENTS),
            candidates=BACKWARD_TILES,
            work=(5 * size / 1e12, "B"),
            **common,
        ),
        Job(
            op=BACKWARD_AND_LARGEST,
            run=backward_and_largest,
            expected=lambda: _named(oracle()[2], (*GRADIENTS[:3], *LARGEST)),
            candidates=BACKWARD_AND_LARGEST_TILES,
            work=(5 * size / 1e12, "B"),
            **common,
        ),
    ]


def lowrank_gated_inputs(shape: shapes.LowrankShape, dtype) -> tuple[Any, ...]:
    """dh, gate, up and the factors."""
    rows, width, rank, down_rank = shape[1:]

    def normal(seed, size, factor=1.0):
        return (factor * jax.random.normal(jax.random.key(seed), size, jnp.float32)).astype(dtype)

    thin = [(rows, rank), (width, rank), (width, rank), (rows, down_rank), (down_rank, width)]
    factors = GatedFactors(*(normal(3 + i, size, 0.25) for i, size in enumerate(thin)))
    return (*(normal(i, (rows, width)) for i in range(3)), factors)


def _named(found: GatedGradients, names: Sequence[str]) -> tuple[jax.Array, ...]:
    return (found.dgate, found.dup, *(getattr(found, name) for name in names))


def backward_and_largest(dh, gate, up, factors):
    """dgate, dup, the sums of the adapters and what the products of an FP8 weight ask for."""
    wanted = (*GRADIENTS[:3], *LARGEST)
    found = lowrank_gated_backward(dh, gate, up, factors, activation="silu", wanted=wanted, in_place=False)
    return _named(found, wanted)


def backward_and_g(dh, gate, up, factors):
    """dgate, dup and `GRADIENTS`: G by the kernel, or as `rank_gradient` has it of cuBLAS."""
    # In place, an undonated argument would be copied first, and the copy be timed.
    found = lowrank_gated_backward(dh, gate, up, factors, activation="silu", wanted=GRADIENTS, in_place=False)
    g = found.g_both
    if g is None:
        g = times(found.dgate, factors.b_gate, jnp.float32) + times(found.dup, factors.b_up, jnp.float32)
    return found.dgate, found.dup, found.da_down, found.db_gate, found.db_up, g
