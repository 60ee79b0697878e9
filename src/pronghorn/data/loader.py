"""`Loader`: batches by step number. The step is its whole state, so a resumed run sees the very same batches."""

import functools
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from pronghorn.data import packing as packing_
from pronghorn.data.dataset import IGNORED_LABEL, Dataset, MixedDataset
from pronghorn.data.mixture import Interleaving
from pronghorn.data.permutation import derived_seed
from pronghorn.errors import InputError, RunError

Batch = dict[str, np.ndarray]


class Loader:
    """Static batches of a tokenised data set, epoch after epoch.

    A batch is {"input_ids", "labels", "segment_ids", "positions"}, each int32[micro_batches, batch_size, max_length].
    Labels are aligned with input_ids (-100: not in the loss); segment ids count documents from 1 in each row, 0 is
    padding; positions start at 0 in each document. Every document occurs once an epoch; the last batch of an epoch is
    filled with empty rows (all padding), never with repeated or dropped ones. Where documents have weights there is
    "weights" too, float32 and aligned with the labels.

    A mixture is an endless stream of rows, each of documents of one part; how often a part comes is its share, and each
    part goes through its documents epoch after epoch. What is called an epoch has as many rows as all parts together.

    Args:
      dataset: from `tokenize_rows`, no document longer than `max_length`.
      batch_size: rows in a micro-batch.
      micro_batches: micro-batches in a step; 4 of 2 rows and 1 of 8 hold the same rows in the same order.
      max_length: tokens in a row.
      packing: several documents in a row, else one.
      seed: decides the order of each epoch.
      shuffle: False keeps the order of the data set in every epoch (evaluation).
      length_buckets: for packing=False, shorter row lengths that a batch may have when its documents fit; each is one
        more compilation. The largest possible is `max_length`.
      weighted: False leaves the weights of documents out (evaluation).

    Raises:
      InputError: a size out of range, or a document longer than `max_length`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        micro_batches: int = 1,
        max_length: int,
        packing: bool = True,
        seed: int = 0,
        shuffle: bool = True,
        length_buckets: Sequence[int] = (),
        weighted: bool = True,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("micro_batches", micro_batches),
            ("max_length", max_length),
        ):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}: give a whole number, at least 1")
        if len(dataset) == 0:
            raise InputError("the dataset has no documents; give one with at least one row")
        longest = int(dataset.lengths.max())
        if longest > max_length:
            raise InputError(
                f"max_length={max_length}: the dataset has a document of {longest} tokens; "
                "tokenise it with the same max_length"
            )
        if any(not 1 <= bucket <= max_length for bucket in length_buckets):
            raise InputError(f"length_buckets={tuple(length_buckets)}: give lengths from 1 to {max_length}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.max_length = max_length
        self.packing = packing
        self.seed = seed
        self.shuffle = shuffle
        self.row_lengths = (max_length,) if packing else tuple(sorted({*length_buckets, max_length}))
        self.weighted = weighted and dataset.weights is not None
        self.streams: list[_Stream] = []
        self._interleaving: Interleaving | None = None
        if isinstance(dataset, MixedDataset) and shuffle:
            for number, part in enumerate(dataset.parts):
                first = int(dataset.bounds[number])
                plan = _base_plan(part.lengths, max_length, packing)
                self.streams.append(_Stream(plan, part.lengths, derived_seed(seed, number), True, first))
            self._interleaving = Interleaving(dataset.shares, seed)
        else:
            plan = _base_plan(dataset.lengths, max_length, packing)
            self.streams.append(_Stream(plan, dataset.lengths, seed, shuffle))

    def __len__(self) -> int:
        """Steps in an epoch, the same in every epoch."""
        return -(-sum(len(stream.base) for stream in self.streams) // self.rows_per_step)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.micro_batches

    @property
    def efficiency(self) -> float:
        """Share of the tokens of an epoch's rows (of `max_length`) that are real."""
        shares = self.dataset.shares if self._interleaving is not None else (1.0,)  # type: ignore[union-attr]
        full = [packing_.efficiency(stream.base, stream.lengths, self.max_length) for stream in self.streams]
        return float(np.dot(shares, full))

    @property
    def padding(self) -> int:
        """Positions of an epoch that hold no token; of a mixture as many as its shares let expect."""
        positions = len(self) * self.rows_per_step * self.max_length
        if self._interleaving is not None:
            return round(positions * (1 - self.efficiency))
        return positions - self.dataset.stats.real_tokens

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs: a pure function of the step (and the arguments)."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        return self._filled(self.documents_at(step))

    def documents_at(self, step: int) -> list[np.ndarray]:
        """Document numbers in each of the step's rows; empty rows are empty. To name rows in messages."""
        if self._interleaving is not None:
            start = step * self.rows_per_step
            return [
                self.streams[part].endless_row(index)
                for part, index in self._interleaving.rows(start, start + self.rows_per_step)
            ]
        epoch, index = divmod(step, len(self))
        plan = self.streams[0].epoch_plan(epoch)
        start = index * self.rows_per_step
        none = np.zeros(0, np.int64)
        return [plan.row(r) if r < len(plan) else none for r in range(start, start + self.rows_per_step)]

    def iterate(
        self, start_step: int = 0, stop_step: int | None = None, *, prefetch: int = 2
    ) -> Iterator[Batch]:
        """Batches from `start_step` up to `stop_step` (without end if None), made ahead in a thread.

        Whatever goes wrong in the thread is raised here; closing the iterator ends the thread.

        Raises:
          RunError: the thread ended without a word.
        """
        made: queue.Queue = queue.Queue(max(prefetch, 1))
        closed = threading.Event()
        thread = threading.Thread(
            target=self._make_ahead,
            args=(made, closed, start_step, stop_step),
            name="pronghorn-loader",
            daemon=True,
        )
        thread.start()
        try:
            while True:
                item = _next_item(made, thread)
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()

    def _make_ahead(
        self, made: queue.Queue, closed: threading.Event, start_step: int, stop_step: int | None
    ) -> None:
        step = start_step
        item: Batch | BaseException | None = None
        while not closed.is_set():
            try:
                item = self.batch_at(step) if stop_step is None or step < stop_step else None
            except BaseException as error:
                item = error
            while not closed.is_set():
                try:
                    made.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if not isinstance(item, dict):
                return
            step += 1

    def _filled(self, rows: list[np.ndarray]) -> Batch:
        """Every document copied to its place by one gather: a Python loop over documents would take milliseconds."""
        counts = [len(row) for row in rows]
        documents = np.concatenate(rows)
        lengths = self.dataset.lengths[documents]
        ends = np.cumsum(lengths)
        row_of = np.repeat(np.arange(len(rows)), counts)
        firsts = np.cumsum([0, *counts[:-1]])
        used = np.bincount(row_of, weights=lengths, minlength=len(rows))
        longest = int(used.max(initial=0))
        width = next(length for length in self.row_lengths if length >= longest)
        starts = ends - lengths  # in the documents end to end
        row_starts = np.cumsum(used).astype(np.int64) - used.astype(np.int64)
        index = np.arange(len(documents) and int(ends[-1]))
        place = index + np.repeat(row_of * width - row_starts[row_of], lengths)
        tokens, trained, weights = self.dataset.gather(documents)
        size = len(rows) * width
        batch = {name: np.zeros(size, np.int32) for name in ("input_ids", "segment_ids", "positions")}
        batch["labels"] = np.full(size, IGNORED_LABEL, np.int32)
        batch["input_ids"][place] = tokens
        batch["labels"][place] = np.where(trained, tokens, IGNORED_LABEL)
        batch["segment_ids"][place] = np.repeat(np.arange(len(documents)) - firsts[row_of] + 1, lengths)
        batch["positions"][place] = index - np.repeat(starts, lengths)
        if self.weighted:
            batch["weights"] = np.ones(size, np.float32)
            if weights is not None:
                batch["weights"][place] = np.repeat(weights, lengths)
        micro = (self.micro_batches, self.batch_size, width)
        return {name: array.reshape(micro) for name, array in batch.items()}


