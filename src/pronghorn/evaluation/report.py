"""A report as one HTML file: no script, no font, no image, nothing fetched; light or dark as the reader's system is.

Text from models and files is escaped everywhere, and a content security policy forbids what escaping might miss.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pronghorn.evaluation.line_chart import Series, colours, escaped, line_chart_svg, smoothed
from pronghorn.files import write_atomic


@dataclasses.dataclass(frozen=True)
class Chart:
    """A line chart; see `line_chart.line_chart_svg`. `note` stands below it."""

    title: str
    series: Sequence[Series]
    x_label: str = "step"
    y_label: str = ""
    log_y: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of values below column heads. Columns of numbers are aligned to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names and values, such as settings."""

    title: str
    values: Mapping[str, Any]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Texts beside each other, label -> text, such as an answer before and after; `prompt` stands above them."""

    title: str
    texts: Mapping[str, str]
    prompt: str = ""
    note: str = ""


Section = Chart | Table | Facts | Samples


def write_html_report(path: str | Path, title: str, *sections: Section, subtitle: str = "") -> None:
    """Write the report atomically.

    Args:
      path: the .html file.
      title: its heading.
      sections: in order; charts that follow each other share a line where there is room.
      subtitle: one line below the heading: model, device, date.

    Raises:
      RunError: it cannot be written.
    """
    write_atomic(path, html_report(title, *sections, subtitle=subtitle))


def html_report(title: str, *sections: Section, subtitle: str = "") -> str:
    """The text that `write_html_report` writes."""
    body = [f"<h1>{escaped(title)}</h1>"]
    if subtitle:
        body.append(f'<p class="subtitle">{escaped(subtitle)}</p>')
    in_grid = False
    for section in sections:
        is_chart = isinstance(section, Chart)
        if is_chart != in_grid:
            body.append('<div class="charts">' if is_chart else "</div>")
            in_grid = is_chart
        body.append(_section(section))
    if in_grid:
        body.append("</div>")
    return _PAGE.format(title=escaped(title), style=_STYLE, body="\n".join(body))


def training_charts(
    losses: Sequence[float],
    grad_norms: Sequence[float] = (),
    learning_rates: Sequence[float] = (),
    *,
    heldout: Sequence[tuple[int, float]] = (),
    first_step: int = 1,
) -> list[Chart]:
    """The charts of a training run, one value a step: loss (with held-out losses at their steps), gradient norm and
    learning rate; empty ones are left out.
    """

    def steps(values: Sequence[float]) -> list[int]:
        return list(range(first_step, first_step + len(values)))

    smooth = len(losses) > 20
    loss_lines = [Series("" if smooth else "training", steps(losses), losses, "faint" if smooth else "line")]
    if smooth:
        loss_lines.append(Series("training, smoothed", steps(losses), smoothed(losses)))
    if heldout:
        at, values = [step for step, _ in heldout], [loss for _, loss in heldout]
        loss_lines.append(Series("held out", at, values, "points"))
    charts = [Chart("Loss", loss_lines, y_label="nats a token")] if losses or heldout else []
    if grad_norms:
        lines = [Series("", steps(grad_norms), grad_norms)]
        charts.append(Chart("Gradient norm", lines, y_label="before clipping", log_y=_wide(grad_norms)))
    if learning_rates:
        lines = [Series("", steps(learning_rates), learning_rates)]
        charts.append(Chart("Learning rate", lines, y_label="learning rate"))
    return charts


def before_after(title: str, rows: Sequence[tuple[str, float, float]], *, note: str = "") -> Table:
    """A table of (what, before, after) with the change, absolute and relative."""
    return Table(
        title,
        ("", "before", "after", "change", "relative"),
        [
            (name, before, after, f"{after - before:+.4f}", f"{after / before - 1:+.1%}" if before else "")
            for name, before, after in rows
        ],
        note,
    )


def _wide(values: Sequence[float]) -> bool:
    """Whether values span more than two decades, so that a linear axis would hide the small ones."""
    positive = [value for value in values if math.isfinite(value) and value > 0]
    return bool(positive) and max(positive) > 100 * min(positive)


def _section(section: Section) -> str:
    if isinstance(section, Chart):
        drawing = line_chart_svg(
            section.series,
            x_label=section.x_label,
            y_label=section.y_label,
            log_y=section.log_y,
            description=f"{section.title}: {section.y_label} against {section.x_label}",
        )
        inside = drawing + _legend(section)  # below, so that charts side by side stay level
    elif isinstance(section, Table):
        inside = _table(section)
    elif isinstance(section, Facts):
        rows = "".join(
            f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(_shown(value))}</td></tr>'
            for name, value in section.values.items()
        )
        inside = f'<div class="scroll"><table class="facts">{rows}</table></div>'
    else:
        inside = _samples(section)
    note = f'<p class="note">{escaped(section.note)}</p>' if section.note else ""
    return f"<section><h2>{escaped(section.title)}</h2>\n{inside}\n{note}</section>"


def _legend(chart: Chart) -> str:
    named = [
        f'<span class="key"><i class="series-{colour}"></i>{escaped(line.name)}</span>'
        for line, colour in zip(chart.series, colours(chart.series), strict=True)
        if line.name
    ]
    return f'<p class="legend">{"".join(named)}</p>' if named else ""


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(
                f"table {table.title!r} has a row of {len(row)} values and {len(table.columns)} columns"
            )
    numeric = [
        bool(table.rows) and all(_is_numeric(row[column]) for row in table.rows)
        for column in range(len(table.columns))
    ]

    def cells(tag: str, values: Sequence[Any]) -> str:
        opened = [f'<{tag} class="number">' if number else f"<{tag}>" for number in numeric]
        return "".join(
            f"{o}{escaped(_shown(value))}</{tag}>" for o, value in zip(opened, values, strict=True)
        )

    head = f"<thead><tr>{cells('th', table.columns)}</tr></thead>"
    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _samples(samples: Samples) -> str:
    prompt = f'<pre class="prompt">{escaped(samples.prompt)}</pre>' if samples.prompt else ""
    texts = "".join(
        f"<figure><figcaption>{escaped(label)}</figcaption><pre>{escaped(text)}</pre></figure>"
        for label, text in samples.texts.items()
    )
    return f'{prompt}<div class="samples">{texts}</div>'


def _is_numeric(value: Any) -> bool:
    """A number, or a text that shows one, such as "+3.1%"."""
    if isinstance(value, str):
        value = value.strip().removesuffix("%").replace(",", "")
        try:
            float(value or "0")
        except ValueError:
            return False
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
        return f"{value:,.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return str(value)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --page: #ffffff; --text: #1c2430; --quiet: #5b6675; --rule: #e1e5ea; --block: #f5f7f9;
  --c0: #1f6fd6; --c1: #cf5b00; --c2: #23845a; --c3: #9a3fb5; --c4: #b3283c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --text: #e4e8ed; --quiet: #9aa5b3; --rule: #2c343d; --block: #1c2229;
    --c0: #6aa9ff; --c1: #ff9d4d; --c2: #5cc795; --c3: #d18be6; --c4: #ff7b8d;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 0 0 8px; }
section { margin: 30px 0 0; min-width: 0; }
.subtitle, .note, .legend, figcaption { color: var(--quiet); }
.subtitle { margin: 0; }
.note { margin: 8px 0 0; font-size: 13.5px; max-width: 75ch; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 0 32px; }
.chart { width: 100%; height: auto; display: block; }
.chart text { fill: var(--quiet); font: 14px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.faint { stroke-width: 1; opacity: .35; }
.dot { stroke: var(--page); stroke-width: 1; }
.line.series-0 { stroke: var(--c0); } .dot.series-0 { fill: var(--c0); } i.series-0 { background: var(--c0); }
.line.series-1 { stroke: var(--c1); } .dot.series-1 { fill: var(--c1); } i.series-1 { background: var(--c1); }
.line.series-2 { stroke: var(--c2); } .dot.series-2 { fill: var(--c2); } i.series-2 { background: var(--c2); }
.line.series-3 { stroke: var(--c3); } .dot.series-3 { fill: var(--c3); } i.series-3 { background: var(--c3); }
.line.series-4 { stroke: var(--c4); } .dot.series-4 { fill: var(--c4); } i.series-4 { background: var(--c4); }
.legend { margin: 4px 0 0; font-size: 13.5px; }
.key { margin-right: 18px; white-space: nowrap; }
.key i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 22px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; }
.facts th { font-weight: 400; color: var(--quiet); white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.number { text-align: right; }
pre {
  background: var(--block); border: 1px solid var(--rule); border-radius: 6px; padding: 10px 12px; margin: 0;
  font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
}
.prompt { margin-bottom: 14px; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 14px; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 13.5px; margin-bottom: 4px; }
.empty { color: var(--quiet); }
@media print { section { break-inside: avoid; } }
""".strip()
