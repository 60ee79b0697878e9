"""SIGTERM and Ctrl-C as a request to finish the step, save and return."""

import signal
import threading
from types import FrameType
from typing import Any


class Interruption:
    """While the block runs, the first SIGTERM or Ctrl-C sets `requested`; a second Ctrl-C interrupts as usual.

    Signals can only be caught in the main thread; elsewhere the block does nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
