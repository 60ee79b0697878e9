"""Rows to tokens: render, tokenise the whole text once, and say of each token whether it is in the loss.

| row | text | in the loss (loss_on="assistant") |
|---|---|---|
| conversation | the chat template's, BOS only where the template writes it | assistant turns, end-of-turn token too |
| prompt + completion | BOS of the tokenizer, both texts, EOS | the completion and EOS |
| text | BOS of the tokenizer, the text, EOS | everything but the first token |

Places are found in the text (spans.py) and carried to tokens by the offsets of the fast tokenizer: a token that holds
any character of a span is in the loss. A token that would reach across the start of a span is split there, as it is
at generation, where the prompt ends at that point.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pronghorn.data.chat_template import template_for
from pronghorn.data.config import DataConfig
from pronghorn.data.formats import DetectedFormat, Example, detect_format, read_row
from pronghorn.data.sources import Row, load_rows
from pronghorn.data.spans import Span, TurnFinder
from pronghorn.errors import InputError

IGNORED_LABEL = -100
PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
_BATCH_ROWS = 512
_SPACES = "a  b\n   c "

Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TokenizationStats:
    """What became of the rows; tokens are counted after truncation, lengths before it.

    Attributes:
      rows: rows read. rows = documents + empty + dropped + untrained.
      documents: rows kept.
      real_tokens, trained_tokens: of the kept documents; trained are those in the loss.
      truncated: documents cut to max_length.
      dropped: rows left out because they were longer (overlong="drop").
      empty: rows with nothing in them, left out.
      untrained: rows without a single token in the loss, left out.
      duplicates: kept documents that are equal to an earlier one (they are kept).
      length_percentiles: percentile -> tokens.
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


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDataset:
    """Documents end to end in flat arrays.

    Attributes:
      tokens: int32[total].
      trained: bool[total], whether the token is a target of the loss; False for the first of each document.
      offsets: int64[documents + 1]; document i is tokens[offsets[i]:offsets[i + 1]].
      origins: where each document came from.
      stats: counts.
      format: the row format and why it was taken.
    """

    tokens: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    origins: tuple[str, ...]
    stats: TokenizationStats
    format: DetectedFormat

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64[documents]."""
        return np.diff(self.offsets)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels), int32[length] each; labels are the tokens themselves, or -100 outside the loss."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        tokens = self.tokens[part]
        return tokens, np.where(self.trained[part], tokens, IGNORED_LABEL).astype(np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, mask and document boundaries: two equal data sets, and no others, share it."""
        digest = hashlib.sha256()
        for array in (self.offsets, self.tokens, self.trained):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def tokenize_rows(
    rows: Iterable[Row | Mapping[str, Any]],
    tokenizer: Any,
    config: DataConfig = DataConfig(),  # noqa: B008  (frozen)
    *,
    vocab_size: int | None = None,
) -> TokenizedDataset:
    """Tokenise rows and mark what is in the loss.

    Args:
      rows: from `load_rows`, or plain mappings.
      tokenizer: a fast transformers tokenizer (offsets are needed).
      config: format, template, loss_on, overlong, max_length, system_prompt and columns are read.
      vocab_size: rows of the model's embedding; a token id at or above it is refused.

    Raises:
      InputError: no rows; a row that does not fit (with its origin); a template that cannot be used; a token the model
        does not have; a document too long under overlong="error"; nothing left in the loss.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "tokenizer: it has no fast version, which masks need; add a tokenizer.json to its folder"
        )
    read = load_rows(rows)
    format = detect_format(read, config.format, config.columns)
    reader = _Reader(tokenizer, config)
    collected = _Collected(config, vocab_size, tokenizer)
    for start in range(0, len(read), _BATCH_ROWS):
        examples = [read_row(row, format.name, config.columns) for row in read[start : start + _BATCH_ROWS]]
        kept = [example for example in examples if not example.empty]
        collected.empty += len(examples) - len(kept)
        for example, ids, trained in reader.read(kept):
            collected.add(example.origin, ids, trained)
    return collected.dataset(len(read), format)


class _Reader:
    """Examples to token ids and masks, with one tokenizer and one template."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        probe = list(tokenizer("", add_special_tokens=True)["input_ids"])
        bos = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and probe[:1] == [bos] else []

    @functools.cached_property
    def finder(self) -> TurnFinder:
        return self._finder(tools=False)

    @functools.cached_property
    def finder_with_tools(self) -> TurnFinder:
        return self._finder(tools=True)

    def _finder(self, tools: bool) -> TurnFinder:
        added = self.tokenizer.added_tokens_decoder.values()
        special = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        return TurnFinder(
            template_for(self.tokenizer, self.config.chat_template, tools=tools), sorted(special)
        )

    def read(self, examples: Sequence[Example]) -> Iterable[tuple[Example, np.ndarray, np.ndarray]]:
        rendered = [self._rendered(example) for example in examples]
        if not rendered:
            return
        encoded = self._encode([text for text, _ in rendered])
        self._split_where_turns_start(rendered, encoded)
        for example, (_, spans), (ids, starts, ends) in zip(examples, rendered, encoded, strict=True):
            trained = _overlaps(starts, ends, spans)
            if self.config.loss_on == "all":
                trained[:] = True
            if example.kind != "chat":
                ids, trained = self._with_ends(ids, trained)
            trained[:1] = False
            yield example, ids, trained

    def _rendered(self, example: Example) -> tuple[str, list[Span]]:
        if example.kind != "chat":
            text = example.prompt + example.text
            bos = self.tokenizer.bos_token
            spans = [(len(example.prompt), len(text))]
            if self.bos and text.startswith(bos):  # written in the text as well: not twice
                text, spans = text[len(bos) :], [(max(s - len(bos), 0), e - len(bos)) for s, e in spans]
            return text, spans
        messages, wanted = list(example.messages), list(example.trained)
        system = self.config.system_prompt
        if system and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system})
            wanted.insert(0, False)
        if self.config.loss_on == "all":
            wanted = [False] * len(wanted)  # no places are needed
        try:
            finder = self.finder_with_tools if example.tools else self.finder
            text, spans = finder.render(messages, wanted, example.tools)
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{example.origin}: a message holds half of a surrogate pair, which is not text"
            ) from error
        except InputError as error:
            raise InputError(f"{example.origin}: {error}") from error
        return text, spans

    def _with_ends(self, ids: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise InputError("tokenizer: it has no eos token, so the model could not learn to stop; set one")
        tail = [] if len(ids) and ids[-1] == eos else [eos]
        ids = np.concatenate([np.asarray(self.bos, np.int32), ids, np.asarray(tail, np.int32)])
        head, end = np.zeros(len(self.bos), bool), np.ones(len(tail), bool)
        return ids, np.concatenate([head, trained, end])

    @functools.cached_property
    def _backend(self) -> Any:
        """The tokenizer's backend, as a copy without post-processor if that trims spaces off the offsets.

        GPT-2's and Llama 3's do, and then a token of "line break, three spaces" would seem to end at the line break.
        Special tokens are added here, so the post-processor has nothing else to do.
        """
        from tokenizers import Tokenizer

        original = self.tokenizer.backend_tokenizer
        probe = original.encode(_SPACES, add_special_tokens=False).offsets
        tiles = [a for a, _ in probe] + [len(_SPACES)] == [0] + [b for _, b in probe]
        if tiles and original.truncation is None and original.padding is None:
            return original
        description = json.loads(original.to_str()) | {
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        backend = Tokenizer.from_str(json.dumps(description))
        backend.encode_special_tokens = original.encode_special_tokens
        return backend

    def _encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Of each text (ids int32[n], starts int64[n], ends int64[n]): the characters each token stands for.

        Tokens that share the bytes of one character share its place.
        """
        result = []
        for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False):
            places = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
            result.append((np.asarray(encoding.ids, np.int32), places[:, 0], places[:, 1]))
        return result

    def _split_where_turns_start(
        self, rendered: Sequence[tuple[str, list[Span]]], encoded: list[Encoded]
    ) -> None:
        """Encode texts again in pieces (in place of `encoded`) where a token reaches across the start of a span."""
        crossed: dict[int, list[int]] = {}
        for index, ((text, spans), (_, starts, ends)) in enumerate(zip(rendered, encoded, strict=True)):
            cuts = sorted({s for s, _ in spans if np.any((starts < s) & (ends > s))})
            if cuts:
                crossed[index] = [0, *cuts, len(text)]
        pieces = iter(
            self._encode(
                [
                    rendered[index][0][a:b]
                    for index, bounds in crossed.items()
                    for a, b in itertools.pairwise(bounds)
                ]
            )
        )
        for index, bounds in crossed.items():
            parts = [(next(pieces), start) for start in bounds[:-1]]
            ids = np.concatenate([part[0] for part, _ in parts])
            starts = np.concatenate([part[1] + start for part, start in parts])
            ends = np.concatenate([part[2] + start for part, start in parts])
            # Some tokenizers write a space of their own at the start of a piece: there the whole is better.
            if self._decode(ids) == self._decode(encoded[index][0]):
                encoded[index] = ids, starts, ends

    def _decode(self, ids: np.ndarray) -> str:
        return self._backend.decode(ids.tolist(), skip_special_tokens=False)


def _overlaps(starts: np.ndarray, ends: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """bool[n]: the token holds a character of one of the spans (or stands inside one and holds none)."""
    inside = np.zeros(len(starts), bool)
    for start, end in spans:
        inside |= (starts < end) & ((ends > start) | ((starts == ends) & (starts >= start)))
    return inside


class _Collected:
    """The documents so far, under the overlong policy."""

    def __init__(self, config: DataConfig, vocab_size: int | None, tokenizer: Any) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.tokens: list[np.ndarray] = []
        self.trained: list[np.ndarray] = []
        self.origins: list[str] = []
        self.lengths: list[int] = []
        self.seen: set[bytes] = set()
        self.truncated = self.dropped = self.empty = self.untrained = self.duplicates = self.cut_away = 0

    def add(self, origin: str, ids: np.ndarray, trained: np.ndarray) -> None:
        limit = self.config.max_length
        if self.vocab_size is not None and len(ids) and ids.max() >= self.vocab_size:
            worst = int(ids.max())
            raise InputError(
                f"{origin}: token {self.tokenizer.convert_ids_to_tokens(worst)!r} has the id {worst}, and the model "
                f"has {self.vocab_size} embeddings; use the model's own tokenizer, or resize its embeddings"
            )
        self.lengths.append(len(ids))
        if not trained.any():
            self.untrained += 1
            return
        if len(ids) > limit:
            if self.config.overlong == "error":
                raise InputError(
                    f"{origin}: {len(ids)} tokens, over data.max_length={limit}; raise it, or set data.overlong to "
                    "truncate or drop"
                )
            if self.config.overlong == "drop":
                self.dropped += 1
                return
            ids, trained = ids[:limit], trained[:limit]
            if not trained.any():
                self.untrained += 1
                self.cut_away += 1
                return
            self.truncated += 1
        digest = hashlib.blake2b(ids.tobytes() + trained.tobytes(), digest_size=16).digest()
        self.duplicates += digest in self.seen
        self.seen.add(digest)
        self.tokens.append(ids)
        self.trained.append(trained)
        self.origins.append(origin)

    def dataset(self, rows: int, format: DetectedFormat) -> TokenizedDataset:
        if not self.tokens:
            raise InputError(self._why_nothing_is_left(rows, format))
        tokens, trained = np.concatenate(self.tokens), np.concatenate(self.trained)
        percentiles = np.percentile(self.lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist()
        stats = TokenizationStats(
            rows=rows,
            documents=len(self.tokens),
            real_tokens=len(tokens),
            trained_tokens=int(trained.sum()),
            truncated=self.truncated,
            dropped=self.dropped,
            empty=self.empty,
            untrained=self.untrained,
            duplicates=self.duplicates,
            length_percentiles=dict(zip(PERCENTILES, percentiles, strict=True)),
        )
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in self.tokens])]).astype(np.int64)
        return TokenizedDataset(tokens, trained, offsets, tuple(self.origins), stats, format)

    def _why_nothing_is_left(self, rows: int, format: DetectedFormat) -> str:
        limit = self.config.max_length
        reasons = [
            (self.empty, "are empty"),
            (self.dropped, f"are longer than data.max_length={limit} and were dropped"),
            (self.cut_away, f"lose every trained token at data.max_length={limit}"),
            (
                self.untrained - self.cut_away,
                f"have nothing to train on with data.loss_on={self.config.loss_on!r}",
            ),
        ]
        told = ", ".join(f"{count} {reason}" for count, reason in reasons if count)
        return (
            f"the dataset: every token is masked, nothing can be trained: of {rows} rows read as {format.name}, "
            f"{told}; check the roles, data.format and data.max_length"
        )
