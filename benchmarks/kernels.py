"""Each kernel beside its oracle under jit, cuDNN and tokamax, with its share of this device's measured ceiling.

The ceilings, a bf16 product and a copy, are measured in the same run. Rates count what the op needs: attention the
pairs that are visible, the others the bytes that must be read and written once. Everything is compiled in threads
first.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --only attention --no-oracle
"""

import argparse
import concurrent.futures
import os
import re
import time
import traceback
from typing import Any

import common
import jax
import jax.numpy as jnp
import kernel_cases
from kernel_case import Case


def compile_case(case: Case) -> tuple[Any, Any]:
    """(forward, backward), compiled for the case's abstract arguments; backward None where only forward is asked."""
    arguments = jax.eval_shape(case.arguments)
    forward = jax.jit(lambda *a: case.function(*a))
    if not case.gradient:
        return forward.trace(*arguments).lower().compile(), None
    # The residuals cross from one program to the other as they do between the two halves of a training step.
    split = jax.jit(lambda *a: jax.vjp(lambda *d: case.function(*d, *a[case.wrt :]), *a[: case.wrt]))
    out, pull = jax.eval_shape(split, *arguments)
    backward = jax.jit(lambda pull, cotangent: pull(cotangent))
    return (
        split.trace(*arguments).lower().compile(),
        backward.trace(pull, out).lower().compile(),
    )


def measure(arguments: tuple[Any, ...], compiled: tuple[Any, Any], samples: int) -> dict[str, Any]:
    """Milliseconds and temporary memory of what the case asks for."""
    program, backward = compiled
    timed, inputs = program, arguments
    if backward is not None:
        out, pull = program(*arguments)
        timed, inputs = backward, (pull, jax.tree.map(jnp.ones_like, out))
    once = common.milliseconds(timed, *inputs, repeats=2, samples=1)
    repeats = max(2, min(50, int(20 / once)))
    memory = timed.memory_analysis()
    return {
        "milliseconds": common.milliseconds(timed, *inputs, repeats=repeats, samples=samples),
        "temporary_gib": None if memory is None else memory.temp_size_in_bytes / 2**30,
    }


def ceilings() -> dict[str, float]:
    """TFLOP/s of a bf16 product, TB/s of an elementwise copy."""
    a = jax.random.normal(jax.random.key(0), (8192, 4096), jnp.bfloat16)
    b = jax.random.normal(jax.random.key(1), (4096, 14336), jnp.bfloat16)
    product = common.milliseconds(jax.jit(jnp.matmul), a, b, repeats=20)
    x = jnp.zeros((2**29,), jnp.bfloat16)
    copy = common.milliseconds(jax.jit(jnp.negative), x, repeats=10)
    return {
        "TFLOP/s": 2 * 8192 * 4096 * 14336 / product / 1e9,
        "TB/s": 2 * x.nbytes / copy / 1e9,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser, "kernels")
    parser.add_argument("--only", default="", help="a regular expression of ops and cases")
    parser.add_argument("--no-oracle", action="store_true", help="leave the oracles out")
    parser.add_argument("--quick", action="store_true", help="three samples, not five")
    parser.add_argument(
        "--budget", type=float, default=110.0, help="seconds after which nothing more is started"
    )
    options = parser.parse_args()
    start = time.perf_counter()
    cases = [
        case
        for case in kernel_cases.cases()
        if re.search(options.only, f"{case.op} {case.name} {case.direction}")
        and not (options.no_oracle and case.implementation == "xla")
    ]
    ceiling = ceilings()  # while nothing else keeps the card or Python busy
    print("ceilings: " + ", ".join(f"{value:.3g} {unit}" for unit, value in ceiling.items()), flush=True)
    pool = concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 4) - 2))
    try:
        makers = {
            f: pool.submit(jax.jit(f).trace().lower().compile)
            for f in dict.fromkeys(c.arguments for c in cases)
        }
        futures = [pool.submit(compile_case, case) for case in cases]
        # XLA tries products out on the GPU while it compiles: nothing is timed before it has ended. What has not begun
        # to compile when half of the time is over is left out.
        concurrent.futures.wait(futures, timeout=options.budget / 2)
        concurrent.futures.wait([future for future in futures if not future.cancel()])
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
        rows, made, arguments = [], None, ()
        for case, future in zip(cases, futures, strict=True):
            row: dict[str, Any] = case.row()
            left = options.budget - (time.perf_counter() - start)
            try:
                if left <= 0 or future.cancelled():
                    raise TimeoutError("the budget was used up")
                if case.arguments is not made:
                    made, arguments = case.arguments, ()
                    arguments = makers[made].result()()
                row |= measure(arguments, future.result(timeout=left), 3 if options.quick else 5)
                row["rate"] = case.work / row["milliseconds"] / 1e9
                row["share_of_ceiling"] = row["rate"] / ceiling[case.unit]
            except Exception as error:  # one implementation that cannot run must not hide the others
                row["failed"] = "".join(traceback.format_exception_only(error)).strip().splitlines()[0][:200]
            rows.append(row)
            print(line(row), flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    compare(rows)
    record = {**common.environment(options.commit, "tokamax"), "ceilings": ceiling, "rows": rows}
    record["seconds"] = time.perf_counter() - start
    name = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    out = options.out if options.out.name != "kernels.json" else options.out.with_name(f"kernels-{name}.json")
    common.write(out, record)
    return 0


def compare(rows: list[dict[str, Any]]) -> None:
    """Into each row of ours, how many times as fast it is as each other implementation of the same case."""

    def same(row):
        return row["op"], row["case"], row["direction"]

    for row in rows:
        if row["implementation"] != "pallas" or "milliseconds" not in row:
            continue
        row["speed_against"] = {
            other["implementation"]: other["milliseconds"] / row["milliseconds"]
            for other in rows
            if same(other) == same(row) and other is not row and "milliseconds" in other
        }


def line(row: dict[str, Any]) -> str:
    """One line of the printed table."""
    head = f"{row['op']:<20} {row['case']:<34} {row['direction']:<9} {row['implementation']:<8}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    memory = f"{row['temporary_gib']:6.2f} GiB" if row.get("temporary_gib") else ""
    return (
        f"{head} {row['milliseconds']:9.3f} ms {row['rate']:8.2f} {row['unit']:<7} "
        f"{row['share_of_ceiling']:6.1%} {memory}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
