"""What the tuner measures of the products of rows sorted by group: each kernel, at the sizes of two mixtures.

Groups get unequal shares of the rows, as a router's choices do: tiles that are not full cost what they cost.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pronghorn.pallas_kernels import grouped_kernels, grouped_products, shapes, tuned
from pronghorn.pallas_kernels.attention_blocks import over_shared_memory
from pronghorn.pallas_kernels.autotune import Job

# Rows, columns and summed elements of a tile, warps, stages, tiles of rows beside each other. One program of eight
# warps a multiprocessor with three or four tiles ahead, or two of four, of which one multiplies while the other stores;
# 64 rows waste less of a small group's last tile.
PRODUCT = (
    (128, 256, 64, 8, 4, 8), (128, 256, 64, 8, 3, 8), (128, 256, 64, 8, 4, 16), (128, 256, 64, 8, 4, 4),
    (128, 256, 64, 8, 4, 1024), (256, 128, 64, 8, 4, 8), (128, 128, 64, 4, 3, 8), (64, 256, 64, 4, 4, 16),
    (64, 256, 64, 4, 2, 16), (64, 128, 64, 4, 4, 16), (128, 128, 128, 8, 3, 8),
)  # fmt: skip
OVER_ROWS = (
    (128, 256, 64, 8, 4, 1024), (128, 256, 64, 8, 3, 1024), (128, 256, 64, 8, 4, 8), (256, 128, 64, 8, 4, 8),
    (256, 128, 64, 8, 3, 1024), (128, 128, 64, 4, 3, 1024), (128, 128, 64, 4, 3, 8), (128, 128, 32, 4, 4, 8),
    (64, 256, 64, 4, 2, 16), (128, 128, 64, 8, 4, 8),
)  # fmt: skip

# Each step loads the tiles of two pairs.
PAIRS = (
    (128, 256, 32, 8, 4, 8), (128, 256, 32, 8, 4, 4), (128, 256, 32, 8, 4, 16), (128, 256, 32, 8, 3, 8),
    (128, 256, 64, 8, 2, 8), (128, 128, 64, 4, 3, 8), (128, 128, 64, 8, 3, 8), (128, 128, 32, 4, 4, 8),
    (256, 128, 32, 8, 4, 8),
)  # fmt: skip

CANDIDATES = {
    "grouped_by_rows": PRODUCT,
    "grouped_by_columns": PRODUCT,
    grouped_kernels.PAIRS_NAME: PAIRS,
    "grouped_over_rows": OVER_ROWS,
}


def grouped_linear_jobs(shape: shapes.RoutedShape, dtype) -> list[Job]:
    """Y = X W_gᵀ, dX = dY W_g and dW_g = Σ dYᵀ X. The oracle is XLA, of every row with every group in fp32 sums.

    What is compared are the first rows of the first groups' product, and the first group's gradient, so that the
    oracle's time stays small.
    """
    rows, groups, inputs, outputs = shape[1:]
    sizes, some = shape.sizes, min(2, groups)
    compared = int(sizes[:some].sum())

    def normal(seed, size, factor=1.0):
        return (factor * jax.random.normal(jax.random.key(seed), size, jnp.float32)).astype(dtype)

    def arguments():
        weight = normal(1, (groups, outputs, inputs), inputs**-0.5)
        return normal(0, (rows, inputs)), weight, normal(2, (rows, outputs)), jnp.asarray(sizes)

    def first_groups():
        x, weight, dy, group_sizes = arguments()
        return x[:compared], weight[:some], dy[:compared], group_sizes[:some]

    def by_rows(implementation, x, weight, dy, group_sizes):
        return grouped_products.by_rows(x, weight, group_sizes, implementation=implementation)

    def by_columns(implementation, x, weight, dy, group_sizes):
        return grouped_products.by_columns(dy, weight, group_sizes, implementation=implementation)

    def pair_arguments():
        """Two layers of one input, of half as many outputs each: the work and the sums are the same."""
        _, weight, dy, group_sizes = arguments()
        pairs = zip(jnp.split(dy, 2, axis=1), jnp.split(weight, 2, axis=1), strict=True)
        return tuple(pairs), group_sizes

    def of_pairs(implementation, pairs, group_sizes):
        (dy, weight), *more = pairs
        return grouped_products.by_columns(dy, weight, group_sizes, more=more, implementation=implementation)

    def over_rows(implementation, x, weight, dy, group_sizes):
        return grouped_products.over_rows(dy, x, group_sizes, dtype=dtype, implementation=implementation)

    products: dict[str, Callable[..., jax.Array]] = {
        "grouped_by_rows": by_rows,
        "grouped_by_columns": by_columns,
        grouped_kernels.PAIRS_NAME: of_pairs,
        "grouped_over_rows": over_rows,
    }

    def expected(op):
        same_sums = by_columns if op == grouped_kernels.PAIRS_NAME else products[op]
        return same_sums("xla", *first_groups())

    widths = dict.fromkeys(CANDIDATES, inputs) | {"grouped_by_rows": outputs}
    return [
        Job(
            op=op,
            key=tuned.key(dtype, widths[op]),
            label=f"{shape.name}, {rows} rows x [{groups}, {outputs}, {inputs}]",
            arguments=pair_arguments if op == grouped_kernels.PAIRS_NAME else arguments,
            run=functools.partial(product, "pallas"),
            expected=functools.partial(expected, op),
            part=functools.partial(_first, some if op == "grouped_over_rows" else compared),
            candidates=CANDIDATES[op],
            work=(2.0 * rows * inputs * outputs / 1e12, "FLOP"),
            too_large=functools.partial(_too_large, dtype, 2 if op == grouped_kernels.PAIRS_NAME else 1),
        )
        for op, product in products.items()
    ]


def _first(count: int, found: jax.Array) -> jax.Array:
    return found[:count]


def _too_large(dtype, pairs: int, choice: tuned.Choice) -> str | None:
    block = grouped_kernels.Blocks(*choice)
    return over_shared_memory(grouped_kernels.shared_memory_bytes(block, dtype, pairs=pairs))
