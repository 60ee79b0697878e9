"""What a run reports while it goes: a progress bar or lines, and metrics.jsonl.

Numbers stay on the device until they are needed. The training loop hands over device arrays; `MetricsBuffer` gives
back those of steps that are certainly done, so that the device always has a next step in its queue.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from pronghorn.errors import RunError
from pronghorn.files import write_atomic

# Steps that stay in flight behind the newest one: fetching the metrics of an older step then never idles the device.
_LAG = 2
_POLL_SECONDS = 0.5


class MetricsBuffer:
    """Device metrics of the latest steps, fetched some steps late and many at a time.

    Args:
      log_every: fetch at the latest when so many steps are waiting (and `_LAG` more are in flight).
    """

    def __init__(self, log_every: int):
        self._log_every = log_every
        self._waiting: deque[tuple[dict[str, Any], dict[str, Any]]] = deque()
        self._fetched_at = time.perf_counter()

    def add(self, host: dict[str, Any], device: dict[str, Any]) -> None:
        """One step: what the host knows of it, and its metrics on the device."""
        self._waiting.append((host, device))

    def ready(self, *, everything: bool = False) -> list[dict[str, Any]]:
        """Records of finished steps, oldest first; often none. `everything` waits for all of them."""
        take = len(self._waiting) if everything else self._finished()
        if take == 0:
            return []
        batch = [self._waiting.popleft() for _ in range(take)]
        values = jax.device_get([device for _, device in batch])
        self._fetched_at = time.perf_counter()
        return [host | _plain(value) for (host, _), value in zip(batch, values, strict=True)]

    def _finished(self) -> int:
        behind = len(self._waiting) - _LAG
        if behind >= self._log_every:
            return behind
        # Slow steps: show what is done without waiting for it.
        if behind > 0 and time.perf_counter() - self._fetched_at > _POLL_SECONDS:
            done = 0
            for _, device in self._waiting:
                if not all(array.is_ready() for array in device.values()):
                    break
                done += 1
            return done
        return 0


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value if value.ndim else value.item() for name, value in values.items()}


class JsonLines:
    """metrics.jsonl: one JSON object a line; NaN and infinities are null.

    Args:
      path: the file. Records after `keep_through` are dropped from an existing one, so that a resumed run does not
        have steps twice.
      keep_through: the last step to keep, 0 for a new file.

    Raises:
      RunError: from every method, when the disk is full.
    """

    def __init__(self, path: Path, *, keep_through: int = 0):
        kept = []
        if keep_through and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the last line of a killed run may be cut
                if record.get("step", 0) <= keep_through:
                    kept.append(line + "\n")
        self.path = path
        write_atomic(path, "".join(kept))
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        with _as_run_error(self.path):
            self._file.write(json.dumps({name: _jsonable(value) for name, value in record.items()}) + "\n")

    def flush(self) -> None:
        with _as_run_error(self.path):
            self._file.flush()

    def close(self) -> None:
        with _as_run_error(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


@contextlib.contextmanager
def _as_run_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: could not be written ({error.strerror}); free space and resume.") from error


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """A bar on a terminal; elsewhere one line every `log_every` steps.

    Args:
      total: steps of the whole run.
      done: steps that a resumed run starts from.
      log_every: steps between two lines where there is no terminal.
      stream: where to write; standard output by default.
    """

    def __init__(self, total: int, *, done: int = 0, log_every: int = 10, stream: TextIO | None = None):
        from rich.console import Console

        self._total, self._log_every = total, log_every
        self.console = Console(file=stream or sys.stdout, highlight=False)
        self._bar: Any = None
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self._task = self._bar.add_task("starting", total=total, completed=done)
            self._bar.start()

    def step(self, record: dict[str, Any]) -> None:
        """Show one step's record."""
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=describe(record))
        elif record["step"] % self._log_every == 0 or record["step"] in (1, self._total):
            self.say(f"step {record['step']:>{len(str(self._total))}}/{self._total}  {describe(record)}")

    def say(self, text: str) -> None:
        """Print a line (above the bar)."""
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(record: dict[str, Any]) -> str:
    """One line of a step: loss, gradient norm, learning rate, real tokens a second, MFU, device memory."""
    parts = [f"loss {record['loss']:.4f}", f"grad norm {record['grad_norm']:.3g}"]
    if "learning_rate" in record:
        parts.append(f"lr {record['learning_rate']:.2e}")
    if record.get("tokens_per_second"):
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    if record.get("mfu"):
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    if record.get("peak_device_bytes"):
        parts.append(f"{record['peak_device_bytes'] / 2**30:.1f} GiB")
    if record.get("skipped"):
        parts.append(f"{record['skipped']} skipped")
    if "loss_scale" in record:
        parts.append(f"loss scale {record['loss_scale']:g}, {record['overflowed']} overflowed")
    return "  ".join(parts)


def peak_device_bytes() -> int | None:
    """The most bytes that the first device had in use since the process began; None where it does not say (CPU)."""
    statistics = jax.local_devices()[0].memory_stats()
    return None if not statistics else statistics.get("peak_bytes_in_use")
