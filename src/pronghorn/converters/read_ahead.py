"""Tensors of files read by threads before they are asked for, within a budget of host memory."""

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

THREADS = 8
# Read and not asked for yet. A disk, or the system's cache of it, is as fast with this as with more.
BUDGET_BYTES = 1 << 30


class ReadAhead:
    """Reads tensors in a known order, ahead of whoever asks for them.

    Args:
      table: {name: tensor}, anything with `read()` and `nbytes`.
      order: the names in the order they will be asked for. Another order is right too, and slower.
      budget: bytes that are read before they are asked for, at most, but always one tensor; by default BUDGET_BYTES.
    """

    def __init__(self, table: Mapping[str, Any], order: Iterable[str], *, budget: int | None = None):
        self._table = table
        self._waiting = deque(order)
        self._budget = BUDGET_BYTES if budget is None else budget
        self._reading: dict[str, Future] = {}
        self._bytes = 0
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="pronghorn-read")

    def read(self, name: str) -> Any:
        """What `table[name].read()` returns or raises."""
        future = self._reading.pop(name, None)
        if future is not None:
            self._bytes -= self._table[name].nbytes
        self._start_more()
        return self._table[name].read() if future is None else future.result()

    def close(self) -> None:
        """End the threads; what nobody asked for is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reading.clear()

    def _start_more(self) -> None:
        while self._waiting:
            size = self._table[self._waiting[0]].nbytes
            if self._reading and self._bytes + size > self._budget:
                return
            name = self._waiting.popleft()
            self._reading[name] = self._pool.submit(self._table[name].read)
            self._bytes += size

    def __enter__(self) -> "ReadAhead":
        self._start_more()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
