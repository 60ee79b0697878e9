"""Rows of a quantised matrix, and a matrix of such rows: for files that hold several linears as one tensor.

Codes and scales are moved, never computed anew, so every value stays. 4-bit blocks run along the rows: a cut has to
fall between two of them, which it does wherever the width is a multiple of the block. Scales that are kept in 8 bits
are grouped by 256 blocks; where a cut falls inside of a group, or parts of one matrix were quantised by themselves,
the scales become fp32, each the number that it stood for.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from pronghorn.pallas_kernels.nf4_dequantize import NESTED_BLOCK
from pronghorn.quantization.int8 import Int8Array
from pronghorn.quantization.nf4 import NF4Array

# Kinds whose rows can be moved about.
RowsArray = NF4Array | Int8Array


def cut_rows(array: RowsArray, first: int, rows: int) -> RowsArray:
    """Rows `first .. first + rows` of one matrix with numpy leaves, whose first and last element end no block early."""
    if isinstance(array, Int8Array):
        return dataclasses.replace(
            array, codes=array.codes[first : first + rows], scales=array.scales[first : first + rows]
        )
    width, size = array.matrix_shape[1], array.block_size
    start, stop = first * width, (first + rows) * width
    assert start % size == 0 and stop % size == 0
    cut = array if may_cut_nested(array, first, rows) else with_plain_scales(array)
    blocks = slice(start // size, stop // size)
    fields = {"codes": cut.codes[start // 2 : stop // 2], "absmax": cut.absmax[blocks]}
    if cut.nested:
        groups = slice(blocks.start // NESTED_BLOCK, math.ceil(blocks.stop / NESTED_BLOCK))
        fields["nested_absmax"] = cut.nested_absmax[groups]
    return dataclasses.replace(cut, **fields, matrix_shape=(rows, width))


def may_cut_nested(array: NF4Array, first: int, rows: int) -> bool:
    """Whether rows `first .. first + rows` can keep scales in 8 bits. Looks at shapes only."""
    height, width = array.matrix_shape
    group = array.block_size * NESTED_BLOCK
    ends = first + rows == height or (first + rows) * width % group == 0
    return array.nested and first * width % group == 0 and ends


def with_plain_scales(array: NF4Array) -> NF4Array:
    """The same values with fp32 scales; numpy leaves."""
    if not array.nested:
        return array
    table = np.asarray(array.nested_table)[np.asarray(array.absmax)]
    groups = np.repeat(np.asarray(array.nested_absmax), NESTED_BLOCK)[: len(table)]
    scales = (table * groups + np.float32(array.nested_offset)).astype(np.float32)
    return dataclasses.replace(
        array, absmax=scales, nested_absmax=None, nested_table=None, nested_offset=None
    )


def join_rows(arrays: list[RowsArray]) -> RowsArray | None:
    """One matrix of the rows of several, with numpy leaves; None where they are quantised in different ways."""
    first = arrays[0]
    rows_of_8_bits = [array for array in arrays if isinstance(array, Int8Array)]
    if isinstance(first, Int8Array) and len(rows_of_8_bits) == len(arrays):
        return dataclasses.replace(
            first,
            codes=np.concatenate([array.codes for array in rows_of_8_bits]),
            scales=np.concatenate([array.scales for array in rows_of_8_bits]),
        )
    parts = [array for array in arrays if isinstance(array, NF4Array)]
    ways = {(array.kind, array.block_size, array.dtype_name) for array in parts}
    whole = all(math.prod(array.matrix_shape) % array.block_size == 0 for array in parts)
    if len(parts) != len(arrays) or len(ways) != 1 or not whole:
        return None
    if not _one_nesting(parts):
        parts = [with_plain_scales(array) for array in parts]
    fields: dict[str, Any] = {
        name: np.concatenate([np.asarray(getattr(array, name)) for array in parts])
        for name in ("codes", "absmax", *["nested_absmax"] * parts[0].nested)
    }
    rows = sum(array.matrix_shape[0] for array in parts)
    return dataclasses.replace(parts[0], **fields, matrix_shape=(rows, parts[0].matrix_shape[1]))


def _one_nesting(parts: list[NF4Array]) -> bool:
    """Whether the parts' 8-bit scales are those of one matrix: one table, one offset, whole groups."""
    first = parts[0]
    if not all(array.nested for array in parts):
        return False
    same = all(
        np.array_equal(array.nested_table, first.nested_table)
        and np.array_equal(array.nested_offset, first.nested_offset)
        for array in parts
    )
    return same and all(len(array.absmax) % NESTED_BLOCK == 0 for array in parts[:-1])


__all__ = ["cut_rows", "join_rows", "may_cut_nested", "with_plain_scales"]
