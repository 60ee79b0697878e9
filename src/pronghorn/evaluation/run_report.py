"""report.html of a run, from what its folder holds: config.json, metrics.jsonl, and where they are, incidents.jsonl,
samples.jsonl and adapter_check.json. Works on a run that is still going, was killed, or ended long ago."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pronghorn.errors import InputError
from pronghorn.evaluation.line_chart import Series
from pronghorn.evaluation.report import (
    Chart,
    Facts,
    Samples,
    Section,
    Table,
    before_after,
    training_charts,
    write_html_report,
)

_MOST_INCIDENTS, _MOST_ROWS, _MOST_SAMPLES = 200, 12, 8


def write_run_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run folder; returns its path.

    Args:
      run: `train.output_dir` of the run.
      out: the file; None writes report.html into the run's folder.

    Raises:
      InputError: the folder holds no run.
      RunError: the file cannot be written.
    """
    folder = Path(run)
    config, records = _json(folder / "config.json"), _lines(folder / "metrics.jsonl")
    if not config or not (folder / "metrics.jsonl").is_file():
        raise InputError(
            f"{folder}: holds no run (config.json and metrics.jsonl); give train.output_dir of one."
        )
    steps = [record for record in records if "loss" in record]
    heldout = [(r["step"], _number(r["eval_loss"])) for r in records if "eval_loss" in r]
    general = [(r["step"], _number(r["general_loss"])) for r in records if "general_loss" in r]
    sections: list[Section] = []
    changes = [
        (name, values[0][1], values[-1][1])
        for name, values in (("held-out rows", heldout), ("general text", general))
        if len(values) > 1
    ]
    if changes:
        note = "What rises on general text was forgotten; held-out rows are compared from the first evaluation on."
        sections.append(before_after("Loss, nats a token", changes, note=note))
    sections += training_charts(
        [_number(step["loss"]) for step in steps],
        [_number(step["grad_norm"]) for step in steps],
        [_number(step["learning_rate"]) for step in steps if "learning_rate" in step],
        heldout=heldout,
        first_step=steps[0]["step"] if steps else 1,
    )
    sections += _speed_charts(steps)
    sections += _incidents(_lines(folder / "incidents.jsonl"))
    sections += _samples(_lines(folder / "samples.jsonl"))
    check = _json(folder / "adapter_check.json")
    if check:
        sections.append(Facts("The saved adapter, reloaded and compared with the live model", check))
    sections += [
        Facts(title, _flat(config[key]))
        for key, title in (
            ("train", "Training"),
            ("data", "Data"),
            ("adapter", "Adapter"),
            ("model", "Model"),
            ("plan", "Plan, from the compiled step"),
            ("hashes", "Hashes"),
            ("versions", "Versions"),
        )
        if config.get(key)
    ]
    path = folder / "report.html" if out is None else Path(out)
    last = steps[-1]["step"] if steps else 0
    subtitle = f"{len(steps):,} steps recorded, the last is {last:,}; {config.get('device', '')}"
    write_html_report(path, f"Run {folder.resolve().name}", *sections, subtitle=subtitle)
    return path


def losses_of(run: str | Path) -> dict[str, Any]:
    """The last of each kind of loss in a run's metrics.jsonl, and the steps and incidents it has."""
    folder = Path(run)
    records = _lines(folder / "metrics.jsonl")
    last = {
        name: next((_number(r[name]) for r in reversed(records) if name in r), None)
        for name in ("loss", "eval_loss", "general_loss")
    }
    steps = sum("loss" in record for record in records)
    return {"steps": steps, **last, "incidents": len(_lines(folder / "incidents.jsonl"))}


def _speed_charts(steps: list[dict[str, Any]]) -> list[Section]:
    charts: list[Section] = []
    for key, title, label, unit in (
        ("tokens_per_second", "Speed", "real tokens a second", 1.0),
        ("mfu", "Model FLOPs utilisation", "share of the device's peak", 1.0),
        ("peak_device_bytes", "Device memory", "GiB at the most so far", 2.0**-30),
    ):
        values = [(step["step"], step[key] * unit) for step in steps if _is_number(step.get(key))]
        if values:
            at, numbers = zip(*values, strict=True)
            charts.append(Chart(title, [Series("", list(at), list(numbers))], y_label=label))
    return charts


def _incidents(found: list[dict[str, Any]]) -> list[Section]:
    if not found:
        return []
    rows = []
    for incident in found[:_MOST_INCIDENTS]:
        names = [str(row) for row in incident.get("rows", [])]
        shown = ", ".join(names[:_MOST_ROWS]) + (
            f" and {len(names) - _MOST_ROWS} more" * (len(names) > _MOST_ROWS)
        )
        rows.append((incident["step"], incident["kind"], _number(incident.get("loss")), shown))
    note = "" if len(found) <= _MOST_INCIDENTS else f"The first {_MOST_INCIDENTS} of {len(found):,}."
    return [Table("Unusual steps", ("step", "what", "loss", "rows of the batch"), rows, note)]


def _samples(found: list[dict[str, Any]]) -> list[Section]:
    """For each prompt its answers by step, the first and the last ones where there are many."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in found:
        by_prompt.setdefault(str(sample["prompt"]), []).append(sample)
    sections: list[Section] = []
    for prompt, samples in by_prompt.items():
        kept = samples if len(samples) <= _MOST_SAMPLES else [samples[0], *samples[1 - _MOST_SAMPLES :]]
        texts = {f"after step {sample['step']}": str(sample["text"]) for sample in kept}
        sections.append(Samples("Answers while training", texts, prompt=prompt))
    return sections


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= _flat(inner, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = inner
    return flat


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    found: Any = next(iter(_parsed(path, lambda text: [text])), {})
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; the last line of a killed run may be cut."""
    return [
        record for record in _parsed(path, str.splitlines) if isinstance(record, dict) and "step" in record
    ]


def _parsed(path: Path, parts: Any) -> Iterable[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    for part in parts(text):
        try:
            yield json.loads(part)
        except (ValueError, RecursionError):
            continue


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    """A recorded number; what was not finite was written as null."""
    return float(value) if _is_number(value) else float("nan")
