"""The longest row that NF4 LoRA trains on within a pool of device memory, and one real step of it.

Llama-3.1-8B shape, r=32 on all seven linears, batch 1. Pools of N GB are N 10^9 bytes. The search reads the compiled
step's memory: device memory grows linearly with the row from a few thousand tokens on, so two compilations give a line
and one or two more correct its answer. --run takes one step of the answer in a process whose pool is capped, so that
an allocation past it fails as it would on a smaller card; host memory is stated.

    python benchmarks/longest_context.py                      # all pools, by the compiled program
    python benchmarks/longest_context.py --pools 24 --run     # and a real step
    JAX_PLATFORMS=cpu python benchmarks/longest_context.py --target h100   # compiled for a GPU that is not there
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common

# What Unsloth publishes for this model, rank and batch, by pool in GB.
PUBLISHED = {8: 2972, 12: 21848, 16: 40724, 24: 78475, 48: 191728, 80: 342733}
MULTIPLE = 256
# The allocator's gaps, and what a process holds that is in no program.
USABLE = 0.985
# The first words of the client's settings, by version of jaxlib.
CLIENT = "XLA_CLIENT" if tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 12) else "XLA_PYTHON_CLIENT"
PREALLOCATE = f"{CLIENT}_PREALLOCATE"


def train_config(tokens: int, options: argparse.Namespace) -> Any:
    from pronghorn.training.config import TrainConfig

    return TrainConfig(
        learning_rate=1e-4,
        max_steps=1000,
        schedule="constant",
        memory_policy=options.memory_policy,
        mlp_tile_tokens=min(options.mlp_tile_tokens, max(1024, tokens // 16)),
        head_tile_rows=options.head_tile_rows,
        **({"optimizer": options.optimizer} if options.optimizer else {}),
    )


def planned(tokens: int, options: argparse.Namespace) -> tuple[int, int]:
    """(device bytes, pinned host bytes) of the compiled step for one row of `tokens`."""
    import jax.numpy as jnp
    import shapes

    import pronghorn as ph
    from pronghorn.quantization import QuantizationConfig
    from pronghorn.training import plan_memory

    plan = plan_memory(
        shapes.MODELS[options.model],
        ph.LoRAConfig(rank=options.rank, alpha=options.rank),
        train_config(tokens, options),
        jnp.bfloat16,
        max_length=tokens,
        layers=options.layers,
        packing=False,
        quantization=QuantizationConfig("nf4"),
    )
    print(
        f"  {tokens:>8,} tokens: device {plan.peak_device_bytes / 1e9:.2f} GB, pinned {plan.pinned_host / 2**30:.1f} "
        f"GiB, compiled in {plan.compile_seconds:.0f} s",
        flush=True,
    )
    return plan.peak_device_bytes, plan.pinned_host


def longest(pool: int, known: dict[int, tuple[int, int]], options: argparse.Namespace) -> int | None:
    """Tokens of the longest row that fits, up to a multiple; `known` collects what was compiled."""
    limit = USABLE * pool * 1e9

    def device(tokens: int) -> int:
        if tokens not in known:
            known[tokens] = planned(tokens, options)
        return known[tokens][0]

    for tokens in (options.first, 4 * options.first):
        device(tokens)
    best: int | None = None
    tried: set[int] = set()
    for _ in range(options.compilations):
        below = max((t for t in known if known[t][0] <= limit), default=None)
        above = min((t for t in known if known[t][0] > limit), default=None)
        ends = sorted(known)
        if below is not None and above is not None:
            one, other = below, above
        else:
            one, other = (ends[0], ends[1]) if below is None else (ends[-2], ends[-1])
        slope = (known[other][0] - known[one][0]) / (other - one)
        guess = int(one + (limit - known[one][0]) / slope) // MULTIPLE * MULTIPLE
        if guess < MULTIPLE or guess in known or guess in tried:
            break
        tried.add(guess)
        device(guess)
        best = max((t for t in known if known[t][0] <= limit), default=None)
        if best is not None and limit - known[best][0] < 0.01 * limit:
            break
    return max((t for t in known if known[t][0] <= limit), default=best)


def compacted(leaves: list[Any]) -> list[Any]:
    """The same arrays side by side, the largest first, by way of the host: no holes of loading are left between them.

    Whether such holes are why a step fails in a pool that its plan fits is what --compact is there to find out.
    """
    import jax
    import numpy as np

    kept = [np.array(leaf) for leaf in leaves]
    for leaf in leaves:
        leaf.delete()
    moved: dict[int, Any] = {}
    for place in sorted(range(len(kept)), key=lambda place: -kept[place].nbytes):
        moved[place] = jax.block_until_ready(jax.device_put(kept[place]))
    return [moved[place] for place in range(len(kept))]


def real_step(tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """One optimizer step on random weights and tokens, in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import random_weights
    import shapes

    import pronghorn as ph
    from pronghorn.training.memory_plan import plan_from_compiled, prepare_step, start_state
    from pronghorn.training.step import compile_step

    config = shapes.MODELS[options.model]

    def parts_of(make_model: Callable[..., Any]) -> tuple[Any, Any, Any]:
        model = make_model(config, "nf4", dtype=jnp.bfloat16, layers=options.layers)
        return ph.split(ph.add_lora(model, ph.LoRAConfig(rank=options.rank, alpha=options.rank)))

    # Compiled before any weight is on the device, where XLA's trials of products would lie beside them.
    graph, trainable, frozen = parts_of(random_weights.abstract_model)
    train = train_config(tokens, options)
    prepared = prepare_step(graph, trainable, train, 1000)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 1, tokens), np.int32)
    positions = np.arange(tokens, dtype=np.int32)[None, None]
    batch = {"input_ids": ids, "labels": ids, "positions": positions}
    compiled = compile_step(prepared.step, prepared.state, frozen, batch, memory_policy=train.memory_policy)
    plan = plan_from_compiled(
        config,
        compiled.executable,
        prepared.state,
        trainable,
        frozen,
        (1, 1, tokens),
        memory_policy=train.memory_policy,
        compile_seconds=compiled.seconds,
    )
    compiled_for = random_weights.shapes_of((prepared.state, frozen))
    _, trainable, frozen = parts_of(random_weights.random_model)
    state = start_state(trainable, prepared.optimizer, train)
    random_weights.require_shapes((state, frozen), compiled_for, options.model)
    leaves, batch = jax.tree.leaves(state), jax.device_put(batch)
    del trainable, state
    frozen_leaves = jax.tree.leaves(frozen)
    jax.block_until_ready((leaves, frozen_leaves))
    if options.compact:
        del frozen
        together = compacted([*leaves, *frozen_leaves])
        leaves, frozen_leaves = together[: len(leaves)], together[len(leaves) :]
    start = time.perf_counter()
    leaves, metrics = compiled(leaves, frozen_leaves, batch)
    loss = float(metrics["loss"])
    seconds = time.perf_counter() - start
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "planned_device_gb": plan.peak_device_bytes / 1e9,
        "pinned_host_gib": plan.pinned_host / 2**30,
        "compile_seconds": plan.compile_seconds,
        "loss": loss,
        "grad_norm": float(metrics["grad_norm"]),
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_device_bytes": memory.get("peak_bytes_in_use"),
        "pool_bytes": memory.get("bytes_limit"),
        "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def capped_step(pool: int, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """`real_step` in a process of its own that may have `pool` GB of the device."""
    environment = {k: v for k, v in os.environ.items() if "CLIENT_MEM_FRACTION" not in k and k != PREALLOCATE}
    environment[f"{CLIENT}_MEM_FRACTION"] = f"{pool * 1e9 / options.device_bytes:.6f}"
    # XLA gives pinned memory out of a pool of 64 GB unless told otherwise.
    environment["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] = str(options.host_gb)
    command = [sys.executable, __file__, "--child", str(tokens), *sys.argv[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": (done.stderr or done.stdout).strip().splitlines()[-1:]}
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser, "longest-context")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--pools", type=int, nargs="+", default=sorted(PUBLISHED), help="GB")
    parser.add_argument("--memory-policy", default="offload")
    parser.add_argument("--mlp-tile-tokens", type=int, default=4096)
    parser.add_argument("--head-tile-rows", type=int, default=256)
    parser.add_argument("--optimizer", default=None, help="of TrainConfig, where it has several")
    parser.add_argument("--first", type=int, default=8192, help="the shortest row that is compiled")
    parser.add_argument("--compilations", type=int, default=4, help="at most, a pool")
    parser.add_argument("--run", action="store_true", help="take one real step in a capped pool")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=None, help="rows of these lengths, one a pool, not a search"
    )
    parser.add_argument("--at-once", action="store_true", help="pools side by side; times then say little")
    parser.add_argument("--device-bytes", type=float, default=84978434048, help="what a fraction of 1 means")
    parser.add_argument("--host-gb", type=int, default=110, help="pinned host memory that a step may have")
    parser.add_argument("--target", default=None, help="compile for this device instead of the machine's own")
    parser.add_argument("--compact", action="store_true", help="put weights and state side by side first")
    parser.add_argument("--layers", default="unrolled", choices=("unrolled", "scanned"))
    parser.add_argument("--child", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(real_step(options.child, options)), flush=True)
        return
    os.environ[PREALLOCATE] = "false"  # this process only compiles: the device is for the steps it starts
    from pronghorn.target_device import compiling_for

    known: dict[int, tuple[int, int]] = {}
    given = options.tokens or [None] * len(options.pools)
    if options.target and (options.run or options.at_once):
        parser.error("--target compiles alone: without --run and --at-once")

    def measure(pool: int, tokens: int | None) -> dict[str, Any]:
        tokens = tokens or longest(pool, known, options)
        row: dict[str, Any] = {"pool_gb": pool, "tokens": tokens, "published_unsloth": PUBLISHED.get(pool)}
        if tokens is None:
            return row
        if tokens in known or not options.run:
            device, pinned = known.get(tokens) or planned(tokens, options)
            row |= {"planned_device_gb": device / 1e9, "pinned_host_gib": pinned / 2**30}
        if options.run:
            row |= capped_step(pool, tokens, options)
        ratio = f" ({tokens / PUBLISHED[pool]:.2f}x Unsloth's)" if pool in PUBLISHED else ""
        print(f"{pool} GB: longest row {tokens:,} tokens{ratio}, {row}", flush=True)
        return row

    if options.at_once:
        with ThreadPoolExecutor(len(given)) as pool:
            rows = list(pool.map(measure, options.pools, given))
    else:
        with compiling_for(options.target) if options.target else contextlib.nullcontext():
            rows = list(map(measure, options.pools, given))
    settings = {
        name: getattr(options, name)
        for name in (
            "model",
            "rank",
            "memory_policy",
            "mlp_tile_tokens",
            "head_tile_rows",
            "optimizer",
            "layers",
            "compact",
        )
    }
    common.write(
        Path(options.out), {"settings": settings, "rows": rows, **common.environment(options.commit)}
    )


if __name__ == "__main__":
    main()
