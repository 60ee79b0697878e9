"""Device memory of steps, of the programs that are compiled for an H100; no GPU is needed, jax's CUDA plugin is.

What a program plans is what its step took on the device wherever both were measured (see results/step-*.json), but for
long rows, where cuDNN asks for more at run time. With --kernels every op takes its Pallas kernel: products of experts
are XLA's otherwise, which computes every row with every expert.

    JAX_PLATFORMS=cpu python benchmarks/planned_memory.py
    JAX_PLATFORMS=cpu python benchmarks/planned_memory.py --only gpt-oss --kernels
"""

import argparse
import contextlib
import dataclasses
import re
from typing import Any

import common
import jax.numpy as jnp
import shapes

import pronghorn as ph
from pronghorn.pallas_kernels import launch
from pronghorn.quantization import QuantizationConfig
from pronghorn.target_device import compiling_for
from pronghorn.training import plan_memory
from pronghorn.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """A LoRA step, and the GiB that it was asked to fit."""

    model: str
    weights: str | None
    policy: str
    batch: int
    seq: int
    asked: float
    layers: Any = "unrolled"
    head_tile_rows: int | None = None


JOBS = (
    Job("llama-3.1-8b", None, "keep", 1, 4096, 30.6),
    Job("llama-3.1-8b", None, "offload_projections", 2, 4096, 17.7, head_tile_rows=512),
    Job("llama-3.1-8b", None, "offload_projections", 4, 4096, 19.7, head_tile_rows=512),
    Job("llama-3.1-8b", "nf4", "offload_projections", 2, 4096, 8.0, head_tile_rows=512),
    Job("qwen3.5-9b", None, "keep", 1, 4096, 80.0),
    Job("qwen3-30b-a3b", "nf4", "keep", 1, 4096, 40.0, layers="scanned"),
    Job("qwen3-30b-a3b", "nf4", "keep", 1, 4096, 40.0, head_tile_rows=512),
    Job("qwen3-30b-a3b", "nf4", "layer_inputs", 1, 4096, 40.0, layers="scanned", head_tile_rows=512),
    Job("gpt-oss-20b", "mxfp4", "layer_inputs", 1, 4096, 16.0, layers="scanned", head_tile_rows=512),
)


def planned(job: Job, rank: int) -> dict[str, Any]:
    plan = plan_memory(
        shapes.MODELS[job.model],
        ph.LoRAConfig(rank=rank, alpha=rank, targets=shapes.lora_targets(job.model)),
        TrainConfig(
            max_steps=1000, batch_size=job.batch, memory_policy=job.policy, head_tile_rows=job.head_tile_rows
        ),
        jnp.bfloat16,
        max_length=job.seq,
        layers=job.layers,
        packing=False,
        quantization=None if job.weights is None else QuantizationConfig(job.weights),
    )
    return dataclasses.asdict(job) | {
        "planned_device_gib": plan.peak_device_bytes / 2**30,
        "arguments_gib": plan.arguments / 2**30,
        "pinned_host_gib": plan.pinned_host / 2**30,
        "compile_seconds": plan.compile_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser, "planned-memory")
    parser.add_argument("--only", default="", help="a regular expression of models")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kernels", action="store_true", help="every op by its Pallas kernel")
    options = parser.parse_args()
    rows = []
    forced = launch.kernels("pallas") if options.kernels else contextlib.nullcontext()
    with compiling_for("h100") as target, forced:
        for job in JOBS:
            if not re.search(options.only, job.model):
                continue
            row = planned(job, options.rank) | {"kernels": options.kernels}
            print(
                f"{job.model} {job.weights or 'bf16'} {job.policy} {job.batch}x{job.seq}: "
                f"{row['planned_device_gib']:.2f} GiB planned of {job.asked} asked",
                flush=True,
            )
            rows.append(row)
        record = common.environment(options.commit) | {"device": target.device_kind, "rows": rows}
    common.write(options.out, record)


if __name__ == "__main__":
    main()
