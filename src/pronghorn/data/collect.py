"""Documents one after the other, under the overlong policy, into arrays in memory or on disk."""

import hashlib
from typing import Any

import numpy as np

from pronghorn.data.config import DataConfig
from pronghorn.data.dataset import (
    CUT_AWAY,
    DROPPED,
    EMPTY,
    KEPT,
    SPLIT,
    TRUNCATED,
    UNTRAINED,
    Table,
    TokenizedDataset,
)
from pronghorn.data.formats import DetectedFormat, Example
from pronghorn.errors import InputError

#: name -> dtype of what is kept of every row and every document.
ROW_ARRAYS = {"outcomes": np.uint8, "lengths": np.int32}
DOCUMENT_ARRAYS = {
    "offsets": np.int64,
    "rows": np.int64,
    "trained_counts": np.int32,
    "digests": np.uint64,
    "weights": np.float32,
}
_FLUSHED_ROWS = 8192
TOKEN_ARRAYS = {"tokens": np.int32, "trained": np.bool_}


class MemoryArrays:
    """What a `Collected` writes to, in memory. Another kind has the same two methods (`store.py`)."""

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {}
        self.origins: list[str] = []

    def append(self, name: str, values: np.ndarray) -> None:
        self.parts.setdefault(name, []).append(values)

    def append_origin(self, origin: str) -> None:
        self.origins.append(origin)

    def dataset(self, collected: "Collected") -> TokenizedDataset:
        arrays = {
            name: np.concatenate(self.parts.get(name) or [np.zeros(0, dtype)])
            for name, dtype in (ROW_ARRAYS | DOCUMENT_ARRAYS | TOKEN_ARRAYS).items()
        }
        arrays["duplicates"] = duplicates(arrays["digests"])
        return dataset_of(arrays, self.origins, collected.format)


def duplicates(digests: np.ndarray) -> np.ndarray:
    """bool[documents]: equal to an earlier one."""
    repeated = np.ones(len(digests), bool)
    repeated[np.unique(digests, return_index=True)[1]] = False
    return repeated


def dataset_of(arrays: dict[str, np.ndarray], origins: Any, format: DetectedFormat) -> TokenizedDataset:
    """The data set of the arrays that a `Collected` wrote."""
    table = Table(
        arrays["outcomes"], arrays["lengths"], arrays["rows"], arrays["trained_counts"], arrays["duplicates"]
    )
    weights = arrays["weights"] if len(arrays["weights"]) and np.any(arrays["weights"] != 1) else None
    everything = np.arange(len(arrays["rows"]))
    sizes = np.diff(arrays["offsets"])
    return TokenizedDataset(
        arrays["tokens"],
        arrays["trained"],
        arrays["offsets"],
        tuple(origins) if isinstance(origins, list) else origins,
        table.stats(sizes, np.arange(len(table.outcomes)), everything),
        format,
        weights=weights,
        table=table,
    )


class Collected:
    """The documents so far."""

    def __init__(
        self, arrays: Any, config: DataConfig, format: DetectedFormat, vocab_size: int | None, tokenizer: Any
    ) -> None:
        self.arrays = arrays
        self.config = config
        self.format = format
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.overlong = config.overlong
        if self.overlong == "auto":
            self.overlong = "split" if format.name == "text" else "truncate"
        self.rows = self.documents = self.tokens = 0
        self.counts = [0] * 7
        self._scalars: dict[str, list] = {name: [] for name in ROW_ARRAYS | DOCUMENT_ARRAYS}
        self._scalars["offsets"].append(0)

    def add_empty(self) -> None:
        self._row(EMPTY, 0)

    def add(self, example: Example, ids: np.ndarray, trained: np.ndarray) -> None:
        """One row that has text.

        Raises:
          InputError: it has a token that the model lacks, or is too long under overlong="error".
        """
        limit, length, origin = self.config.max_length, len(ids), example.origin
        if self.vocab_size is not None and length and ids.max() >= self.vocab_size:
            worst = int(ids.max())
            raise InputError(
                f"{origin}: token {self.tokenizer.convert_ids_to_tokens(worst)!r} has the id {worst}, and the model "
                f"has {self.vocab_size} embeddings; use the model's own tokenizer, or give the tokens as new_tokens"
            )
        if not trained.any() or example.weight == 0:
            return self._row(UNTRAINED, length)
        if length <= limit:
            self._document(example, ids, trained)
            return self._row(KEPT, length)
        if self.overlong == "error":
            raise InputError(
                f"{origin}: {length} tokens, over data.max_length={limit}; raise it, or set data.overlong to truncate, "
                "split or drop"
            )
        if self.overlong == "drop":
            return self._row(DROPPED, length)
        # Pieces overlap by the one token that the next piece needs to predict its first from: none is lost.
        last = length - 1 if self.overlong == "split" else 1
        before = self.documents
        for start in range(0, last, limit - 1):
            part = trained[start : start + limit].copy()
            part[0] = False
            if part.any():
                self._document(example, ids[start : start + limit], part)
        if self.documents == before:
            return self._row(CUT_AWAY, length)
        return self._row(SPLIT if self.overlong == "split" else TRUNCATED, length)

    def _document(self, example: Example, ids: np.ndarray, trained: np.ndarray) -> None:
        digest = hashlib.blake2b(ids.tobytes() + trained.tobytes(), digest_size=8).digest()
        self.documents += 1
        self.tokens += len(ids)
        self.arrays.append("tokens", ids)
        self.arrays.append("trained", trained)
        self.arrays.append_origin(example.origin)
        scalars = self._scalars
        scalars["offsets"].append(self.tokens)
        scalars["rows"].append(self.rows)
        scalars["trained_counts"].append(int(np.count_nonzero(trained)))
        scalars["digests"].append(int.from_bytes(digest, "little"))
        scalars["weights"].append(example.weight)

    def _row(self, outcome: int, length: int) -> None:
        self.rows += 1
        self.counts[outcome] += 1
        self._scalars["outcomes"].append(outcome)
        self._scalars["lengths"].append(length)
        if self.rows % _FLUSHED_ROWS == 0:
            self._flush()

    def _flush(self) -> None:
        for name, dtype in (ROW_ARRAYS | DOCUMENT_ARRAYS).items():
            self.arrays.append(name, np.asarray(self._scalars[name], dtype))
            self._scalars[name] = []

    def finish(self) -> None:
        """Write what is left.

        Raises:
          InputError: nothing can be trained.
        """
        self._flush()
        if not self.documents:
            raise InputError(self._why_nothing_is_left())

    def _why_nothing_is_left(self) -> str:
        limit, count = self.config.max_length, self.counts
        reasons = [
            (count[EMPTY], "are empty"),
            (count[DROPPED], f"are longer than data.max_length={limit} and were dropped"),
            (count[CUT_AWAY], f"lose every trained token at data.max_length={limit}"),
            (count[UNTRAINED], f"have nothing to train on with data.loss_on={self.config.loss_on!r}"),
        ]
        told = ", ".join(f"{number} {reason}" for number, reason in reasons if number)
        return (
            f"the dataset: every token is masked, nothing can be trained: of {self.rows} rows read as "
            f"{self.format.name}, {told}; check the roles, data.format and data.max_length"
        )
