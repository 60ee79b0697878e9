"""The kernels of `grouped_products`: a tile of rows never crosses from one group into the next.

Group g has ceil(size_g / block) tiles of rows; the rows of no group are one more group, whose tiles are zeros. How many
tiles there are depends on the sizes, which only the device knows, and a grid is static: it has as many as the worst
sizes need, floor((rows + n (block − 1)) / block) for n groups that can hold a row, and those left over store nothing.
Which rows of which group a tile takes is worked out in front of the kernel, three integers a tile.

Rows may be read through an index, x[index[row]]: one more load in front of a loop over columns, and one in each step of
a loop over rows. Copies of rows that several groups read are never written then, and are found in the L2 cache.

The last tile of a group reads rows of the next one, and keeps what came of them to itself: each row of a product
depends on its own row alone. Over rows it would not, so there rows past the group's end are loaded as zeros.

Tiles run some tiles of rows at a time across all columns, so that a matrix and the rows are found in the L2 cache.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.pallas_kernels import launch, tuned
from pronghorn.pallas_kernels.attention_blocks import shared_memory_limit
from pronghorn.pallas_kernels.tile_operations import (
    COLUMNS_BY_COLUMNS,
    ROWS_BY_COLUMNS,
    ROWS_BY_ROWS,
    tile_product,
)

# What `tuned` may replace: rows, columns and summed elements of a tile, warps, stages, and how many tiles of rows run
# beside each other; in 16 bits and in 32.
BLOCK = {2: (128, 256, 64, 8, 4, 8), 4: (64, 64, 32, 4, 2, 8)}
# Of two pairs, whose tiles are loaded beside each other: half as many summed elements take the same shared memory.
OF_PAIRS = {2: (128, 256, 32, 8, 4, 8), 4: (64, 64, 16, 4, 2, 8)}
PAIRS_NAME = "grouped_by_columns_of_pairs"
# Where one side is a rank: a program reads much and multiplies little, and several of them wait for memory at a time.
NARROW_SIDE = 64
NARROW = {
    "grouped_by_rows": (64, 64, 128, 4, 3, 8),
    "grouped_by_columns": (64, 64, 128, 4, 3, 8),
    "grouped_over_rows": (256, 256, 64, 4, 2, 1024),
}
# Over rows all tiles of A go by first: those of B, the wider operand of a weight's gradient, stay in the cache.
OVER_ROWS_TOGETHER = 1024


class Blocks(NamedTuple):
    """Rows, columns and summed elements of a tile, warps, stages, and tiles of rows beside each other."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    together: int


def row_count(x: jax.Array, index: jax.Array | None) -> int:
    """How many rows a product has: those of x, or as many as it is read through an index."""
    return x.shape[0] if index is None else index.shape[0]


def tile_bound(rows: int, groups: int, block: int) -> int:
    """The most tiles that any sizes of the groups, and of the rows left over, need."""
    return (rows + min(groups + 1, rows) * (block - 1)) // block


def _running_sums(sizes: jax.Array) -> jax.Array:
    """cumsum of a few integers as one reduction, where XLA's own on a GPU is several launches."""
    place = jnp.arange(sizes.shape[0])
    return jnp.sum(jnp.where(place[None, :] <= place[:, None], sizes[None, :], 0), axis=1, dtype=jnp.int32)


def row_tiles(group_sizes: jax.Array, rows: int, block: int) -> jax.Array:
    """int32 [tile_bound, 3]: group, first row and end of the group's rows; it is `groups` for rows of none."""
    groups = group_sizes.shape[0]
    sizes = jnp.append(group_sizes, rows - jnp.sum(group_sizes))
    ends = _running_sums(sizes)
    last_tiles = _running_sums(launch.cdiv(sizes, block))
    tile = jnp.arange(tile_bound(rows, groups, block))
    # One pass over tiles x groups: XLA fuses it with what follows, which it does not with a binary search.
    group = jnp.minimum(jnp.sum(last_tiles[None, :] <= tile[:, None], axis=1, dtype=jnp.int32), groups)
    # Counted back from the group's last tile; past the last tile of all this lies past the end, and nothing is stored.
    first_tile = last_tiles[group] - launch.cdiv(sizes, block)[group]
    first = (ends - sizes)[group] + (tile - first_tile) * block
    return jnp.stack([group, first, ends[group]], axis=-1).astype(jnp.int32)


