"""What one rendering of a chat template may cost: the `Meter`, and the filters whose result can be a product.

A filter here pays for what it makes before it makes it, then calls jinja2's own. The way in is `template_sandbox`.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from string import Formatter
from typing import Any

MAX_DEPTH = 100  # nesting of containers
MAX_WIDTH = 10_000  # padding asked of center, indent, '%9d' and the like
LOOK_AFTER = 0.05  # seconds; a usual rendering takes 0.0001
SECONDS, SECONDS_PER_CHAR = 0.2, 1e-6  # of processor time after that
BUDGET, BUDGET_PER_CHAR = 8_000_000, 64  # characters and elements made in one rendering
WEIGHT, WEIGHT_PER_CHAR = 400_000, 16  # of one value


class LimitError(Exception):
    """A rendering went over a limit of the sandbox."""


class Meter:
    """Counts what one rendering costs. `start` begins a rendering; every other method may raise `LimitError`."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, input_chars: int) -> None:
        self._started = time.perf_counter()
        self._seconds = SECONDS + SECONDS_PER_CHAR * input_chars
        self._deadline: float | None = None
        self._left = BUDGET + BUDGET_PER_CHAR * input_chars
        self._max_weight = WEIGHT + WEIGHT_PER_CHAR * input_chars
        self._ticks = 0
        # id -> (the container, its weight, its depth); holding the container keeps its id from being used again
        self._weights: dict[int, tuple[Any, int, int]] = {}

    def tick(self) -> None:
        self._ticks += 1
        # Reading the thread's processor time is a slow system call, which a usual rendering never comes to.
        if self._ticks % 8 == 0 and time.perf_counter() - self._started > LOOK_AFTER:
            now = time.thread_time()
            if self._deadline is None:
                self._deadline = now + self._seconds
            elif now > self._deadline:
                raise LimitError("it runs for too long")

    def charge(self, amount: int) -> None:
        """Pay for `amount` characters or elements that are about to be made."""
        self._left -= amount
        if self._left < 0 or amount > self._max_weight:
            raise LimitError("it makes too much text")

    def account(self, value: Any) -> Any:
        """Pay for a value that was just made, and look at its shape. Returns it."""
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, list | tuple | dict):
            self.charge(len(value))
            self.weigh(value)
        return value

    def weigh(self, value: Any, level: int = 0) -> tuple[int, int]:
        """(expanded weight in characters and elements, depth) of a value; linear, shared parts looked up."""
        if isinstance(value, str):
            return len(value) + 1, 0
        if not isinstance(value, list | tuple | dict):
            return 1, 0
        known = self._weights.get(id(value))
        if known is not None:
            return known[1], known[2]
        weight, depth = 1, 0
        if level > MAX_DEPTH:
            raise LimitError("a value is nested too deeply")
        parts = [x for item in value.items() for x in item] if isinstance(value, dict) else value
        for part in parts:
            part_weight, part_depth = self.weigh(part, level + 1)
            weight, depth = weight + part_weight, max(depth, part_depth + 1)
        if weight > self._max_weight:
            raise LimitError("a value grows too large")
        if depth > MAX_DEPTH:
            raise LimitError("a value is nested too deeply")
        self._weights[id(value)] = (value, weight, depth)
        return weight, depth

    def each(self, values: Any) -> Iterator[Any]:
        for value in values:
            self.tick()
            yield value

    def total_weight(self, *values: Any) -> int:
        return sum(self.weigh(value)[0] for value in values)

    def width(self, value: Any) -> int:
        """A padding width, checked."""
        if not isinstance(value, int) or abs(value) > MAX_WIDTH:
            raise LimitError(f"a width must be a whole number of at most {MAX_WIDTH}")
        return value

    def short(self, text: Any, limit: int) -> str:
        """A text option, checked."""
        if not isinstance(text, str) or len(text) > limit:
            raise LimitError(f"an option must be text of at most {limit} characters")
        return text

    def charge_percent(self, template: str, values: Any) -> None:
        """Pay for `template % values`."""
        if "*" in template or re.search(r"\d{5}", template):
            raise LimitError("a format width is too large")
        self.charge(len(template) + template.count("%") * self.total_weight(values))

    def charge_format(self, template: str, values: Any) -> None:
        """Pay for `template.format(values)`."""
        fields = 0
        for _, field, spec, _ in Formatter().parse(template):
            fields += field is not None
            if spec and ("{" in spec or re.search(r"\d{5}", spec)):
                raise LimitError("a format width is too large")
        self.charge(len(template) + fields * self.total_weight(values))

    def charge_replace(self, text: str, old: Any, new: Any) -> None:
        """Pay for `text.replace(old, new)`."""
        if isinstance(old, str) and isinstance(new, str):
            self.charge(len(text) + text.count(old) * len(new))


