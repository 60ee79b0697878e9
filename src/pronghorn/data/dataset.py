"""Tokenised documents: flat arrays, in memory or mapped from a file, and what became of the rows they came from."""

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from pronghorn.data.formats import DetectedFormat
from pronghorn.errors import InputError

IGNORED_LABEL = -100
PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
_HASHED = 1 << 24  # tokens hashed at a time: a mapped file need not fit into memory

# What became of a row (`Table.outcomes`).
KEPT, TRUNCATED, SPLIT, DROPPED, EMPTY, UNTRAINED, CUT_AWAY = range(7)


@dataclasses.dataclass(frozen=True)
class TokenizationStats:
    """What became of the rows; tokens are counted after truncation, lengths before it.

    Attributes:
      rows: rows read. Those that are not empty, dropped or untrained became documents, one each unless split.
      documents: documents kept.
      real_tokens, trained_tokens: of the kept documents; trained are those in the loss.
      truncated: rows cut to max_length.
      dropped: rows left out because they were longer (overlong="drop").
      empty: rows with nothing in them, left out.
      untrained: rows without a single token in the loss, left out.
      duplicates: kept documents that are equal to an earlier one (they are kept).
      length_percentiles: percentile -> tokens.
      split: rows cut into several documents (overlong="split").
    """

    rows: int
    documents: int
    real_tokens: int
    trained_tokens: int
    truncated: int
    dropped: int
    empty: int
    untrained: int
    duplicates: int
    length_percentiles: Mapping[int, int]
    split: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """What is known of each row read and of each document kept.

    Attributes:
      outcomes: uint8[rows], what became of each row.
      lengths: int32[rows], tokens before any cut; 0 for an empty row.
      rows: int64[documents], the row that each document came from.
      trained: int32[documents], its tokens in the loss.
      duplicates: bool[documents], equal to an earlier one.
    """

    outcomes: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    trained: np.ndarray
    duplicates: np.ndarray

    def stats(self, sizes: np.ndarray, rows: np.ndarray, documents: np.ndarray) -> TokenizationStats:
        """The counts of some rows and their documents; `sizes` are the tokens of those documents."""
        outcomes, lengths = self.outcomes[rows], self.lengths[rows]
        seen = lengths[outcomes != EMPTY]
        found = (
            np.percentile(seen, PERCENTILES, method="inverted_cdf").astype(int).tolist() if len(seen) else []
        )
        count = np.bincount(outcomes, minlength=7).tolist()
        return TokenizationStats(
            rows=len(outcomes),
            documents=len(documents),
            real_tokens=int(sizes.sum()),
            trained_tokens=int(self.trained[documents].sum()),
            truncated=count[TRUNCATED],
            dropped=count[DROPPED],
            empty=count[EMPTY],
            untrained=count[UNTRAINED] + count[CUT_AWAY],
            duplicates=int(self.duplicates[documents].sum()),
            length_percentiles=dict(zip(PERCENTILES, found, strict=False)),
            split=count[SPLIT],
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDataset:
    """Documents end to end in flat arrays.

    Attributes:
      tokens: int32[total].
      trained: bool[total], whether the token is a target of the loss; False for the first of each document.
      offsets: int64[all documents + 1]; a document is tokens[offsets[i]:offsets[i + 1]].
      origins: where each document came from.
      stats: counts.
      format: the row format and why it was taken.
      weights: float32[all documents], a factor on the loss of each document, or None where all are 1.
      table: rows and documents one by one; None for documents that came from no rows.
      chosen: int64[documents], which of the documents in the arrays these are; None for all.
      digests: SHA-256 of the arrays by name, where they were told while writing; else they are computed when asked for.
    """

    tokens: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    origins: Sequence[str]
    stats: TokenizationStats
    format: DetectedFormat
    weights: np.ndarray | None = None
    table: Table | None = None
    chosen: np.ndarray | None = None
    digests: Mapping[str, str] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1 if self.chosen is None else len(self.chosen)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64[documents]."""
        if self.chosen is None:
            return np.diff(self.offsets)
        return np.asarray(self.offsets[self.chosen + 1] - self.offsets[self.chosen])

    @property
    def largest_token(self) -> int:
        """The largest id of all arrays; -1 where there is none."""
        blocks = range(0, len(self.tokens), _HASHED)
        return max((int(self.tokens[i : i + _HASHED].max()) for i in blocks), default=-1)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels), int32[length] each; labels are the tokens themselves, or -100 outside the loss."""
        place = index if self.chosen is None else self.chosen[index]
        part = slice(self.offsets[place], self.offsets[place + 1])
        tokens = np.asarray(self.tokens[part])
        return tokens, np.where(self.trained[part], tokens, IGNORED_LABEL).astype(np.int32)

    def gather(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(tokens, trained, weights) of several documents end to end; weights are one a document, or None."""
        places = documents if self.chosen is None else self.chosen[documents]
        sizes = self.lengths[documents]
        starts = np.cumsum(sizes) - sizes
        source = np.repeat(self.offsets[places] - starts, sizes)
        source += np.arange(len(source))
        weights = None if self.weights is None else np.asarray(self.weights[places])
        return self.tokens[source], self.trained[source], weights

    def select_rows(self, kept: np.ndarray) -> "TokenizedDataset":
        """The documents of the rows where bool[rows] `kept` is true; nothing is copied.

        Raises:
          InputError: none of these rows has anything to train on.
        """
        assert self.table is not None, "only documents that came from rows can be chosen by row"
        documents = np.flatnonzero(kept[self.table.rows])
        if not len(documents):
            raise InputError(
                "the dataset: no row is left to train on after some were held out; lower data.eval_fraction"
            )
        chosen = documents if self.chosen is None else self.chosen[documents]
        stats = self.table.stats(self.lengths[documents], np.flatnonzero(kept), documents)
        return dataclasses.replace(
            self, chosen=chosen, stats=stats, table=None, origins=_Chosen(self, documents)
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, mask, weights and boundaries: two equal data sets, and no others, share it."""
        names = ["offsets", "tokens", "trained", *(["weights"] if self.weights is not None else [])]
        known = self.digests or {}
        parts = [known.get(name) or _sha256(getattr(self, name)) for name in names]
        if self.chosen is not None:
            parts.append(_sha256(self.chosen))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sha256(array: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(array), _HASHED):
        digest.update(np.ascontiguousarray(array[start : start + _HASHED]).data)
    return digest.hexdigest()


class _Chosen(Sequence[str]):
    """Origins of some documents of another set."""

    def __init__(self, dataset: TokenizedDataset, documents: np.ndarray) -> None:
        self._origins, self._documents = dataset.origins, documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index):
        return self._origins[int(self._documents[index])]


@dataclasses.dataclass(frozen=True, eq=False)
class MixedDataset:
    """Several data sets one after the other, which a loader mixes by weight.

    Attributes:
      parts: the sets.
      names: of the sets, for the user.
      shares: of the rows of a batch, adding up to 1.
    """

    parts: tuple[TokenizedDataset, ...]
    names: tuple[str, ...]
    shares: tuple[float, ...]

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """int64[parts + 1]: part p has the documents bounds[p] .. bounds[p + 1] - 1."""
        return np.cumsum([0, *map(len, self.parts)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.concatenate([part.lengths for part in self.parts])

    @property
    def largest_token(self) -> int:
        return max(part.largest_token for part in self.parts)

    @property
    def weights(self) -> bool | None:
        """Whether any part has weights (None: no)."""
        return True if any(part.weights is not None for part in self.parts) else None

    @property
    def format(self) -> DetectedFormat:
        told = "; ".join(f"{n}: {p.format.name}" for n, p in zip(self.names, self.parts, strict=True))
        return DetectedFormat("mixture", told)

    @functools.cached_property
    def stats(self) -> TokenizationStats:
        """Sums over the parts; percentiles are of the documents, after any cut."""
        found = np.percentile(self.lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist()
        added = {
            field.name: sum(getattr(part.stats, field.name) for part in self.parts)
            for field in dataclasses.fields(TokenizationStats)
            if field.name != "length_percentiles"
        }
        return TokenizationStats(**added, length_percentiles=dict(zip(PERCENTILES, found, strict=True)))

    @property
    def origins(self) -> Sequence[str]:
        return _MixedOrigins(self)

    def place(self, index: int) -> tuple[TokenizedDataset, int]:
        """The part that holds a document, and its number there."""
        part = bisect.bisect_right(self.bounds, index) - 1
        return self.parts[part], int(index - self.bounds[part])

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part, number = self.place(index)
        return part.document(number)

    def gather(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        sizes = self.lengths[documents]
        part_of = np.searchsorted(self.bounds, documents, "right") - 1
        tokens, trained = np.empty(int(sizes.sum()), np.int32), np.empty(int(sizes.sum()), bool)
        weights = np.ones(len(documents), np.float32) if self.weights else None
        for number in np.unique(part_of):
            here = part_of == number
            part_tokens, part_trained, part_weights = self.parts[number].gather(
                documents[here] - self.bounds[number]
            )
            places = np.repeat(here, sizes)
            tokens[places], trained[places] = part_tokens, part_trained
            if weights is not None and part_weights is not None:
                weights[here] = part_weights
        return tokens, trained, weights

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part, share in zip(self.parts, self.shares, strict=True):
            digest.update(f"{part.fingerprint} {share!r}\n".encode())
        return digest.hexdigest()


class _MixedOrigins(Sequence[str]):
    def __init__(self, dataset: MixedDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index):
        part, number = self._dataset.place(int(index))
        return part.origins[number]


Dataset = TokenizedDataset | MixedDataset
