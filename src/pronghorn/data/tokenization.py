"""Rows to tokens: render, tokenise the whole text once, and say of each token whether it is in the loss.

| row | text | in the loss (loss_on="assistant") |
|---|---|---|
| conversation | the chat template's, BOS only where the template writes it | assistant turns, end-of-turn token too |
| prompt + completion | BOS of the tokenizer, both texts, EOS | the completion and EOS |
| text | BOS of the tokenizer, the text, EOS | everything but the first token |

Rows are rendered in Python while the rows before them are tokenised on the other cores; what comes out is in the order
of the rows either way. How characters become masks is in `masks.py`, what a cut does in `collect.py`.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from pronghorn.data.chat_template import template_for
from pronghorn.data.collect import Collected, MemoryArrays
from pronghorn.data.config import DataConfig
from pronghorn.data.dataset import IGNORED_LABEL, TokenizationStats, TokenizedDataset
from pronghorn.data.formats import DetectedFormat, Example, detect_format, read_row
from pronghorn.data.masks import Encoder, needs_places
from pronghorn.data.sources import Row, stream_rows
from pronghorn.data.spans import Span, TurnFinder
from pronghorn.errors import InputError

__all__ = ["IGNORED_LABEL", "TokenizationStats", "TokenizedDataset", "tokenize_into", "tokenize_rows"]

_BATCH_ROWS = 512
_BATCH_CHARACTERS = 1 << 22
_DETECTED_ROWS = 100


def tokenize_rows(
    rows: Iterable[Row | Mapping[str, Any]],
    tokenizer: Any,
    config: DataConfig = DataConfig(),  # noqa: B008  (frozen)
    *,
    vocab_size: int | None = None,
) -> TokenizedDataset:
    """Tokenise rows and mark what is in the loss.

    Args:
      rows: from `load_rows`, or plain mappings; an iterator is read once and not held.
      tokenizer: a fast transformers tokenizer (offsets are needed).
      config: format, template, loss_on, overlong, max_length, system_prompt and columns are read.
      vocab_size: rows of the model's embedding; a token id at or above it is refused.

    Raises:
      InputError: no rows; a row that does not fit (with its origin); a template that cannot be used; a token the model
        does not have; a document too long under overlong="error"; nothing left in the loss.
    """
    arrays = MemoryArrays()
    collected = tokenize_into(arrays, rows, tokenizer, config, vocab_size=vocab_size)
    return arrays.dataset(collected)


def tokenize_into(
    arrays: Any,
    rows: Iterable[Row | Mapping[str, Any]],
    tokenizer: Any,
    config: DataConfig,
    *,
    vocab_size: int | None = None,
) -> Collected:
    """`tokenize_rows` into arrays that may be on disk; returns what became of the rows."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "tokenizer: it has no fast version, which masks need; add a tokenizer.json to its folder"
        )
    stream = stream_rows(rows)
    first = list(itertools.islice(stream, _DETECTED_ROWS))
    if not first:
        raise InputError("the dataset has no rows; give a file with at least one")
    format = detect_format(first, config.format, config.columns)
    reader = _Reader(tokenizer, config)
    collected = Collected(arrays, config, format, vocab_size, tokenizer)
    with ThreadPoolExecutor(1, "pronghorn-tokenizer") as pool:
        waiting: tuple[list[Example], list, Future] | None = None
        try:
            for examples in _batches(itertools.chain(first, stream), format, config):
                rendered = [None if example.empty else reader.rendered(example) for example in examples]
                full = [item for item in rendered if item is not None]
                texts, places = [text for text, _ in full], any(needs_places(*item) for item in full)
                encoded = pool.submit(reader.encoder.encode, texts, places=places)  # releases the interpreter
                if waiting is not None:
                    reader.collect(*waiting, collected)
                waiting = examples, rendered, encoded
        except InputError:
            if waiting is not None:
                reader.collect(*waiting, collected)  # an earlier row's error is the one to tell
            raise
        if waiting is not None:
            reader.collect(*waiting, collected)
    collected.finish()
    return collected


def _batches(rows: Iterable[Row], format: DetectedFormat, config: DataConfig) -> Iterator[list[Example]]:
    """Examples in lists of a few hundred rows, or of fewer long ones."""
    batch: list[Example] = []
    characters = 0
    for row in rows:
        example = read_row(row, format.name, format.columns or config.columns)
        batch.append(example)
        characters += len(example.prompt) + len(example.text)
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Reader:
    """Examples to token ids and masks, with one tokenizer and one template."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.encoder = Encoder(tokenizer)
        self.eos = tokenizer.eos_token_id  # looked up anew at every call of transformers
        self.bos_text = tokenizer.bos_token
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

    def collect(
        self,
        examples: Sequence[Example],
        rendered: Sequence[tuple[str, list[Span]] | None],
        encoded: Future,
        collected: Collected,
    ) -> None:
        """Masks of one batch, and its documents into `collected`, in the order of the rows."""
        full = [item for item in rendered if item is not None]
        documents = iter(self.encoder.masked(full, encoded.result()))
        for example, item in zip(examples, rendered, strict=True):
            if item is None:
                collected.add_empty()
                continue
            ids, trained = next(documents)
            if self.config.loss_on == "all":
                trained[:] = True
            if example.kind != "chat":
                ids, trained = self._with_ends(ids, trained)
            trained[:1] = False
            collected.add(example, ids, trained)

    def rendered(self, example: Example) -> tuple[str, list[Span]]:
        if example.kind != "chat":
            text = example.prompt + example.text
            bos = self.bos_text
            spans = [(len(example.prompt), len(text))]
            if self.bos and text.startswith(bos):  # written in the text as well: not twice
                text, spans = text[len(bos) :], [(max(s - len(bos), 0), e - len(bos)) for s, e in spans]
            return text, spans
        messages, wanted = list(example.messages), list(example.trained)
        eligible = list(example.eligible)
        system = self.config.system_prompt
        if system and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system})
            wanted.insert(0, False)
            eligible.insert(0, False)
        if self.config.loss_on == "all":
            wanted = [False] * len(wanted)  # no places are needed
        elif self.config.loss_on == "last":
            last = max((i for i, one in enumerate(wanted) if one), default=-1)
            wanted = [i == last for i in range(len(wanted))]
        elif self.config.loss_on != "assistant":
            roles = self.config.loss_on
            wanted = [one and m["role"] in roles for one, m in zip(eligible, messages, strict=True)]
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
        eos = self.eos
        if eos is None:
            raise InputError("tokenizer: it has no eos token, so the model could not learn to stop; set one")
        tail = [] if len(ids) and ids[-1] == eos else [eos]
        ids = np.concatenate([np.asarray(self.bos, np.int32), ids, np.asarray(tail, np.int32)])
        head, end = np.zeros(len(self.bos), bool), np.ones(len(tail), bool)
        return ids, np.concatenate([head, trained, end])
