"""Line charts as SVG text, without a plotting library: axes with round ticks, lines, points, gaps where values are not
finite. Colours are CSS classes (`series-0`, `series-1`, ..), so that one drawing serves light and dark pages.
"""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Literal

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 16, 12, 48
_MOST_POINTS = 1200  # of one line; more cannot be told apart at this width
_COLOURS = 5  # classes that the style sheet knows


@dataclasses.dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
      name: for the legend; an empty one is left out of it.
      x, y: values, of equal length; where y is not finite the line has a gap.
      style: "line", "faint" (thin and pale, for raw values behind a smoothed line), or "points" (a line with dots).
      colour: which of the five colours; None takes the series' place among the named ones.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Literal["line", "faint", "points"] = "line"
    colour: int | None = None

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"series {self.name!r} has {len(self.x)} x values and {len(self.y)} y values")


def line_chart_svg(
    series: Sequence[Series], *, x_label: str, y_label: str, log_y: bool = False, description: str = ""
) -> str:
    """An `<svg>` element.

    Args:
      series: drawn in this order; `faint` ones belong behind.
      x_label, y_label: what the axes count, with units.
      log_y: decades on the y axis; values that are not positive become gaps.
      description: what a screen reader says.
    """
    clean = [_finite_parts(line, log_y) for line in series]
    points = [point for parts in clean for part in parts for point in part]
    if not points:
        return '<p class="empty">No finite values to draw.</p>'
    x_ticks = round_ticks(min(x for x, _ in points), max(x for x, _ in points))
    low, high = min(y for _, y in points), max(y for _, y in points)
    y_ticks = decade_ticks(low, high) if log_y else round_ticks(low, high)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + _share(x, x_ticks[0], x_ticks[-1], False) * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - _share(y, y_ticks[0], y_ticks[-1], log_y) * (HEIGHT - _TOP - _BOTTOM),
        )

    body = [
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{escaped(description)}">'
    ]
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 5:.1f}" text-anchor="end">{tick_text(tick)}</text>'
        )
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        body.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - _BOTTOM}" y2="{HEIGHT - _BOTTOM + 4}"/>'
        )
        body.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 20}" text-anchor="middle">{tick_text(tick)}</text>'
        )
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    body.append(
        f'<text class="axis" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escaped(x_label)}</text>"
    )
    body.append(
        f'<text class="axis" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escaped(y_label)}</text>"
    )
    for line, parts, colour in zip(series, clean, colours(series), strict=True):
        for part in parts:
            body.append(_drawn(line, [place(*point) for point in part], part, colour))
    body.append("</svg>")
    return "\n".join(body)


def escaped(text: str) -> str:
    """Text for HTML or an attribute of it; control characters, which HTML forbids even escaped, become U+FFFD."""
    return html.escape("".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in text))


def colours(series: Sequence[Series]) -> list[int]:
    """The colour of each series: the one it asks for, else its place among those with a name."""
    named = [line for line in series if line.name]
    return [
        (line.colour if line.colour is not None else named.index(line) if line.name else 0) % _COLOURS
        for line in series
    ]


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (steps of 1, 2 or 5 times a power of ten) that enclose [low, high]."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # through decimals, so that 3 * 0.1 is 0.3
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def decade_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose [low, high]; low is positive."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    step = -(-(last - first) // 6)
    return [10.0**power for power in range(first, first + step * -(-(last - first) // step) + 1, step)]


def tick_text(value: float) -> str:
    """A number as short as it can be: 0.25, 1,500, 2e-04."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        text = f"{value:,.6f}".rstrip("0").rstrip(".")
        return text if len(text) <= 9 else f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent):+03d}"


def smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average with its start corrected (as Adam's); what is not finite is passed over."""
    total, norm, found = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        found.append(total / norm if norm else math.nan)
    return found


def _share(value: float, low: float, high: float, log: bool) -> float:
    if log:
        value, low, high = math.log10(value), math.log10(low), math.log10(high)
    return (value - low) / (high - low)


def _finite_parts(line: Series, log_y: bool) -> list[list[tuple[float, float]]]:
    """Runs of drawable points, thinned to what can be seen: first, least and greatest of each bucket."""
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(map(float, line.x), map(float, line.y), strict=True):
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y):
            parts[-1].append((x, y))
        elif parts[-1]:
            parts.append([])
    return [_thinned(part) for part in parts if part]


def _thinned(part: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(part) <= _MOST_POINTS:
        return part
    size = -(-3 * len(part) // _MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(part), size):
        bucket = range(start, min(start + size, len(part)))
        chosen = {start, min(bucket, key=lambda i: part[i][1]), max(bucket, key=lambda i: part[i][1])}
        kept += [part[i] for i in sorted(chosen | ({len(part) - 1} & set(bucket)))]
    return kept


def _drawn(
    line: Series, placed: list[tuple[float, float]], values: list[tuple[float, float]], colour: int
) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    drawn = f'<polyline class="line {line.style} series-{colour}" points="{path}"/>'
    if line.style == "points" or len(placed) == 1:
        for (x, y), (at, value) in zip(placed, values, strict=True):
            hint = escaped(f"{line.name} {tick_text(at)}: {value:.5g}".strip())
            drawn += f'\n<circle class="dot series-{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            drawn += f"<title>{hint}</title></circle>"
    return drawn
