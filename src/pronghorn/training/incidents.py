"""incidents.jsonl: which batch, and which rows, made a loss jump or a number that is not finite.

A spike is a loss more than `deviations` robust standard deviations (1.4826 times the median distance from the median)
above the median of the last `_WINDOW` finite losses, once there are `_ENOUGH` of them; the deviation counts as at least
2 % of the median, so that a run whose losses hardly differ has no spikes of nothing.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pronghorn.training.metrics import JsonLines

_WINDOW, _ENOUGH = 64, 16
_SHOWN = 6


class Incidents:
    """Looks at every step's record, writes what is unusual and says it.

    Args:
      path: of incidents.jsonl.
      deviations: how far above is a spike; None looks for what is not finite only.
      rows_of: the rows of a step, counted from 1.
      say: told one sentence an incident.
      keep_through: as in `JsonLines`.
    """

    def __init__(
        self,
        path: Path,
        deviations: float | None,
        rows_of: Callable[[int], list[str]],
        say: Callable[[str], None],
        *,
        keep_through: int = 0,
    ):
        self._path, self._keep_through = path, keep_through
        self._deviations, self._rows_of, self._say = deviations, rows_of, say
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._file: JsonLines | None = None
        self.count = 0
        if path.is_file():
            self._open()  # drop what a resumed run will do again

    def see(self, record: dict[str, Any], *, applied: bool) -> None:
        """One step's record, with `loss`, `grad_norm` and `step`."""
        loss, norm = record["loss"], record["grad_norm"]
        if not applied:
            if record["token_count"]:
                self._note(
                    "not finite",
                    record,
                    f"loss {loss:.4g}, gradient norm {norm:.4g}; the update was left out",
                )
            return
        if self._deviations is not None and len(self._recent) >= _ENOUGH:
            usual = statistics.median(self._recent)
            spread = 1.4826 * statistics.median(abs(value - usual) for value in self._recent)
            if loss > usual + self._deviations * max(spread, 0.02 * abs(usual)):
                self._note("loss spike", record, f"loss {loss:.4f} where {usual:.4f} is usual")
        if math.isfinite(loss):
            self._recent.append(loss)

    def _note(self, kind: str, record: dict[str, Any], text: str) -> None:
        rows = self._rows_of(record["step"])
        self.count += 1
        if self._file is None:
            self._open()
        assert self._file is not None
        wanted = {name: record[name] for name in ("step", "loss", "grad_norm", "token_count")}
        self._file.write({"kind": kind, **wanted, "batch": record["step"] - 1, "rows": rows})
        self._file.flush()
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        self._say(f"step {record['step']}: {kind}, {text}; its rows are {', '.join(rows[:_SHOWN])}{more}.")

    def _open(self) -> None:
        self._file = JsonLines(self._path, keep_through=self._keep_through)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