def blocks(op: str, dtype, rows: int, columns: int, inner: int, *, pairs: int = 1) -> Blocks:
    """A tile no larger than the product, within shared memory."""
    width = jnp.dtype(dtype).itemsize
    usual = BLOCK[width]
    if op == "grouped_over_rows":
        usual = (*usual[:5], OVER_ROWS_TOGETHER)
    narrow = columns if op != "grouped_over_rows" else min(rows, columns)
    if pairs > 1:
        op, usual = PAIRS_NAME, OF_PAIRS[width]
    with_rank = pairs == 1 and width == 2 and narrow <= NARROW_SIDE
    most = Blocks(*(NARROW[op] if with_rank else tuned.choice(op, dtype, columns) or usual))
    m, n, k = (
        min(block, max(16, launch.next_power_of_2(size)))
        for block, size in zip(most[:3], (rows, columns, inner), strict=True)
    )
    stages = most.stages
    while stages > 1 and shared_memory_bytes(
        most._replace(m=m, n=n, k=k, stages=stages), dtype, pairs=pairs
    ) > (shared_memory_limit()):
        stages -= 1
    # Not fewer than four where one side is a rank: the tile is small then, and what it reads is not.
    return Blocks(m, n, k, min(most.warps, max(4, m * n // 2048)), stages, most.together)


def shared_memory_bytes(block: Blocks, dtype, *, pairs: int = 1) -> int:
    """What the tiles that are loaded ahead take."""
    return pairs * block.stages * (block.m + block.n) * block.k * jnp.dtype(dtype).itemsize


def _tile_of_program(program, row_tile_count, column_tile_count, together):
    """(tile of rows, tile of columns) of a program, `together` tiles of rows beside each other."""
    side_by_side = together * column_tile_count
    first = program // side_by_side * together
    here = jnp.minimum(row_tile_count - first, together)
    return first + program % side_by_side % here, program % side_by_side // here


def _load(ref, *indices, mask):
    """A tile; with a mask of None all of it exists."""
    place = ref.at[indices]
    zero = jnp.zeros((), ref.dtype)
    return triton.load(place) if mask is None else triton.load(place, mask=mask, other=zero)


def _both(a, b):
    """a & b, where None is all true."""
    return b if a is None else a if b is None else a & b


def _product_kernel(tiles_ref, *rest, blocks, pairs, rank, padded_rank, biased, indexed, transposed, native):
    """One tile of Y: the products of `pairs` pairs, then the low-rank part and the bias on top of them."""
    *others, y_ref = rest
    index_ref, others = (others[0], others[1:]) if indexed else (None, others)
    operands, others = others[: 2 * pairs], others[2 * pairs :]
    block_m, block_n, block_k = blocks[:3]
    inner = operands[0].shape[1]
    row_count, width = y_ref.shape
    groups = operands[1].shape[0]
    row_tile, column_tile = _tile_of_program(
        pl.program_id(0), tiles_ref.shape[0], launch.cdiv(width, block_n), blocks.together
    )
    group, first, end = (tiles_ref[row_tile, field] for field in range(3))
    real = group < groups
    group = jnp.minimum(group, groups - 1)
    rows = first + jnp.arange(block_m)
    columns = column_tile * block_n + jnp.arange(block_n)
    there = jnp.minimum(rows, row_count - 1)
    source = there if index_ref is None else triton.load(index_ref.at[there])
    column_exists: Any = None if width % block_n == 0 else columns < width

    def tile(rows_ref, matrix_ref, at, size, whole, rows_at):
        """The part of a sum over the indices `at`, those below `size`, of the rows `rows_at`."""
        exists: Any = None if whole else at < size
        left = _load(rows_ref, rows_at[:, None], at[None, :], mask=None if whole else exists[None, :])
        if transposed:
            masks = (
                None if column_exists is None else column_exists[:, None],
                None if whole else exists[None, :],
            )
            right = _load(matrix_ref, group, columns[:, None], at[None, :], mask=_both(*masks))
        else:
            masks = (
                None if column_exists is None else column_exists[None, :],
                None if whole else exists[:, None],
            )
            right = _load(matrix_ref, group, at[:, None], columns[None, :], mask=_both(*masks))
        return tile_product(left, right, ROWS_BY_ROWS if transposed else ROWS_BY_COLUMNS, native=native)

    def step(i, total):
        at = i * block_k + jnp.arange(block_k)
        for x_ref, w_ref in zip(operands[::2], operands[1::2], strict=True):
            total += tile(x_ref, w_ref, at, inner, inner % block_k == 0, source)
        return total

    inside = _both((rows < end)[:, None], None if column_exists is None else column_exists[None, :])

    def store(total):
        triton.store(y_ref.at[rows[:, None], columns[None, :]], total.astype(y_ref.dtype), mask=inside)

    # Tiles left over store nothing. The loop always has its steps: where it could have none, ptxas joins its registers
    # with zeros, and either waits after every product or, worse, rounds the sums before the last products are there
    # (benchmarks/machine_code.py shows both).
    @pl.when(real & (first < end))
    def _multiply():
        total = jnp.zeros((block_m, block_n), jnp.float32)
        total = jax.lax.fori_loop(0, launch.cdiv(inner, block_k), step, total)
        if rank:
            p_ref, q_ref = others[:2]
            total += tile(p_ref, q_ref, jnp.arange(padded_rank), rank, rank == padded_rank, there)
        if biased:
            bias = _load(others[-1], group, columns, mask=column_exists)
            total += bias.astype(jnp.float32)[None, :]
        store(total)

    @pl.when(jnp.logical_not(real))
    def _of_no_group():
        store(jnp.zeros((block_m, block_n), jnp.float32))


def product(pairs, group_sizes, lowrank, bias, index, dtype, *, transposed: bool):
    """`by_rows` of one pair (x, weight) where transposed, else `by_columns`: the sum over the pairs."""
    x, weight = pairs[0]
    rows, inner = row_count(x, index), x.shape[1]
    width = weight.shape[1 if transposed else 2]
    op = "grouped_by_rows" if transposed else "grouped_by_columns"
    block = blocks(op, x.dtype, rows, width, inner, pairs=len(pairs))
    tiles = row_tiles(group_sizes, rows, block.m)
    operands, rank = [tiles, *([] if index is None else [index]), *(a for pair in pairs for a in pair)], 0
    if lowrank is not None:
        operands += lowrank
        rank = lowrank.rows.shape[1]
    if bias is not None:
        operands.append(bias)
    kernel = functools.partial(
        _product_kernel,
        blocks=block,
        pairs=len(pairs),
        rank=rank,
        padded_rank=max(16, launch.next_power_of_2(rank)),
        biased=bias is not None,
        indexed=index is not None,
        transposed=transposed,
        native=not launch.interpreting(),
    )
    return launch.pallas_call(
        kernel,
        name=op,
        grid=(tiles.shape[0] * launch.cdiv(width, block.n),),
        out_shape=jax.ShapeDtypeStruct((rows, width), dtype),
        num_warps=block.warps,
        num_stages=block.stages,
    )(*operands)


def _over_rows_kernel(bounds_ref, *rest, indexed, blocks, native):
    """One tile of D of one group."""
    *indices, a_ref, b_ref, d_ref = rest
    of_a, of_b = (indices.pop(0) if yes else None for yes in indexed)
    block_m, block_n, block_k = blocks[:3]
    _, a_width, b_width = d_ref.shape
    a_tiles = launch.cdiv(a_width, block_m)
    b_tiles = launch.cdiv(b_width, block_n)
    group = pl.program_id(0) // (a_tiles * b_tiles)
    first, end = bounds_ref[group, 0], bounds_ref[group, 1]
    a_tile, b_tile = _tile_of_program(
        pl.program_id(0) % (a_tiles * b_tiles), a_tiles, b_tiles, blocks.together
    )
    a_columns = a_tile * block_m + jnp.arange(block_m)
    b_columns = b_tile * block_n + jnp.arange(block_n)

    def load(ref, index_ref, rows, columns, width, block, whole):
        exists: Any = None if whole else (rows < end)[:, None]
        if index_ref is not None:
            rows = _load(index_ref, rows, mask=None if whole else rows < end)
        if width % block:
            exists = _both(exists, (columns < width)[None, :])
        return _load(ref, rows[:, None], columns[None, :], mask=exists)

    def step(i, total, whole):
        rows = first + i * block_k + jnp.arange(block_k)
        a = load(a_ref, of_a, rows, a_columns, a_width, block_m, whole)
        b = load(b_ref, of_b, rows, b_columns, b_width, block_n, whole)
        return total + tile_product(a, b, COLUMNS_BY_COLUMNS, native=native)

    # Only the last step of a group holds rows of the next one: the others load without a mask.
    whole_steps = (end - first) // block_k
    total = jnp.zeros((block_m, block_n), jnp.float32)
    total = jax.lax.fori_loop(0, whole_steps, functools.partial(step, whole=True), total)
    steps = launch.cdiv(end - first, block_k)
    total = jax.lax.fori_loop(whole_steps, steps, functools.partial(step, whole=False), total)
    inside = (a_columns < a_width)[:, None] & (b_columns < b_width)[None, :]
    triton.store(
        d_ref.at[group, a_columns[:, None], b_columns[None, :]], total.astype(d_ref.dtype), mask=inside
    )


def over_rows(a, b, group_sizes, a_index, b_index, dtype):
    """`grouped_products.over_rows`."""
    shape = (group_sizes.shape[0], a.shape[1], b.shape[1])
    block = blocks("grouped_over_rows", a.dtype, shape[1], shape[2], row_count(a, a_index))
    indices = [index for index in (a_index, b_index) if index is not None]
    ends = _running_sums(group_sizes)
    return launch.pallas_call(
        functools.partial(
            _over_rows_kernel,
            indexed=(a_index is not None, b_index is not None),
            blocks=block,
            native=not launch.interpreting(),
        ),
        name="grouped_over_rows",
        grid=(shape[0] * launch.cdiv(shape[1], block.m) * launch.cdiv(shape[2], block.n),),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        num_warps=block.warps,
        num_stages=block.stages,
    )(jnp.stack([ends - group_sizes, ends], axis=-1), *indices, a, b)
