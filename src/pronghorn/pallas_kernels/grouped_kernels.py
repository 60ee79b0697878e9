"""The kernels of `grouped_products`: a tile of rows never crosses from one group into the next.

Group g has ceil(size_g / block) tiles of rows; the rows of no group are one more group, whose tiles are zeros. How many
tiles there are depends on the sizes, which only the device knows, and a grid is static: it has as many as the worst
sizes need, floor((rows + n (block − 1)) / block) for n groups that can hold a row, and those left over store nothing.
Which rows of which group a tile takes is worked out in front of the kernel, three integers a tile.

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
# Of several pairs: two loops of a tile twice as wide spill 500 bytes a thread.
OF_PAIRS = {2: (128, 128, 64, 4, 3, 8), 4: BLOCK[4]}
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
    most = Blocks(*(OF_PAIRS[width] if pairs > 1 else tuned.choice(op, dtype, columns) or usual))
    m, n, k = (
        min(block, max(16, launch.next_power_of_2(size)))
        for block, size in zip(most[:3], (rows, columns, inner), strict=True)
    )
    stages = most.stages
    while stages > 1 and shared_memory_bytes(most._replace(m=m, n=n, k=k, stages=stages), dtype) > (
        shared_memory_limit()
    ):
        stages -= 1
    # Not fewer than four where one side is a rank: the tile is small then, and what it reads is not.
    return Blocks(m, n, k, min(most.warps, max(4, m * n // 2048)), stages, most.together)


def shared_memory_bytes(block: Blocks, dtype) -> int:
    """What the tiles that are loaded ahead take."""
    return block.stages * (block.m + block.n) * block.k * jnp.dtype(dtype).itemsize


def _tile_of_program(program, row_tile_count, column_tile_count, together):
    """(tile of rows, tile of columns) of a program, `together` tiles of rows beside each other."""
    side_by_side = together * column_tile_count
    first = program // side_by_side * together
    here = jnp.minimum(row_tile_count - first, together)
    return first + program % side_by_side % here, program % side_by_side // here


def _load(ref, *indices, mask):
    """A tile; with a mask of None all of it exists."""
    place = ref.at[indices]
    return triton.load(place) if mask is None else triton.load(place, mask=mask, other=0.0)


def _both(a, b):
    """a & b, where None is all true."""
    return b if a is None else a if b is None else a & b


def _product_kernel(tiles_ref, *rest, blocks, pairs, parts, rank, padded_rank, biased, transposed, native):
    """One tile of Y: the products of `pairs` pairs, then the low-rank part and the bias on top of them."""
    *others, y_ref = rest
    operands, others = others[: 2 * pairs], others[2 * pairs :]
    block_m, block_n, block_k = blocks[:3]
    rows_of_x, inner = operands[0].shape[0], operands[0].shape[1] // parts
    width, groups = y_ref.shape[1] // parts, operands[1].shape[0]
    column_tiles = launch.cdiv(width, block_n)
    row_tile, column_tile = _tile_of_program(
        pl.program_id(0), tiles_ref.shape[0], parts * column_tiles, blocks.together
    )
    part, column_tile = (
        (column_tile // column_tiles, column_tile % column_tiles) if parts > 1 else (0, column_tile)
    )
    group, first, end = (tiles_ref[row_tile, field] for field in range(3))
    real = group < groups
    group = jnp.minimum(group, groups - 1)
    rows = first + jnp.arange(block_m)
    columns = column_tile * block_n + jnp.arange(block_n)
    there = jnp.minimum(rows, rows_of_x - 1)[:, None]
    column_exists: Any = None if width % block_n == 0 else columns < width

    def tile(rows_ref, matrix_ref, at, size, whole, *, left_first=0, right_first=0, wanted=column_exists):
        """The part of a sum over the indices `at`, those below `size`, counted from the first of each operand."""
        exists: Any = None if whole else at < size
        left = _load(rows_ref, there, (left_first + at)[None, :], mask=None if whole else exists[None, :])
        if transposed:
            masks = (None if wanted is None else wanted[:, None], None if whole else exists[None, :])
            right = _load(matrix_ref, group, columns[:, None], at[None, :], mask=_both(*masks))
        else:
            masks = (None if wanted is None else wanted[None, :], None if whole else exists[:, None])
            right = _load(
                matrix_ref, group, (right_first + at)[:, None], columns[None, :], mask=_both(*masks)
            )
        return tile_product(left, right, ROWS_BY_ROWS if transposed else ROWS_BY_COLUMNS, native=native)

    def step(i, total, x_ref, w_ref):
        at = i * block_k + jnp.arange(block_k)
        firsts = {"left_first": part * inner, "right_first": part * inner}
        return total + tile(x_ref, w_ref, at, inner, inner % block_k == 0, **firsts)

    def lowrank_parts(count):
        """(part, which columns are of it) of each that P holds beside each other and this tile has columns of."""
        of_part = width // count
        if count == 1 or of_part % block_n == 0:
            return [(column_tile * block_n // of_part if count > 1 else 0, column_exists)]
        return [(p, (columns >= p * of_part) & (columns < (p + 1) * of_part)) for p in range(count)]

    inside = _both((rows < end)[:, None], None if column_exists is None else column_exists[None, :])

    def store(total):
        place = y_ref.at[rows[:, None], (part * width + columns)[None, :]]
        triton.store(place, total.astype(y_ref.dtype), mask=inside)

    # Tiles left over store nothing. The loop always has its steps: where it could have none, ptxas joins its registers
    # with zeros, and either waits after every product or, worse, rounds the sums before the last products are there
    # (benchmarks/machine_code.py shows both).
    @pl.when(real & (first < end))
    def _multiply():
        total = jnp.zeros((block_m, block_n), jnp.float32)
        for pair in range(pairs):
            of_pair = functools.partial(step, x_ref=operands[2 * pair], w_ref=operands[2 * pair + 1])
            total = jax.lax.fori_loop(0, launch.cdiv(inner, block_k), of_pair, total)
        if rank:
            p_ref, q_ref = others[:2]
            at, whole = jnp.arange(padded_rank), rank == padded_rank
            for p, wanted in lowrank_parts(p_ref.shape[1] // rank):
                total += tile(p_ref, q_ref, at, rank, whole, left_first=p * rank, wanted=wanted)
        if biased:
            bias = _load(others[-1], group, columns, mask=column_exists)
            total += bias.astype(jnp.float32)[None, :]
        store(total)

    @pl.when(jnp.logical_not(real))
    def _of_no_group():
        store(jnp.zeros((block_m, block_n), jnp.float32))


def product(pairs, group_sizes, lowrank, bias, dtype, *, transposed: bool, parts: int = 1):
    """`by_rows` of one pair (x, weight) where transposed, else `by_columns`: the sum over the pairs."""
    x, weight = pairs[0]
    rows, inner = x.shape[0], x.shape[1] // parts
    width = weight.shape[1 if transposed else 2]
    op = "grouped_by_rows" if transposed else "grouped_by_columns"
    block = blocks(op, x.dtype, rows, width, inner, pairs=len(pairs))
    tiles = row_tiles(group_sizes, rows, block.m)
    operands, rank = [tiles, *(array for pair in pairs for array in pair)], 0
    if lowrank is not None:
        operands += lowrank
        rank = lowrank.matrices.shape[2 if transposed else 1]
    if bias is not None:
        operands.append(bias)
    kernel = functools.partial(
        _product_kernel,
        blocks=block,
        pairs=len(pairs),
        parts=parts,
        rank=rank,
        padded_rank=max(16, launch.next_power_of_2(rank)),
        biased=bias is not None,
        transposed=transposed,
        native=not launch.interpreting(),
    )
    return launch.pallas_call(
        kernel,
        name=op,
        grid=(tiles.shape[0] * parts * launch.cdiv(width, block.n),),
        out_shape=jax.ShapeDtypeStruct((rows, parts * width), dtype),
        num_warps=block.warps,
        num_stages=block.stages,
    )(*operands)


def _over_rows_kernel(bounds_ref, a_ref, b_ref, d_ref, *, blocks, parts, native):
    """One tile of D of one group."""
    block_m, block_n, block_k = blocks[:3]
    a_width, b_width = d_ref.shape[1] // parts, d_ref.shape[2]
    tiles_of_part = launch.cdiv(a_width, block_m)
    a_tiles = parts * tiles_of_part
    b_tiles = launch.cdiv(b_width, block_n)
    group = pl.program_id(0) // (a_tiles * b_tiles)
    first, end = bounds_ref[group, 0], bounds_ref[group, 1]
    a_tile, b_tile = _tile_of_program(
        pl.program_id(0) % (a_tiles * b_tiles), a_tiles, b_tiles, blocks.together
    )
    part, a_tile = (a_tile // tiles_of_part, a_tile % tiles_of_part) if parts > 1 else (0, a_tile)
    a_columns = a_tile * block_m + jnp.arange(block_m)
    b_columns = b_tile * block_n + jnp.arange(block_n)

    def load(ref, rows, columns, width, block, whole):
        exists: Any = None if whole else (rows < end)[:, None]
        if width % block:
            exists = _both(exists, (columns < width)[None, :])
        return _load(ref, rows[:, None], (part * width + columns)[None, :], mask=exists)

    def step(i, total, whole):
        rows = first + i * block_k + jnp.arange(block_k)
        a = load(a_ref, rows, a_columns, a_width, block_m, whole)
        b = load(b_ref, rows, b_columns, b_width, block_n, whole)
        return total + tile_product(a, b, COLUMNS_BY_COLUMNS, native=native)

    # Only the last step of a group holds rows of the next one: the others load without a mask.
    whole_steps = (end - first) // block_k
    total = jnp.zeros((block_m, block_n), jnp.float32)
    total = jax.lax.fori_loop(0, whole_steps, functools.partial(step, whole=True), total)
    steps = launch.cdiv(end - first, block_k)
    total = jax.lax.fori_loop(whole_steps, steps, functools.partial(step, whole=False), total)
    inside = (a_columns < a_width)[:, None] & (b_columns < b_width)[None, :]
    place = d_ref.at[group, (part * a_width + a_columns)[:, None], b_columns[None, :]]
    triton.store(place, total.astype(d_ref.dtype), mask=inside)


def over_rows(a, b, group_sizes, dtype, *, parts: int = 1):
    """`grouped_products.over_rows`."""
    shape = (group_sizes.shape[0], a.shape[1] // parts, b.shape[1] // parts)
    block = blocks("grouped_over_rows", a.dtype, shape[1], shape[2], a.shape[0])
    ends = _running_sums(group_sizes)
    return launch.pallas_call(
        functools.partial(_over_rows_kernel, blocks=block, parts=parts, native=not launch.interpreting()),
        name="grouped_over_rows",
        grid=(shape[0] * parts * launch.cdiv(shape[1], block.m) * launch.cdiv(shape[2], block.n),),
        out_shape=jax.ShapeDtypeStruct((shape[0], a.shape[1], shape[2]), dtype),
        num_warps=block.warps,
        num_stages=block.stages,
    )(jnp.stack([ends - group_sizes, ends], axis=-1), a, b)
