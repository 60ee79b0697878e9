"""A LoRA training step of pronghorn: tokens/s, MFU, memory, loss and gradient norm of real optimizer steps.

Random weights of the true shape, random tokens without padding, one document a row unless --documents says more. As in
`pronghorn train` the step is compiled, of shapes, before any weight is on the device.

    python benchmarks/step.py --model llama-3.1-8b --batch 1 --seq 4096 --memory-policy keep
"""

import argparse
import itertools
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import alpaca_like
import common
import jax
import jax.numpy as jnp
import numpy as np
import random_weights
import shapes

import pronghorn as ph
from pronghorn.compile_cache import keep_programs_in
from pronghorn.training.config import TrainConfig
from pronghorn.training.flops import count_flops, device_peak_flops
from pronghorn.training.losses import step_batch
from pronghorn.training.memory_plan import plan_from_compiled, prepare_step, start_state
from pronghorn.training.step import compile_step

WARM_UP = 3


def random_batch(rows: int, tokens: int, documents: int, vocab_size: int) -> dict[str, np.ndarray]:
    """[1, rows, tokens] of random ids in `documents` equal segments a row, all trained."""
    rng = np.random.default_rng(0)
    index = np.arange(tokens)
    length = -(-tokens // documents)
    shape = (1, rows, tokens)
    ids = rng.integers(0, vocab_size, shape, dtype=np.int32)
    return {
        "input_ids": ids,
        "labels": ids,
        "segment_ids": np.broadcast_to(index // length + 1, shape).astype(np.int32),
        "positions": np.broadcast_to(index % length, shape).astype(np.int32),
    }


def streamed(compiled: Any, state: Any, frozen: Any, loader: Any, steps: int) -> tuple[Any, dict[str, float]]:
    """Milliseconds of a step with fresh packed batches, read, copied and queued as the trainer does it, and with the
    same batches on the device beforehand; in turn, twice each, the first pair unrecorded. Packed real documents."""

    def timed(state, batches: Iterable[Any]):
        start = time.perf_counter()
        for batch in batches:
            state, metrics = compiled(state, frozen, jax.device_put(step_batch(batch, packing=True)))
        jax.block_until_ready((state, metrics))
        return state, (time.perf_counter() - start) / steps * 1e3

    there = [jax.device_put(batch) for batch in itertools.islice(loader.iterate(0), steps)]
    found: dict[str, list[float]] = {"resident": [], "streamed": []}
    for _ in range(3):
        for name in found:
            batches = there if name == "resident" else loader.iterate(0, steps)
            state, milliseconds = timed(state, batches)
            found[name].append(milliseconds)
    best = {f"{name}_milliseconds": min(values[1:]) for name, values in found.items()}
    return state, best | {"streaming_cost": best["streamed_milliseconds"] / best["resident_milliseconds"] - 1}


def peak_device_gib() -> float:
    """The most that this process has had on the device so far; 0 where the device does not say."""
    memory: dict[str, int] = jax.devices()[0].memory_stats() or {}
    return memory.get("peak_bytes_in_use", 0) / 2**30


def measure(options: argparse.Namespace, policy: str) -> dict:
    """One row of results/step-*.json, and more."""
    start_seconds = {"imports": common.seconds_since_start()}
    config = shapes.MODELS[options.model]
    dtype = jnp.dtype(options.dtype)

    def parts_of(make_model: Callable[..., Any]) -> tuple[Any, Any, Any]:
        model = make_model(config, options.weights, dtype=dtype, layers=options.layers)
        if options.adapter == "lora":
            targets = shapes.lora_targets(options.model)
            model = ph.add_lora(model, ph.LoRAConfig(rank=options.rank, alpha=options.rank, targets=targets))
        return ph.split(model)

    train = TrainConfig(
        learning_rate=1e-4,
        max_steps=1000,
        schedule="constant",
        batch_size=options.batch,
        memory_policy=policy,
        mlp_tile_tokens=options.mlp_tile_tokens,
        head_tile_rows=options.head_tile_rows,
        optimizer=options.optimizer,
        master_weights=options.master_weights,
    )
    graph, trainable, frozen = parts_of(random_weights.abstract_model)
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    flops = count_flops(config, trainable, frozen)
    loader = None
    if options.stream:
        documents = max(2_000, 20 * (WARM_UP + options.steps) * options.batch * options.seq // 150)
        loader = alpaca_like.packed_loader(options.batch, options.seq, config.vocab_size, count=documents)
        batch = loader.batch_at(0)
    elif options.data is None:
        batch = random_batch(options.batch, options.seq, options.documents, config.vocab_size)
    else:
        batch = dict(np.load(options.data))
    real_documents = options.data is not None or options.stream
    packing = options.documents > 1 or real_documents
    prepared = prepare_step(graph, trainable, train, 1000)
    compiled = compile_step(
        prepared.step,
        prepared.state,
        frozen,
        step_batch(batch, packing=packing),
        memory_policy=policy,
        compiler_options=dict(option.split("=", 1) for option in options.xla),
    )
    if options.hlo:
        Path(options.hlo).write_text(compiled.executable.as_text())
    plan = plan_from_compiled(
        config,
        compiled.executable,
        prepared.state,
        trainable,
        frozen,
        (1, options.batch, options.seq),
        memory_policy=policy,
        compile_seconds=compiled.seconds,
    )
    start_seconds["compiled"] = common.seconds_since_start()
    compiled_for = random_weights.shapes_of((prepared.state, frozen))
    _, trainable, frozen = parts_of(random_weights.random_model)
    state = start_state(trainable, prepared.optimizer, train)
    random_weights.require_shapes((state, frozen), compiled_for, options.model)
    state_leaves, frozen_leaves = jax.tree.leaves(state), jax.tree.leaves(frozen)
    del state, trainable, frozen
    device_batch = jax.block_until_ready(jax.device_put(step_batch(batch, packing=packing)))
    jax.block_until_ready((state_leaves, frozen_leaves))
    start_seconds["weights"] = common.seconds_since_start()
    peak_before = peak_device_gib()
    found = []
    # Steps are queued as the trainer queues them: the host prepares the next one while the device works.
    for index in range(WARM_UP + options.steps):
        if index == WARM_UP:
            jax.block_until_ready(found)
            start = time.perf_counter()
        state_leaves, metrics = compiled(state_leaves, frozen_leaves, device_batch)
        found.append(metrics)
        if index == 0:
            jax.block_until_ready(metrics)
            first_step = start_seconds["first_step"] = common.seconds_since_start()
    jax.block_until_ready(found)
    step_seconds = (time.perf_counter() - start) / options.steps
    records = [{name: float(metrics[name]) for name in ("loss", "grad_norm")} for metrics in found]
    streaming: dict[str, float] = {}
    if loader is not None:
        state_leaves, streaming = streamed(compiled, state_leaves, frozen_leaves, loader, options.steps)
        print(
            f"streamed {streaming['streamed_milliseconds']:.2f} ms a step, resident "
            f"{streaming['resident_milliseconds']:.2f} ms: {streaming['streaming_cost']:+.2%}",
            flush=True,
        )
    if options.profile:
        with jax.profiler.trace(options.profile):
            for _ in range(3):
                state_leaves, metrics = compiled(state_leaves, frozen_leaves, device_batch)
            jax.block_until_ready(metrics)
    real = batch["segment_ids"] > 0
    tokens = int(real.sum())
    peak = device_peak_flops(jax.devices()[0].device_kind)
    row = {
        "framework": "pronghorn",
        "model": options.model,
        "weights": options.weights
        or {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[options.dtype],
        "adapter": options.adapter,
        "rank": options.rank,
        "optimizer": options.optimizer,
        "master_weights": options.master_weights,
        "trained_parameters": trained,
        "batch": options.batch,
        "seq": options.seq,
        "documents_per_row": "alpaca-like" if real_documents else options.documents,
        "real_tokens": tokens,
        "layers": options.layers,
        "memory_policy": policy,
        "mlp_tile_tokens": options.mlp_tile_tokens,
        "pinned_host_gib": plan.pinned_host / 2**30,
        "tokens_per_second": tokens / step_seconds,
        "step_milliseconds": step_seconds * 1e3,
        "mfu": flops.of_batch(batch["positions"], real) / step_seconds / peak if peak else None,
        "peak_device_gib": peak_device_gib(),
        "device_gib_before_steps": peak_before,
        "planned_device_gib": plan.peak_device_bytes / 2**30,
        "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "loss": records[-1]["loss"],
        "grad_norm": records[-1]["grad_norm"],
        "losses": [record["loss"] for record in records],
        "grad_norms": [record["grad_norm"] for record in records],
        "compile_seconds": compiled.seconds,
        "seconds_to_first_step": first_step,
        "start_seconds": start_seconds,
        **streaming,
        "run": options.run,
        **common.environment(options.commit),
    }
    print(
        f"{options.model} {policy} {options.layers} {options.batch}x{options.seq}: "
        f"{row['tokens_per_second']:,.0f} tokens/s, {row['step_milliseconds']:.1f} ms, MFU {row['mfu'] or 0:.1%}, "
        f"peak {row['peak_device_gib']:.2f} GiB (planned {row['planned_device_gib']:.2f}), loss {row['loss']:.4f}, "
        f"grad norm {row['grad_norm']:.3e}, compiled in {compiled.seconds:.1f} s, "
        f"first step after {first_step:.1f} s",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_arguments(parser, "step-pronghorn")
    parser.add_argument("--model", choices=sorted(shapes.MODELS), default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--weights", default=None, help="kind of the frozen linears, such as nf4 or fp8; --dtype if not given"
    )
    parser.add_argument("--adapter", default="lora", choices=("lora", "full"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optimizer", default="adamw", help="of TrainConfig")
    parser.add_argument(
        "--no-master-weights",
        dest="master_weights",
        action="store_false",
        help="fully trained weights are updated in 16 bits, as Unsloth does it, and not in fp32",
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=1, help="equal documents packed into each row")
    parser.add_argument("--data", default=None, help="a packed batch, from alpaca_like.py")
    parser.add_argument(
        "--stream", action="store_true", help="packed documents, and what reading them for every step costs"
    )
    parser.add_argument("--layers", default="unrolled", choices=("unrolled", "scanned"))
    parser.add_argument("--memory-policy", default="keep")
    parser.add_argument("--mlp-tile-tokens", type=int, default=None)
    parser.add_argument("--head-tile-rows", type=int, default=None)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--run", default="single", help="id shared by the rows of one run")
    parser.add_argument("--xla", action="append", default=[], help="an option of XLA's, as name=value")
    parser.add_argument("--cache", default=None, help="folder for compiled programs, for a second start")
    parser.add_argument("--profile", default=None, help="folder for a profiler trace of the last three steps")
    parser.add_argument("--hlo", default=None, help="file for the optimised program")
    options = parser.parse_args()
    if options.cache:
        keep_programs_in(options.cache)
    common.write(options.out, [measure(options, options.memory_policy)])


if __name__ == "__main__":
    main()
