"""From spans of a text to a mask over its tokens.

Places are found in the text (spans.py) and carried to tokens by the offsets of the fast tokenizer: a token that holds
any character of a span is in the loss. A token that would reach across the start of a span is split there, as it is
at generation, where the prompt ends at that point.

The tokenizer is asked for the few tokens at the ends of spans. Where it cannot tell (a character that no token stands
for), all offsets of that text are read and compared; that is ten times slower, and the rule in its plainest form.
"""

import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pronghorn.data.spans import Span

_SPACES = "a  b\n   c "

Places = tuple[np.ndarray, np.ndarray, np.ndarray]
Rendered = Sequence[tuple[str, list[Span]]]


class Encoder:
    """A tokenizer that gives ids and masks.

    Args:
      tokenizer: a fast transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @functools.cached_property
    def backend(self) -> Any:
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

    def encode(self, texts: Sequence[str], *, places: bool = True) -> list[Any]:
        """The tokenizers library's encodings; runs on all cores, and faster where no places are asked for."""
        encode = self.backend.encode_batch if places else self.backend.encode_batch_fast
        return encode(list(texts), add_special_tokens=False)

    def masked(self, rendered: Rendered, encodings: Sequence[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32[n], bool[n]: in one of the spans) of each text."""
        found: list[tuple[np.ndarray, np.ndarray] | None] = []
        slow: dict[int, Places] = {}
        for index, ((text, spans), encoding) in enumerate(zip(rendered, encodings, strict=True)):
            if not needs_places(text, spans):
                found.append((np.asarray(encoding.ids, np.int32), np.full(len(encoding), bool(spans))))
                continue
            trained = _quick_mask(encoding, spans, len(text))
            if trained is None:
                slow[index] = _places(encoding)
            found.append(None if trained is None else (np.asarray(encoding.ids, np.int32), trained))
        self._split_where_turns_start({i: rendered[i] for i in slow}, slow)
        for index, (ids, starts, ends) in slow.items():
            found[index] = ids, overlaps(starts, ends, rendered[index][1])
        return found  # type: ignore[return-value]

    def _split_where_turns_start(
        self, rendered: dict[int, tuple[str, list[Span]]], encoded: dict[int, Places]
    ) -> None:
        """Encode texts again in pieces (in place of `encoded`) where a token reaches across the start of a span."""
        crossed: dict[int, list[int]] = {}
        for index, (text, spans) in rendered.items():
            _, starts, ends = encoded[index]
            cuts = sorted({s for s, _ in spans if np.any((starts < s) & (ends > s))})
            if cuts:
                crossed[index] = [0, *cuts, len(text)]
        if not crossed:
            return
        texts = [rendered[i][0][a:b] for i, bounds in crossed.items() for a, b in itertools.pairwise(bounds)]
        pieces = map(_places, self.encode(texts))
        for index, bounds in crossed.items():
            parts = [(next(pieces), start) for start in bounds[:-1]]
            ids = np.concatenate([part[0] for part, _ in parts])
            starts = np.concatenate([part[1] + start for part, start in parts])
            ends = np.concatenate([part[2] + start for part, start in parts])
            # Some tokenizers write a space of their own at the start of a piece: there the whole is better.
            if self._decode(ids) == self._decode(encoded[index][0]):
                encoded[index] = ids, starts, ends

    def _decode(self, ids: np.ndarray) -> str:
        return self.backend.decode(ids.tolist(), skip_special_tokens=False)


def needs_places(text: str, spans: Sequence[Span]) -> bool:
    """Whether a text's mask depends on where its tokens stand: neither none nor all of it is in the loss."""
    return bool(spans) and list(spans) != [(0, len(text))]


def _places(encoding: Any) -> Places:
    """(ids int32[n], starts int64[n], ends int64[n]): the characters each token stands for.

    Tokens that share the bytes of one character share its place.
    """
    places = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    return np.asarray(encoding.ids, np.int32), places[:, 0], places[:, 1]


def overlaps(starts: np.ndarray, ends: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """bool[n]: the token holds a character of one of the spans (or stands inside one and holds none)."""
    inside = np.zeros(len(starts), bool)
    for start, end in spans:
        inside |= (starts < end) & ((ends > start) | ((starts == ends) & (starts >= start)))
    return inside


def _quick_mask(encoding: Any, spans: Sequence[Span], characters: int) -> np.ndarray | None:
    """`overlaps` from the tokens at the ends of the spans; None where these leave a doubt."""
    count = len(encoding)
    inside = np.zeros(count, bool)
    for start, end in spans:
        if start >= end:
            return None
        first = encoding.char_to_token(start)
        place = None if first is None else encoding.token_to_chars(first)
        if place is None or place[0] != start:
            return None  # nothing stands there, or a token reaches across
        if first and encoding.token_to_chars(first - 1) in (None, (start, start)):
            return None
        stop: int | None = count
        if end < characters:
            stop = encoding.char_to_token(end)
            place = None if stop is None else encoding.token_to_chars(stop)
            if stop is None or place is None:
                return None
            if place[0] < end:
                return None  # a token holds characters on both sides
        inside[first:stop] = True
    return inside
