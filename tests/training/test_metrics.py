import io
import json

import jax.numpy as jnp
import pytest

from pronghorn.training import metrics
from pronghorn.training.metrics import JsonLines, MetricsBuffer, Progress, describe

RECORD = {
    "step": 20,
    "loss": 1.25,
    "grad_norm": 0.5,
    "learning_rate": 1e-3,
    "tokens_per_second": 1234.4,
    "skipped": 0,
}


def test_records_come_in_order_and_some_steps_late():
    buffer = MetricsBuffer(log_every=3)
    got = []
    for step in range(1, 11):
        buffer.add({"step": step}, {"loss": jnp.float32(step)})
        ready = buffer.ready()
        assert all(record["step"] <= step - metrics._LAG for record in ready)
        got += ready
    assert [record["step"] for record in got] == [1, 2, 3, 4, 5, 6]
    got += buffer.ready(everything=True)
    assert [(record["step"], record["loss"]) for record in got] == [(n, float(n)) for n in range(1, 11)]
    assert buffer.ready(everything=True) == []


def test_slow_steps_are_shown_as_soon_as_they_are_done(monkeypatch):
    monkeypatch.setattr(metrics, "_POLL_SECONDS", 0.0)
    buffer = MetricsBuffer(log_every=100)
    for step in range(1, 5):
        buffer.add({"step": step}, {"loss": jnp.float32(step).block_until_ready()})
    assert [record["step"] for record in buffer.ready()] == [1, 2, 3, 4]


def test_json_lines_have_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path)
    writer.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    writer.close()
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "grad_norm": None}


def test_a_resumed_file_drops_later_steps_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 3, "lo')
    writer = JsonLines(path, keep_through=2)
    writer.write({"step": 3, "again": True})
    writer.close()
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    assert steps == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_without_a_terminal_there_is_a_line_an_interval():
    stream = io.StringIO()
    progress = Progress(25, log_every=10, stream=stream)
    for step in range(1, 26):
        progress.step(RECORD | {"step": step})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25"]
    assert "loss 1.2500  grad norm 0.5  lr 1.00e-03  1,234 tok/s" in lines[0]


def test_a_line_names_skipped_steps_and_memory_where_there_are_any():
    text = describe(RECORD | {"skipped": 2, "mfu": 0.4321, "peak_device_bytes": 3 << 30})
    assert text.endswith("MFU 43.2 %  3.0 GiB  2 skipped")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_message_with_brackets_is_printed_as_it_is(terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    progress = Progress(3, stream=stream)
    progress.say("rows [bold]1[/bold]")
    progress.close()
    assert "rows [bold]1[/bold]" in stream.getvalue()
