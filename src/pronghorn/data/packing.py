"""Documents into rows of `max_length` tokens, each document whole and in exactly one row.

Packing is best fit, longest first (best-fit decreasing; Johnson 1974 gives at most 11/9 of the fewest rows, and real
sets fill 98 % and more). Which *lengths* share a row is decided once, so every epoch has the same number of rows: the
length of a run is known before it starts and a step can be found without replaying the epochs before it. Which
*documents* take those places, and the order of the rows, is drawn anew each epoch: documents of equal length swap
places by the epoch's permutation.
"""

import bisect
import dataclasses

import numpy as np

from pronghorn.data.permutation import permutation

_WINDOW = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class PackingPlan:
    """Rows of documents.

    Attributes:
      documents: int64[documents], document numbers, row after row.
      row_offsets: int64[rows + 1]; row r holds documents[row_offsets[r]:row_offsets[r + 1]].
    """

    documents: np.ndarray
    row_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, index: int) -> np.ndarray:
        return self.documents[self.row_offsets[index] : self.row_offsets[index + 1]]


def pack(lengths: np.ndarray, max_length: int) -> PackingPlan:
    """Best fit, longest first; ties go to the earlier document. Rows come in the order of their first document.

    A million documents at a time, which bounds the memory of this and costs a row or two each time.

    Args:
      lengths: int[documents], each from 1 to `max_length`.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= max_length:
        raise ValueError(f"lengths must be within [1, {max_length}]")
    plans = [
        _packed(lengths[start : start + _WINDOW], start, max_length)
        for start in range(0, len(lengths), _WINDOW)
    ]
    if not plans:
        return _plan([])
    counts = np.concatenate([np.diff(plan.row_offsets) for plan in plans])
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return PackingPlan(np.concatenate([plan.documents for plan in plans]), offsets)


def _packed(lengths: np.ndarray, first: int, max_length: int) -> PackingPlan:
    """The plan of one window of documents, of which the first has the number `first`."""
    rows: list[list[int]] = []
    rooms: list[int] = []  # free tokens that some row has, sorted, each once
    rows_with: dict[int, list[int]] = {}  # free tokens -> rows that have them
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[place], rows_with[room]
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(document)
        left = room - length
        if left:
            if left not in rows_with:
                bisect.insort(rooms, left)
                rows_with[left] = []
            rows_with[left].append(row)
    for documents in rows:
        documents.sort()
    rows.sort(key=lambda documents: documents[0])
    plan = _plan(rows)
    return PackingPlan(plan.documents + first, plan.row_offsets)


def one_a_row(count: int) -> PackingPlan:
    """Padding: document i alone in row i."""
    return PackingPlan(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def for_epoch(plan: PackingPlan, lengths: np.ndarray, *, seed: int, epoch: int) -> PackingPlan:
    """The plan of one epoch: documents of equal length change places, and the rows change their order.

    A pure function of its arguments; rows keep the lengths they hold, so their number does not change.
    """
    order = permutation(len(plan.documents), seed=seed, stream=2 * epoch)
    # Of the documents in the epoch's order, and of the places in row order, the k-th of each length belong together.
    drawn = order[np.argsort(lengths[order], kind="stable")]
    places = np.argsort(lengths[plan.documents], kind="stable")
    documents = np.empty_like(plan.documents)
    documents[places] = drawn
    rows = permutation(len(plan), seed=seed, stream=2 * epoch + 1)
    counts = np.diff(plan.row_offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    # Places of row r move from plan.row_offsets[r] to the offset of the row's new position.
    take = np.arange(len(documents)) + np.repeat(plan.row_offsets[:-1][rows] - offsets[:-1], counts)
    return PackingPlan(documents[take], offsets)


def efficiency(plan: PackingPlan, lengths: np.ndarray, max_length: int) -> float:
    """Share of the rows' tokens that belong to documents, in (0, 1]."""
    return float(np.sum(lengths[plan.documents]) / (len(plan) * max_length))


def _plan(rows: list[list[int]]) -> PackingPlan:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return PackingPlan(np.asarray([d for row in rows for d in row], np.int64), offsets)