class _Stream:
    """The rows of one set, epoch after epoch."""

    def __init__(
        self, base: packing_.PackingPlan, lengths: np.ndarray, seed: int, shuffle: bool, first: int = 0
    ) -> None:
        self.base, self.lengths, self.seed, self.shuffle, self.first = base, lengths, seed, shuffle, first
        # Two epochs, because a prefetching thread may be ahead of its reader by one.
        self.epoch_plan = functools.lru_cache(maxsize=2)(self._epoch_plan)

    def _epoch_plan(self, epoch: int) -> packing_.PackingPlan:
        if not self.shuffle:
            return self.base
        return packing_.for_epoch(self.base, self.lengths, seed=self.seed, epoch=epoch)

    def endless_row(self, index: int) -> np.ndarray:
        """Documents of row `index` counted over all epochs, numbered in the whole mixture."""
        epoch, row = divmod(index, len(self.base))
        return self.epoch_plan(epoch).row(row) + self.first


def _base_plan(lengths: np.ndarray, max_length: int, packing: bool) -> packing_.PackingPlan:
    return packing_.pack(lengths, max_length) if packing else packing_.one_a_row(len(lengths))


def _next_item(made: queue.Queue, thread: threading.Thread) -> Batch | BaseException | None:
    while True:
        try:
            return made.get(timeout=1.0)
        except queue.Empty:
            if not thread.is_alive() and made.empty():
                raise RunError(
                    "the data thread ended without a word; run again, it resumes at the same batch"
                ) from None
