"""The gated delta rule beside flash-linear-attention's Triton kernels, forward and backward: one process, one GPU.

Sizes are those of a layer of Qwen3.5 9B, the cases of `mixture_cases.delta_rules`, and every implementation gets the
same numbers. flash-linear-attention takes 16 heads of q and k for 32 of v as they are; it is timed as it is called, and
in a CUDA graph, which no host can slow down: its row has the faster. Largest errors of each are against our fp32
oracle, as shares of its largest value. fla's other backends (tilelang, FlashQLA) compile with nvcc: not measured.

fla refuses its backward pass on Hopper with Triton 3.4 to 3.7.0 (its issue 640): put 3.7.1 in front of it.

    PYTHONPATH=FOLDER_OF_TRITON:FOLDER_OF_FLA python benchmarks/delta_rule_fla.py
"""

import argparse
import concurrent.futures
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory beside jax

import common
import jax
import jax.numpy as jnp
import kernel_case
import kernels
import mixture_cases
import numpy as np

NAMES = ("out", "dq", "dk", "dv", "dg", "dbeta")
# Two units in the last place of bf16, as the tuner asks of every kernel.
LIMIT = 1.6e-2


def as_torch(x: jax.Array, device: str) -> Any:
    """The same numbers and dtype in PyTorch; numpy has no bf16, so the bits travel."""
    import torch

    found = np.array(x)  # a copy: PyTorch wants to be able to write
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(found.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(found).to(device)


def as_numpy(x: Any) -> np.ndarray:
    """fp32, from jax or PyTorch."""
    return np.asarray(x.astype(jnp.float32)) if isinstance(x, jax.Array) else x.detach().float().cpu().numpy()


def compile_outputs(case: kernel_case.Case) -> Any:
    """Compiled, of (cotangent, *arguments): what a case gives and its gradients, in the order of NAMES."""

    def both(cotangent, *arguments):
        out, pull = jax.vjp(case.function, *arguments)
        return out, *pull(cotangent)

    arguments = jax.eval_shape(case.arguments)
    return jax.jit(both).trace(arguments[2], *arguments).lower().compile()


def errors(found: list[np.ndarray], expected: list[np.ndarray]) -> dict[str, float]:
    """max |found - expected| / max |expected| of each output."""
    return {
        name: float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
        for name, a, b in zip(NAMES, found, expected, strict=True)
    }


def event_milliseconds(call: Callable[[], Any], *, samples: int = 5, target: float = 40.0) -> float:
    """Median time of a call by CUDA events, calls queued for about `target` ms a sample."""
    import torch

    def once(repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / repeats

    once(3)  # autotuning, and the clock
    repeats = max(3, min(100, int(target / max(once(3), 1e-3))))
    return statistics.median(once(repeats) for _ in range(samples))


def graph_milliseconds(call: Callable[[], Any], stream: Any) -> float:
    """The same in a CUDA graph of one call."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return event_milliseconds(graph.replay)


def fla_rows(arguments: tuple[jax.Array, ...], cotangent: jax.Array) -> Iterator[tuple[str, dict[str, Any]]]:
    """("outputs", {"all": ...}), then ("forward" or "backward", times) of flash-linear-attention."""
    import torch
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # autograd runs a backward pass where its forward pass ran
        q, k, v, g, beta = inputs = [as_torch(x, "cuda").requires_grad_() for x in arguments]
        gradient = as_torch(cotangent, "cuda")

        def forward():
            return chunk_gated_delta_rule(q, k, v, g, beta)[0]

        out = forward()

        def backward():
            return torch.autograd.grad(out, inputs, gradient, retain_graph=True)

        found = [out, *backward()]
        torch.cuda.synchronize()
        yield "outputs", {"all": [as_numpy(x) for x in found]}
        for direction, call in (("forward", forward), ("backward", backward)):
            eager = event_milliseconds(call)
            row: dict[str, Any] = {"milliseconds": eager, "eager_milliseconds": eager}
            try:
                row["graph_milliseconds"] = graph_milliseconds(call, stream)
                row["milliseconds"] = min(eager, row["graph_milliseconds"])
            except RuntimeError as error:  # a call that cannot be captured is timed as it is
                row["graph_failed"] = str(error).splitlines()[0][:200]
            yield direction, row


def measured(case: kernel_case.Case, row: dict[str, Any], ceiling: float) -> dict[str, Any]:
    """The row, complete, and printed."""
    if "milliseconds" in row:
        row["rate"] = case.work / row["milliseconds"] / 1e9
        row["share_of_ceiling"] = row["rate"] / ceiling
    print(kernels.line(row), flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser, "delta-rule-fla")
    parser.add_argument("--only", default="", help="a regular expression of cases")
    options = parser.parse_args()
    ceiling = kernels.ceilings()
    by_arguments: dict[Any, list[kernel_case.Case]] = {}
    for case in mixture_cases.delta_rules():
        if re.search(options.only, case.name):
            by_arguments.setdefault(case.arguments, []).append(case)
    # Side by side, and before anything is timed.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        every = [case for cases in by_arguments.values() for case in cases]
        programs = dict(zip(map(id, every), pool.map(kernels.compile_case, every), strict=True))
        graded = [case for case in every if case.gradient]
        both = dict(zip(map(id, graded), pool.map(compile_outputs, graded), strict=True))
    rows: list[dict[str, Any]] = []
    for make, cases in by_arguments.items():
        arguments = jax.jit(make)()
        # A gradient of noise: of ones, most of what the gradients sum up would cancel or be far too regular.
        cotangent = kernel_case.normal(9, arguments[2].shape)
        outputs = {
            c.implementation: [as_numpy(x) for x in both[id(c)](cotangent, *arguments)]
            for c in cases
            if c.gradient
        }
        for case in cases:
            row = case.row() | kernels.measure(arguments, programs[id(case)], 5)
            row["errors"] = errors(outputs[case.implementation], outputs["xla"])
            rows.append(measured(case, row, ceiling[case.unit]))
        base = {c.direction: c for c in cases if c.implementation == "pallas"}
        found: dict[str, float] = {}
        done: set[str] = set()
        try:
            for direction, values in fla_rows(arguments, cotangent):
                if direction == "outputs":
                    found = errors(values["all"], outputs["xla"])
                    continue
                done.add(direction)
                row = base[direction].row() | {"implementation": "fla", "errors": found} | values
                rows.append(measured(base[direction], row, ceiling[base[direction].unit]))
        except Exception as error:  # our rows stay, and say so beside it
            message = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            for direction in base.keys() - done:
                row = base[direction].row() | {"implementation": "fla", "failed": message}
                rows.append(measured(base[direction], row, ceiling[base[direction].unit]))
    kernels.compare(rows)
    for row in rows:
        if "errors" in row and row["direction"] == "backward":
            worst = max(row["errors"], key=lambda name: row["errors"][name])
            print(
                f"{row['case']} {row['implementation']}: largest error {row['errors'][worst]:.1e} of {worst}"
            )
    record = common.environment(options.commit, "torch", "triton", "flash-linear-attention", "fla-core")
    record |= {"ceilings": ceiling, "limit": LIMIT, "rows": rows}
    common.write(options.out, record)
    wrong = [row for row in rows if not all(e <= LIMIT for e in row.get("errors", {}).values())]
    for row in wrong:
        print(
            f"{row['case']} {row['implementation']} departs from the oracle: {row['errors']}", file=sys.stderr
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
