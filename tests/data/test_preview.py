"""The preview shows the tokens, the loss and the counts, and nothing in a row can act on terminal or page."""

import html
import io
import re

from rich.console import Console

from pronghorn.data.config import DataConfig
from pronghorn.data.dataset import MixedDataset
from pronghorn.data.loader import Loader
from pronghorn.data.preview import pieces, preview_html, preview_rows, statistics, visible
from pronghorn.data.tokenization import tokenize_rows

HOSTILE = "[bold red]x[/] <script>alert(1)</script> \x1b[2J\x07\u202e & 'q' \"r\""


def _dataset(tokenizer, *answers):
    rows = [
        {"prompt": [{"role": "user", "content": "why?"}], "completion": [{"role": "assistant", "content": a}]}
        for a in answers
    ]
    return tokenize_rows(rows, tokenizer, DataConfig(max_length=400))


def _printed(dataset, tokenizer, **options):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard", width=400)
    preview_rows(dataset, tokenizer, console=console, **options)
    return stream.getvalue()


def test_pieces_are_the_document_cut_where_the_loss_changes(tokenizer):
    dataset = _dataset(tokenizer, "because é東")
    found = pieces(dataset, 0, tokenizer, 1000)
    assert [p.trained for p in found] == [False, True, False]
    assert found[1].text == "because é東<|im_end|>"
    assert "".join(p.text for p in found) == tokenizer.decode(dataset.document(0)[0])
    assert sum(p.tokens for p in found) == dataset.lengths[0]


def test_terminal_shows_the_tokens_in_the_loss_green_and_underlined(tokenizer):
    printed = _printed(_dataset(tokenizer, "because"), tokenizer)
    assert re.findall(r"\x1b\[4;32m(.*?)\x1b\[0m", printed) == ["because<|im_end|>"]


def test_rows_asked_for_are_shown(tokenizer):
    dataset = _dataset(tokenizer, "one", "two", "three")
    printed = _printed(dataset, tokenizer, rows=2)
    assert "one" in printed and "two" in printed and "three" not in printed
    assert "three" in _printed(dataset, tokenizer, rows=[2])


def test_nothing_in_a_row_acts_on_the_terminal(tokenizer):
    printed = _printed(_dataset(tokenizer, HOSTILE), tokenizer)
    assert "[bold red]x[/]" in printed
    assert "\x1b[2J" not in printed and "\x07" not in printed and "\u202e" not in printed
    assert "\u241b[2J\u2407" in printed


def test_nothing_in_a_row_acts_on_the_page(tokenizer):
    page = preview_html(_dataset(tokenizer, HOSTILE), tokenizer)
    assert "<script" not in page and "\x1b" not in page
    (shown,) = re.findall(r"<ins[^>]*>(.*?)</ins>", page, re.DOTALL)
    assert html.unescape(shown) == visible(HOSTILE) + "<|im_end|>"


def test_page_needs_nothing_outside_it(tokenizer):
    page = preview_html(_dataset(tokenizer, "x"), tokenizer)
    assert "http" not in page and "src=" not in page and "@@" not in page
    assert page.count("<pre>") == page.count("</pre>") == 1


def test_text_that_looks_like_the_page_frame_stays_text(tokenizer):
    page = preview_html(_dataset(tokenizer, "@@ </pre>"), tokenizer)
    assert "@@ &lt;/pre&gt;" in page


def test_long_document_is_shortened(tokenizer, monkeypatch):
    dataset = _dataset(tokenizer, "word " * 60)
    monkeypatch.setattr("pronghorn.data.preview.MAX_SHOWN_TOKENS", 20)
    hidden = int(dataset.lengths[0]) - 20
    printed = _printed(dataset, tokenizer)
    assert f"{hidden} more tokens" in printed and 0 < printed.count("word") < 20
    assert f"{hidden} more tokens" in preview_html(dataset, tokenizer)
    assert sum(p.tokens for p in pieces(dataset, 0, tokenizer, 20)) == 20


def test_statistics_tell_format_counts_and_how_full_rows_are(tokenizer):
    dataset = _dataset(tokenizer, "a", "a", "b")
    loader = Loader(dataset, batch_size=2, max_length=400)
    table = dict(statistics(dataset, loader))
    assert table["format"].startswith("prompt_completion: the rows have")
    assert table["rows"] == "3 read, 3 kept"
    assert table["duplicates"] == "1 (kept)"
    assert f"{dataset.stats.trained_tokens:,} in the loss" in table["tokens"]
    assert f"rows {loader.efficiency:.1%} full" in table["an epoch"]
    assert f"rows {loader.efficiency:.1%} full" in _printed(dataset, tokenizer, loader=loader)
    assert "an epoch" not in dict(statistics(dataset))


def test_mixture_tells_shares_and_passes_of_its_parts(tokenizer):
    parts = (_dataset(tokenizer, *"abcdef"), _dataset(tokenizer, "long " * 20, "x"))
    mixed = MixedDataset(parts, ("short.jsonl", "long/"), (0.75, 0.25))
    loader = Loader(mixed, batch_size=2, max_length=400, packing=False)
    table = dict(statistics(mixed, loader))
    assert table["short.jsonl"].startswith("75.0% of the rows: 6 documents")
    assert table["short.jsonl"].endswith("seen 1.00 times an epoch")
    assert table["long/"].endswith("seen 1.00 times an epoch")
    assert "short.jsonl: prompt_completion; long/: prompt_completion" in table["format"]
    page = preview_html(mixed, tokenizer, rows=8, loader=loader)
    assert page.count("<h2>") == 8 and "long long" in page
    assert "75.0%" in _printed(mixed, tokenizer, rows=[7], loader=loader)
