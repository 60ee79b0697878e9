"""Measure what a kernel may be launched with on the device at hand, and keep the fastest choice that is right.

For each job (a kernel at one size, autotune_jobs.py) every candidate is compiled ahead in threads, checked against the
oracle, and timed; the three fastest are then timed again in turns, since a GPU's clock drifts with its temperature. A
candidate that does not fit, compile or match is named with its reason and left out. When the time is used up, what is
left is named and not measured, and a job of which nothing was measured keeps what it had.
"""

import concurrent.futures
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pronghorn.pallas_kernels import tuned
from pronghorn.pallas_kernels.tuned import Choice

# Largest |fast − oracle| over the largest |oracle| of a 16-bit result: two units in the last place of bf16.
LIMIT = 1.6e-2
FINALISTS = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel at one size.

    Attributes:
      op, key: the entry in the device's file.
      label: what the size is, for people.
      arguments: makes the arrays; traced, as are the next three.
      run: (arguments) -> outputs; the launch, under `tuned.candidate`.
      expected: what `part` of the outputs must be, by the oracle; takes no arguments.
      part: the outputs that are compared.
      candidates: launch parameters to try, the likeliest first.
      work: (amount, unit): FLOPs or bytes of one call, in 1e12, so that amount / seconds is a rate in T{unit}.
      too_large: why a candidate cannot run on this device, or None.
    """

    op: str
    key: str
    label: str
    arguments: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    expected: Callable[[], Any]
    part: Callable[[Any], Any]
    candidates: tuple[Choice, ...]
    work: tuple[float, str]
    too_large: Callable[[Choice], str | None] = lambda _: None


def tune(
    jobs: Sequence[Job],
    *,
    budget: float,
    print_line: Callable[[str], None] = print,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """One row a candidate: op, key, label, choice, and milliseconds and rate, or the reason why not; `best` marks the
    fastest of its job.

    Args:
      budget: seconds after which nothing more is started.
      threads: compilations at once; by default one a CPU core but two.
    """
    start = time.perf_counter()

    def left() -> float:
        return budget - (time.perf_counter() - start)

    rows: list[dict[str, Any]] = []
    pool = concurrent.futures.ThreadPoolExecutor(threads or max(1, (os.cpu_count() or 4) - 2))
    try:
        # Jobs share functions: each is compiled once, and before the candidates.
        makers = {f: pool.submit(_compile_maker, f) for job in jobs for f in (job.arguments, job.expected)}
        compiled = [
            [
                pool.submit(_compile, job, choice) if job.too_large(choice) is None else None
                for choice in job.candidates
            ]
            for job in jobs
        ]
        # Tracing holds Python's lock for milliseconds at a time, and a launch would wait for it: compile first.
        pending = [future for futures in compiled for future in futures if future is not None]
        concurrent.futures.wait([*makers.values(), *pending], timeout=max(0.0, min(left(), budget / 2)))
        for job, futures in zip(jobs, compiled, strict=True):
            found = _measure(job, futures, makers, left)
            rows += found
            _print(job, found, print_line)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return rows


def choices(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Choice]]:
    """The best rows as `tuned.write` takes them."""
    found: dict[str, dict[str, Choice]] = {}
    for row in rows:
        if row.get("best"):
            found.setdefault(row["op"], {})[row["key"]] = tuple(row["choice"])
    return found


def _compile(job: Job, choice: Choice):
    # A function object of its own: jax would find another candidate's trace under the same one.
    with tuned.candidate(job.op, choice):
        arguments = jax.eval_shape(job.arguments)
        return jax.jit(lambda *a: job.run(*a)).trace(*arguments).lower().compile()


def _compile_maker(function: Callable[[], Any]):
    return jax.jit(function).trace().lower().compile()


@jax.jit
def _largest_error(found, expected):
    """max |found − expected| / max |expected|; NaN stays NaN and so never passes."""

    def one(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(one, found, expected))))


def error(job: Job, found: Any, expected: Any) -> float:
    """|fast − oracle| / |oracle|, both at their largest, of the outputs of `job.run`."""
    return float(_largest_error(job.part(found), expected))


def _measure(
    job: Job, futures: Sequence[Any], makers: dict[Any, Any], left: Callable[[], float]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"op": job.op, "key": job.key, "label": job.label, "choice": list(c)} for c in job.candidates
    ]
    arguments = expected = None
    programs: dict[int, Any] = {}
    for index, (row, future) in enumerate(zip(rows, futures, strict=True)):
        if future is None:
            row["skipped"] = job.too_large(job.candidates[index])
            continue
        if left() <= 0:
            row["skipped"] = "the budget was used up"
            continue
        try:
            program = future.result(timeout=max(1.0, left()))
            if arguments is None:
                arguments, expected = (makers[f].result()() for f in (job.arguments, job.expected))
            row["error"] = error(job, program(*arguments), expected)
            if not row["error"] <= LIMIT:
                row["skipped"] = f"departs from the oracle by {row['error']:.1e}"
                continue
            row["milliseconds"] = _milliseconds(program, arguments, samples=2)
            programs[index] = program
        except concurrent.futures.TimeoutError:
            row["skipped"] = "the budget was used up while it compiled"
        except Exception as failure:  # whatever the compiler or the driver says, the next candidate may run
            lines = str(failure).splitlines()
            row["skipped"] = f"{type(failure).__name__}: {lines[0][:160] if lines else ''}"
    finalists = sorted(programs, key=lambda i: rows[i]["milliseconds"])[:FINALISTS]
    if len(finalists) > 1:
        rounds = [[_milliseconds(programs[i], arguments, samples=1) for i in finalists] for _ in range(3)]
        for position, index in enumerate(finalists):
            rows[index]["milliseconds"] = statistics.median(times[position] for times in rounds)
    amount, unit = job.work
    for index in programs:
        rows[index]["rate"] = amount / (rows[index]["milliseconds"] * 1e-3)
        rows[index]["unit"] = f"T{unit}/s"
    if finalists:
        rows[min(finalists, key=lambda i: rows[i]["milliseconds"])]["best"] = True
    return rows


def _milliseconds(program, arguments, *, samples: int) -> float:
    """Time of one call, about 8 ms of them queued at once so that the host's dispatch is hidden."""

    def seconds(repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            out = program(*arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / repeats

    once = min(seconds(1), seconds(2))
    repeats = max(3, min(100, int(8e-3 / max(once, 1e-6))))
    return min(seconds(repeats) for _ in range(samples)) * 1e3


def _print(job: Job, rows: Sequence[dict[str, Any]], print_line: Callable[[str], None]) -> None:
    print_line(f"{job.op}  {job.key}  {job.label}")
    for row in sorted(rows, key=lambda r: r.get("milliseconds", float("inf"))):
        name = ",".join(map(str, row["choice"]))
        if "milliseconds" in row:
            mark = "  <- best" if row.get("best") else ""
            print_line(f"  {name:<16} {row['milliseconds']:8.3f} ms  {row['rate']:8.2f} {row['unit']}{mark}")
        else:
            print_line(f"  {name:<16} skipped: {row['skipped']}")
