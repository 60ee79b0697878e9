"""Seconds and memory of loading a 16-bit folder into a model on the device, quantised on the way.

Each load is a process of its own. Peak host memory is the process's high-water mark, and is stated beside the largest
tensor and what the process held before it began to load. `random_llama.py` writes a folder of the true shape.

    python benchmarks/random_llama.py --model llama-3.1-8b FOLDER
    python benchmarks/load_time.py --folder FOLDER --quantization nf4
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import common


def load_once(folder: str, quantization: str | None, layers: str) -> dict:
    """Load in this process."""
    import jax
    import jax.numpy as jnp

    from pronghorn.converters.huggingface import load_model
    from pronghorn.models.parameters import named_parameters

    jax.block_until_ready(jnp.ones(()) + 1)  # the client and its libraries are there before anything is timed
    before = _peak_gib()
    start = time.perf_counter()
    model = load_model(folder, quantization=quantization, layers=layers)
    leaves = jax.tree.leaves([p.variable.get_value() for p in named_parameters(model).values()])
    jax.block_until_ready(leaves)
    seconds = time.perf_counter() - start
    memory = jax.local_devices()[0].memory_stats() or {}
    sizes = [p.shape for p in named_parameters(model).values()]
    largest = max(rows * columns for rows, columns in (s for s in sizes if len(s) == 2)) * 2
    return {
        "seconds": seconds,
        "host_gib_before": before,
        "peak_host_gib": _peak_gib(),
        "largest_tensor_gib": largest / 2**30,
        "peak_device_gib": memory.get("peak_bytes_in_use", 0) / 2**30,
        "device_gib": memory.get("bytes_in_use", 0) / 2**30,
    }


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser, "load-time")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--quantization", default="nf4", choices=("none", "nf4", "fp4", "int8", "fp8"))
    parser.add_argument("--layers", default="unrolled", choices=("unrolled", "scanned"))
    parser.add_argument(
        "--repeats", type=int, default=2, help="the first may read a disk, the others its cache"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        quantization = None if options.quantization == "none" else options.quantization
        print(json.dumps(load_once(options.folder, quantization, options.layers)), flush=True)
        return
    rows = []
    for repeat in range(options.repeats):
        command = [sys.executable, __file__, "--child", *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"load {repeat + 1}: {row['seconds']:.1f} s, host peak {row['peak_host_gib']:.2f} GiB "
            f"({row['host_gib_before']:.2f} before, largest tensor {row['largest_tensor_gib']:.2f}), device peak "
            f"{row['peak_device_gib']:.2f} GiB, {row['device_gib']:.2f} after",
            flush=True,
        )
        rows.append(row | {"quantization": options.quantization, "layers": options.layers})
    common.write(Path(options.out), {"rows": rows, **common.environment(options.commit)})


if __name__ == "__main__":
    main()