def _replace(meter: Meter, original: Callable, eval_ctx: Any, s: str, old: str, new: str, count=None):
    meter.charge_replace(str(s), str(old), str(new))
    return original(eval_ctx, s, old, new, count)


def _join(meter: Meter, original: Callable, eval_ctx: Any, value: Any, d: Any = "", attribute=None):
    values = list(meter.each(value))
    meter.charge(len(str(d)) * len(values) + meter.total_weight(values))
    return original(eval_ctx, values, d, attribute)


def _list(meter: Meter, original: Callable, eval_ctx: Any, value: Any) -> list:
    return list(meter.each(value))


def _sum(
    meter: Meter,
    original: Callable,
    environment: Any,
    iterable: Any,
    attribute=None,
    start: Any = 0,
):
    values = list(meter.each(iterable))
    if any(isinstance(value, str | list | tuple) for value in (*values, start)):
        raise LimitError("sum adds numbers only")  # adding lists up takes quadratic time
    return original(environment, values, attribute, start)


def _indent(meter: Meter, original: Callable, s: str, width: Any = 4, first=False, blank=False):
    columns = len(width) if isinstance(width, str) else abs(meter.width(width))
    meter.charge(len(str(s)) + (str(s).count("\n") + 2) * columns)
    return original(s, width, first, blank)


def _batch(meter: Meter, original: Callable, value: Any, linecount: int, fill_with: Any = None) -> list:
    meter.charge(meter.width(linecount) * meter.total_weight(fill_with))
    return list(meter.each(original(value, linecount, fill_with)))


def _slice(
    meter: Meter,
    original: Callable,
    eval_ctx: Any,
    value: Any,
    slices: int,
    fill_with: Any = None,
) -> list:
    meter.charge(meter.width(slices) * meter.total_weight(fill_with))
    return list(meter.each(original(eval_ctx, value, slices, fill_with)))


def _round(meter: Meter, original: Callable, value: Any, precision: int = 0, method: Any = "common"):
    if not isinstance(precision, int) or abs(precision) > 100:
        raise LimitError("round takes at most 100 digits")
    return original(value, precision, method)


def _format(meter: Meter, original: Callable, value: str, *args: Any, **kwargs: Any) -> str:
    meter.charge_percent(str(value), (*args, kwargs))
    return original(value, *args, **kwargs)


def tojson(
    meter: Meter,
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it: no HTML escapes. Written in pieces, each paid for, when it is indented."""
    for option in (indent, *(separators or ())):
        if isinstance(option, str):
            meter.short(option, 16)
        elif isinstance(option, int) and abs(option) > 16:
            raise LimitError("tojson indents by at most 16")
    meter.tick()
    meter.weigh(x)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return meter.account(encoder.encode(x))
    pieces = []
    for piece in encoder.iterencode(x):
        meter.tick()
        meter.charge(len(piece))
        pieces.append(piece)
    return "".join(pieces)


BOUNDED_FILTERS: dict[str, Callable] = {
    "batch": _batch,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "list": _list,
    "replace": _replace,
    "round": _round,
    "slice": _slice,
    "sum": _sum,
}
