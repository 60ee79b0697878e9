"""The HTML report: well formed, self-contained, escaped, and its lines where the numbers are."""

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from pronghorn.errors import RunError
from pronghorn.evaluation.line_chart import (
    HEIGHT,
    Series,
    decade_ticks,
    line_chart_svg,
    round_ticks,
    smoothed,
    tick_text,
)
from pronghorn.evaluation.report import (
    Chart,
    Facts,
    Samples,
    Table,
    before_after,
    html_report,
    training_charts,
    write_html_report,
)

EVIL = "</pre><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp; \x00\x1b"


def _everything():
    return [
        *training_charts([3.0, 2.5, 2.0], [1.0, 0.5, 0.7], [1e-4, 2e-4, 1e-4], heldout=[(0, 3.0), (3, 2.1)]),
        Chart(EVIL, [Series(EVIL, [1, 2], [1, 2], "points")], EVIL, EVIL, note=EVIL),
        Table(EVIL, [EVIL, "n"], [[EVIL, 1.5]], EVIL),
        Facts(EVIL, {EVIL: EVIL, "list": [1, EVIL]}),
        Samples(EVIL, {EVIL: EVIL}, prompt=EVIL),
    ]


class Page(HTMLParser):
    """Tags that are open, and everything seen."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_every_tag_is_closed_in_order():
    assert Page(html_report("Run", *_everything(), subtitle="x")).open == []


def test_text_cannot_become_markup():
    page = Page(html_report(EVIL, *_everything(), subtitle=EVIL))
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 12
    assert "\x00" not in page.text and "\x1b" not in page.text


def test_nothing_is_fetched():
    text = html_report("Run", *_everything())
    attributes = dict(Page(text).attributes)
    assert not {"src", "href", "srcset", "data"} & attributes.keys()
    assert "url(" not in text and "@import" not in text and "://" not in text
    assert "default-src 'none'" in text


def test_the_file_appears_whole_or_not_at_all(tmp_path):
    write_html_report(tmp_path / "r.html", "Run", *_everything())
    assert (tmp_path / "r.html").read_text(encoding="utf-8").endswith("</html>\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError):
        write_html_report(tmp_path / "file" / "r.html", "Run")


def _svg(*args, **kwargs):
    return ElementTree.fromstring(line_chart_svg(*args, x_label="x", y_label="y", **kwargs))


def _lines(svg):
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in svg.iter("polyline")
    ]


def _tick_heights(svg):
    """y tick label -> height of its grid line."""
    return {
        float(text.text.replace(",", "")): float(text.get("y")) - 5
        for text in svg.iter("text")
        if text.get("class") == "tick" and text.get("text-anchor") == "end"
    }


def test_points_lie_at_the_heights_of_their_ticks():
    svg = _svg([Series("", [0, 1, 2], [0.0, 2.0, 1.0])])
    heights = _tick_heights(svg)
    (line,) = _lines(svg)
    assert [y for _, y in line] == pytest.approx([heights[0.0], heights[2.0], heights[1.0]], abs=0.06)
    xs = [x for x, _ in line]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])


def test_a_log_axis_spaces_decades_evenly():
    svg = _svg([Series("", [0, 1, 2], [0.01, 1.0, 100.0])], log_y=True)
    ys = [y for _, y in _lines(svg)[0]]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)
    assert ys[0] == pytest.approx(_tick_heights(svg)[0.01], abs=0.06)


def test_values_that_are_not_finite_leave_a_gap():
    nan, inf = math.nan, math.inf
    svg = _svg([Series("", range(7), [1, 2, nan, 3, inf, 2, 1])])
    assert [len(line) for line in _lines(svg)] == [2, 1, 2]
    assert all(0 <= y <= HEIGHT for line in _lines(svg) for _, y in line)
    assert "nan" not in line_chart_svg([Series("", [1, 2], [nan, 1])], x_label="", y_label="")


@pytest.mark.parametrize("values", [[], [math.nan, math.inf], [0.0, -1.0]])
def test_a_chart_without_a_drawable_value_says_so(values):
    text = line_chart_svg([Series("", range(len(values)), values)], x_label="", y_label="", log_y=True)
    assert "No finite values" in text and "<svg" not in text


@pytest.mark.parametrize("value", [0.0, 5.0, -3e-9, 1e30])
def test_a_constant_line_has_an_axis_around_it(value):
    (line,) = _lines(_svg([Series("", [0, 1], [value, value])]))
    assert all(0 < y < HEIGHT for _, y in line)


def test_a_long_line_is_thinned_and_keeps_its_extremes():
    values = [math.sin(i / 50) for i in range(50_000)]
    values[12_345], values[31_111] = 9.0, -9.0
    svg = _svg([Series("", range(50_000), values)])
    (line,) = _lines(svg)
    heights = [y for _, y in line]
    assert len(line) < 2500
    assert min(heights) == pytest.approx(_place(svg, 9.0), abs=0.1)
    assert max(heights) == pytest.approx(_place(svg, -9.0), abs=0.1)


def _place(svg, value):
    (low, at_low), *_, (high, at_high) = sorted(_tick_heights(svg).items())
    return at_low + (value - low) / (high - low) * (at_high - at_low)


@pytest.mark.parametrize("low, high", [(0, 1), (-3.7, 12.2), (1e-5, 2e-5), (0.999, 1.001), (7, 7), (0, 1e6)])
def test_ticks_are_few_and_round_and_enclose_the_values(low, high):
    ticks = round_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1] and 3 <= len(ticks) <= 9
    step = ticks[1] - ticks[0]
    assert re.match(r"[125]\.0+e", f"{step:.6e}")


def test_decades_enclose_the_values():
    assert decade_ticks(0.02, 30) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert decade_ticks(1, 1) == pytest.approx([1, 10])
    wide = decade_ticks(1e-12, 1e12)
    assert wide[0] <= 1e-12 and wide[-1] >= 1e12 and len(wide) <= 9


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.25, "0.25"), (1500, "1,500"), (2e-4, "2e-04"), (1.5e7, "1.5e+07"), (-2.0, "-2")],
)
def test_tick_labels_are_short(value, text):
    assert tick_text(value) == text


def test_smoothing_starts_at_the_first_value_and_passes_over_gaps():
    assert smoothed([2.0, math.nan, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([0.0, 1.0], weight=0.5)[1] == pytest.approx(2 / 3)


def test_a_long_run_shows_raw_values_faintly_behind_the_smoothed_line():
    loss, norm = training_charts([1.0] * 30, [0.001, *[1.0] * 29])
    assert [line.style for line in loss.series] == ["faint", "line"]
    assert norm.log_y and [chart.title for chart in (loss, norm)] == ["Loss", "Gradient norm"]


def test_before_and_after_show_the_change():
    table = before_after("Result", [("held-out loss", 2.0, 1.5), ("accuracy", 0.0, 0.5)])
    assert table.rows[0] == ("held-out loss", 2.0, 1.5, "-0.5000", "-25.0%")
    text = html_report("x", table)
    assert '<td class="number">1.5000</td>' in text and "-25.0%" in text


def test_a_row_of_another_length_than_its_heads_is_a_mistake():
    with pytest.raises(ValueError, match="row of 1"):
        html_report("x", Table("t", ["a", "b"], [[1]]))
