"""What the tuner measures of the kernels that finish the rank-r products of a gated MLP, at the size of one layer.

Backward always ends with G of gate and up, so that a kernel that sums it is compared with one that leaves it to cuBLAS.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pronghorn.pallas_kernels import shapes, tuned
from pronghorn.pallas_kernels.autotune import Job
from pronghorn.pallas_kernels.lora_linear import times
from pronghorn.pallas_kernels.lowrank_gated_activation import (
    GatedFactors,
    lowrank_gated_backward,
    lowrank_gated_forward,
    lowrank_gated_reference,
)

# Read off compiled kernels for an H100, ranks 32 and 16: none of them spills, and a multiprocessor holds 8 to 24 warps.
# Tiles under way into shared memory cost no register: a program passes 3 to 5 barriers a tile, and 5 to 7 with eight
# warps. Forward reads B and A again with each tile, half as often a row of gate where a tile has twice the rows. Each
# run of rows costs backward a partial sum, and each strip of columns one of G: strips are wide where G is summed.
FORWARD_TILES = (
    (64, 64, 4, 1024, 3), (64, 64, 4, 512, 3), (64, 64, 4, 2048, 3), (64, 64, 4, 256, 3), (64, 64, 4, 384, 3),
    (64, 64, 4, 1024, 2), (64, 64, 4, 512, 2), (64, 64, 4, 1024, 1), (64, 64, 4, 512, 4), (64, 64, 4, 256, 4),
    (64, 32, 4, 1024, 3), (64, 32, 4, 512, 3), (64, 32, 4, 2048, 3), (64, 32, 4, 512, 4), (64, 32, 4, 1024, 2),
    (128, 32, 8, 256, 3), (128, 32, 8, 512, 3), (128, 32, 8, 1024, 3), (128, 32, 8, 256, 4), (128, 32, 8, 512, 2),
    (128, 32, 4, 512, 3), (128, 16, 4, 512, 3), (128, 16, 4, 1024, 3), (64, 64, 8, 512, 3), (64, 64, 8, 256, 3),
    (128, 64, 8, 256, 3), (128, 64, 16, 128, 3), (128, 64, 16, 256, 3), (32, 64, 4, 1024, 3), (32, 64, 4, 2048, 3),
    (32, 32, 4, 1024, 3), (32, 32, 4, 2048, 3),
)  # fmt: skip
BACKWARD_TILES = (
    (16, 64, 4, 4, 3, 0, 0), (16, 64, 4, 7, 3, 0, 0), (16, 64, 4, 8, 3, 0, 0), (16, 64, 4, 2, 3, 0, 0),
    (16, 64, 4, 4, 4, 0, 0), (16, 64, 4, 8, 4, 0, 0), (16, 64, 4, 4, 2, 0, 0), (16, 64, 4, 8, 1, 0, 0),
    (32, 64, 8, 4, 3, 0, 0), (32, 64, 8, 7, 3, 0, 0), (32, 64, 8, 8, 3, 0, 0), (32, 64, 8, 2, 3, 0, 0),
    (32, 64, 8, 4, 4, 0, 0), (32, 64, 8, 8, 2, 0, 0), (32, 64, 4, 4, 3, 0, 0), (32, 64, 4, 8, 3, 0, 0),
    (16, 128, 8, 4, 3, 0, 0), (16, 128, 8, 8, 3, 0, 0), (16, 128, 8, 8, 4, 0, 0), (16, 128, 8, 8, 2, 0, 0),
    (32, 128, 16, 4, 3, 0, 0), (32, 128, 16, 7, 3, 0, 0), (32, 32, 4, 4, 3, 0, 0), (32, 32, 4, 8, 3, 0, 0),
    (16, 64, 4, 4, 3, 1, 0), (16, 128, 8, 8, 3, 1, 0), (32, 128, 16, 7, 3, 0, 1), (32, 128, 16, 4, 3, 0, 1),
)  # fmt: skip

GRADIENTS = ("da_down", "db_gate", "db_up", "g_both")


def lowrank_gated_jobs(shape: shapes.LowrankShape, dtype) -> list[Job]:
    def forward(dh, gate, up, factors):
        return lowrank_gated_forward(gate, up, factors._replace(g=None), activation="silu")

    def oracle():
        return lowrank_gated_reference(*lowrank_gated_inputs(shape, dtype), activation="silu")

    def inputs():
        return lowrank_gated_inputs(shape, dtype)

    def expected_gradients():
        found = oracle()[2]
        return (found.dgate, found.dup, *(getattr(found, name) for name in GRADIENTS))

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
            expected=expected_gradients,
            candidates=BACKWARD_TILES,
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


def backward_and_g(dh, gate, up, factors):
    """dgate, dup and `GRADIENTS`: G by the kernel, or as `rank_gradient` has it of cuBLAS."""
    # In place, an undonated argument would be copied first, and the copy be timed.
    found = lowrank_gated_backward(dh, gate, up, factors, activation="silu", wanted=GRADIENTS, in_place=False)
    g = found.g_both
    if g is None:
        g = times(found.dgate, factors.b_gate, jnp.float32) + times(found.dup, factors.b_up, jnp.float32)
    return found.dgate, found.dup, found.da_down, found.db_gate, found.db_up, g
