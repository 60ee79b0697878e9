"""Show what the model will see: rendered rows, tokens in the loss in colour, and the counts of the whole set.

`preview_rows` prints to a terminal; `preview_html` gives one HTML file with nothing outside it. Text from rows is
shown, never interpreted: control characters become visible symbols, markup and HTML are escaped.
"""

import dataclasses
import html
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pronghorn.data.dataset import Dataset, MixedDataset
from pronghorn.data.loader import Loader

if TYPE_CHECKING:
    from rich.console import Console

MAX_SHOWN_TOKENS = 2000


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of neighbouring tokens that are all in the loss, or all not."""

    text: str
    trained: bool
    tokens: int


def pieces(dataset: Dataset, index: int, tokenizer: Any, limit: int) -> list[Piece]:
    """Document `index` as runs of trained and untrained tokens, at most `limit` tokens of it."""
    ids, labels = dataset.document(index)
    trained = labels[:limit] >= 0
    changes = np.flatnonzero(np.diff(trained.astype(np.int8))) + 1
    bounds = [0, *changes.tolist(), len(trained)]
    return [
        Piece(
            tokenizer.decode(
                ids[a:b].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
            bool(trained[a]),
            b - a,
        )
        for a, b in itertools.pairwise(bounds)
    ]


def statistics(dataset: Dataset, loader: Loader | None = None) -> list[tuple[str, str]]:
    """(name, value) pairs: counts, lengths and, with a loader, how full its rows are."""
    stats = dataset.stats
    share = stats.trained_tokens / stats.real_tokens
    lengths = ", ".join(f"{percent} % {tokens}" for percent, tokens in stats.length_percentiles.items())
    table = [
        ("format", f"{dataset.format.name}: {dataset.format.reason}"),
        ("rows", f"{stats.rows:,} read, {stats.documents:,} kept"),
        ("left out", f"{stats.empty:,} empty, {stats.untrained:,} without loss"),
        ("over-long", f"{stats.truncated:,} truncated, {stats.split:,} split, {stats.dropped:,} left out"),
        ("duplicates", f"{stats.duplicates:,} (kept)"),
        ("tokens", f"{stats.real_tokens:,}, of them {stats.trained_tokens:,} in the loss ({share:.1%})"),
        ("lengths", f"{lengths} (percentile tokens)"),
    ]
    if isinstance(dataset, MixedDataset):
        table += _parts(dataset, loader)
    if loader is not None:
        kind = "packed" if loader.packing else "padded"
        table.append(
            (
                "an epoch",
                f"{len(loader):,} steps of {loader.rows_per_step} {kind} rows of {loader.max_length:,} tokens; "
                f"rows {loader.efficiency:.1%} full, {loader.padding:,} padding tokens",
            )
        )
    return table


def summary(dataset: Dataset) -> str:
    """One line for the report of a run: format and reason, lengths, and what was found."""
    table = dict(statistics(dataset))
    names = ("format", "lengths", "over-long", "left out", "duplicates")
    return "; ".join(table[name] if name == "format" else f"{name} {table[name]}" for name in names)


def _parts(dataset: MixedDataset, loader: Loader | None) -> list[tuple[str, str]]:
    table = []
    for number, (part, name, share) in enumerate(
        zip(dataset.parts, dataset.names, dataset.shares, strict=True)
    ):
        told = (
            f"{share:.1%} of the rows: {part.stats.documents:,} documents, {part.stats.real_tokens:,} tokens"
        )
        if loader is not None and len(loader.streams) > 1:
            passes = share * len(loader) * loader.rows_per_step / len(loader.streams[number].base)
            told += f", seen {passes:.2f} times an epoch"
        table.append((name, told))
    return table


def preview_rows(
    dataset: Dataset,
    tokenizer: Any,
    *,
    rows: int | Sequence[int] = 1,
    loader: Loader | None = None,
    console: "Console | None" = None,
) -> None:
    """Print the first `rows` documents (or those numbered), tokens in the loss green and underlined, and the counts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    for index in _chosen(dataset, rows):
        console.rule(Text(f"{visible(dataset.origins[index])} · {int(dataset.lengths[index])} tokens"))
        text = Text()
        for piece in pieces(dataset, index, tokenizer, MAX_SHOWN_TOKENS):
            # underlined as well: colours are not seen by everyone nor kept by every log
            text.append(visible(piece.text), style="green underline" if piece.trained else "dim")
        if dataset.lengths[index] > MAX_SHOWN_TOKENS:
            text.append(f" … {int(dataset.lengths[index]) - MAX_SHOWN_TOKENS} more tokens")
        console.print(text)
    table = Table(title="green and underlined: in the loss", show_header=False, box=None)
    for name, value in statistics(dataset, loader):
        table.add_row(name, Text(visible(value)))
    console.print(table)


def preview_html(
    dataset: Dataset,
    tokenizer: Any,
    *,
    rows: int | Sequence[int] = 10,
    loader: Loader | None = None,
) -> str:
    """The same as one HTML page, styles inline and no scripts."""
    parts = []
    for name, value in statistics(dataset, loader):
        parts.append(f"<tr><th>{html.escape(name)}</th><td>{html.escape(visible(value))}</td></tr>")
    parts = ["<table>", *parts, "</table>"]
    for index in _chosen(dataset, rows):
        length = int(dataset.lengths[index])
        parts.append(f"<h2>{html.escape(visible(dataset.origins[index]))} · {length} tokens</h2><pre>")
        for piece in pieces(dataset, index, tokenizer, MAX_SHOWN_TOKENS):
            text = html.escape(visible(piece.text))
            parts.append(f'<ins title="{piece.tokens} tokens">{text}</ins>' if piece.trained else text)
        if length > MAX_SHOWN_TOKENS:
            parts.append(f" … {length - MAX_SHOWN_TOKENS} more tokens")
        parts.append("</pre>")
    before, after = _PAGE.split("@@")
    return before + "".join(parts) + after


def visible(text: str) -> str:
    """Text with control characters shown as symbols, so that a row cannot steer a terminal; line breaks stay."""
    return text.translate(_SYMBOLS)


def _chosen(dataset: Dataset, rows: int | Sequence[int]) -> Sequence[int]:
    return range(min(rows, len(dataset))) if isinstance(rows, int) else rows


# C0 controls have pictures from U+2400; C1 controls and the marks that turn the direction of text become "?"-boxes.
_SYMBOLS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_SYMBOLS |= {0x7F: "\u2421"}
_SYMBOLS |= dict.fromkeys((*range(128, 160), 8206, 8207, *range(8234, 8239), *range(8294, 8298)), "�")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>pronghorn: data preview</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
th { text-align: left; padding-right: 1.5rem; vertical-align: top; font-weight: 600 }
h2 { font-size: 1rem; margin: 2rem 0 .3rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: 1rem;
  border-radius: 6px; color: #777 }
ins { background: #d3f2d3; color: #063; text-decoration: underline }
@media (prefers-color-scheme: dark) {
  body { background: #161616; color: #ddd } pre { background: #222; color: #999 }
  ins { background: #143d20; color: #9fe8af }
}
</style></head><body><h1>Tokens in the loss are green and underlined</h1>
@@
</body></html>
"""
