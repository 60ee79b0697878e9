"""pronghorn and its peers on the same jobs, one after the other on one GPU, each in a process of its own.

A job is a shape, a batch and a kind of weights; for each job every framework runs at its best settings (Unsloth with
its own checkpointing and with torch's cuDNN attention, Liger with torch's cuDNN attention). The rows of one call share
a `run`, and go into results/step-<suite>.json; a framework that fails leaves its error there. Peers load folders of
random weights, which are written first.

    python benchmarks/compare.py --suite llama-3.1-8b --folder FOLDER
    python benchmarks/compare.py --suite llama-3.2-1b --folder FOLDER --only pronghorn
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import shapes

HERE = Path(__file__).parent
PRONGHORN, UNSLOTH, LIGER, TRANSFORMERS = "pronghorn", "unsloth", "liger", "transformers"


def ours(model: str, rows: int, tokens: int, *more: str) -> tuple[str, list[str]]:
    """A job of ours."""
    return PRONGHORN, ["--model", model, "--batch", str(rows), "--seq", str(tokens), *more]


def peer(framework: str, model: str, rows: int, tokens: int, *more: str) -> tuple[str, list[str]]:
    """A job of a peer."""
    arguments = ["--framework", framework, "--model", model, "--batch", str(rows), "--seq", str(tokens)]
    return framework, [*arguments, *more]


def checkpointed(model: str, rows: int, tokens: int, *more: str) -> list[tuple[str, list[str]]]:
    """A job that recomputes: ours and Unsloth's offload to the host, Liger keeps layer inputs."""
    small, few = ["--head-tile-rows", "512"], []
    if rows * tokens >= 32768:
        small, few = [*small, "--steps", "4"], ["--steps", "8"]  # a step takes four or five seconds
    return [
        ours(model, rows, tokens, "--memory-policy", "offload_projections", *small, *more),
        peer(UNSLOTH, model, rows, tokens, "--checkpointing", "offload", *few, *more),
        peer(LIGER, model, rows, tokens, "--checkpointing", "full", *more),
    ]


def kept(model: str, rows: int, tokens: int) -> list[tuple[str, list[str]]]:
    """A job that recomputes nothing."""
    return [
        ours(model, rows, tokens),
        peer(UNSLOTH, model, rows, tokens),
        peer(UNSLOTH, model, rows, tokens, "--attention", "cudnn"),
        peer(LIGER, model, rows, tokens, "--attention", "cudnn"),
    ]


NEWER = "newer-packages"  # its place is taken by the folder of --packages; without one the job is left out
PACKED = "alpaca-like"  # its place is taken by a file of packed documents
BIG, SMALL, FULL, GEMMA = "llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b", "gemma-3-4b"
HYBRID = "qwen3.5-9b"
SPARSE, FEW, OSS = "qwen3-30b-a3b", "qwen3-30b-a3b-6-layers", "gpt-oss-20b"
SUITES: dict[str, list[tuple[str, list[str]]]] = {
    BIG: [*kept(BIG, 1, 4096), ours(BIG, 1, 4096, "--weights", "fp8")],
    f"{BIG}-recomputed": [*checkpointed(BIG, 2, 4096), *checkpointed(BIG, 4, 4096)[:2]],
    f"{BIG}-long": checkpointed(BIG, 1, 32768)[:2],
    f"{BIG}-nf4": checkpointed(BIG, 2, 4096, "--weights", "nf4"),
    f"{BIG}-nf4-long": checkpointed(BIG, 1, 32768, "--weights", "nf4")[:2],
    f"{BIG}-packed": [
        ours(BIG, 1, 4096, "--data", PACKED),
        peer(UNSLOTH, BIG, 1, 4096, "--data", PACKED),
        peer(LIGER, BIG, 1, 4096, "--data", PACKED),
    ],
    SMALL: [*kept(SMALL, 4, 2048)[:2], *kept(SMALL, 1, 512)[:2], *kept(SMALL, 2, 512)[:2]],
    GEMMA: kept(GEMMA, 1, 4096)[:2],
    # Nothing recomputed it takes 46 GiB, with adapters of 128 experts a layer.
    SPARSE: [
        ours(
            SPARSE,
            1,
            4096,
            *("--weights", "nf4", "--layers", "scanned"),
            *("--memory-policy", "layer_inputs", "--head-tile-rows", "512"),
        )
    ],
    FEW: [
        ours(FEW, 1, 4096, "--weights", "nf4"),
        peer(UNSLOTH, FEW, 1, 4096, "--weights", "nf4"),
        peer(TRANSFORMERS, FEW, 1, 4096, "--weights", "nf4"),
    ],
    OSS: [
        ours(
            OSS,
            1,
            4096,
            "--weights",
            "mxfp4",
            "--layers",
            "scanned",
            "--memory-policy",
            "layer_inputs",
            *("--head-tile-rows", "512"),
        ),
    ],
    # flash-linear-attention refuses its backward pass on Hopper with Triton 3.4 to 3.7.0, whose code for it is wrong
    # (its issue 640); Unsloth then takes another tile. So each peer runs with a newer Triton, Unsloth without it too.
    HYBRID: [
        ours(HYBRID, 1, 4096),
        peer(UNSLOTH, HYBRID, 1, 4096, "--packages", NEWER),
        peer(UNSLOTH, HYBRID, 1, 4096),
        peer(LIGER, HYBRID, 1, 4096, "--packages", NEWER),
        peer(TRANSFORMERS, HYBRID, 1, 4096, "--checkpointing", "full", "--packages", NEWER),
    ],
    FULL: [
        ours(FULL, 8, 2048, "--adapter", "full"),
        # In the memory of Unsloth's recomputing default, which updates weights and moments in 16 bits.
        ours(
            FULL,
            8,
            2048,
            *("--adapter", "full", "--memory-policy", "layer_inputs", "--head-tile-rows", "1024"),
            *("--optimizer", "adamw_8bit", "--no-master-weights"),
        ),
        peer(UNSLOTH, FULL, 8, 2048, "--adapter", "full"),
        peer(UNSLOTH, FULL, 8, 2048, "--adapter", "full", "--checkpointing", "offload"),
        peer(LIGER, FULL, 8, 2048, "--adapter", "full", "--attention", "cudnn"),
    ],
}


def run_job(
    framework: str,
    arguments: list[str],
    folder: Path,
    run: str,
    commit: str,
    limit: float,
    packages: Path | None = None,
) -> dict:
    """The row of one job, or its error; `packages` takes the place of NEWER."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "row.json"
        script = "step.py" if framework == PRONGHORN else "peers.py"
        # A peer must not take kernels.py beside its script for Hugging Face's package of that name.
        python = [sys.executable] if framework == PRONGHORN else [sys.executable, "-P"]
        command = [*python, str(HERE / script), *arguments, "--run", run, "--out", str(out)]
        if NEWER in command:
            command[command.index(NEWER)] = str(packages)
        if PACKED in command:
            command[command.index(PACKED)] = _packed_batch(arguments, Path(scratch))
        command += ["--commit", commit] if framework == PRONGHORN else ["--folder", str(folder)]
        try:
            done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=limit)
            if done.returncode == 0:
                (row,) = json.loads(out.read_text())
                return row
            error = (done.stderr.strip().splitlines() or ["no message"])[-1]
        except subprocess.TimeoutExpired:
            error = f"not done within {limit:.0f} s"
    return {"framework": framework, "arguments": arguments, "run": run, "error": error[-300:]}


def _packed_batch(arguments: list[str], folder: Path) -> str:
    """A file of documents with the lengths of an instruction set, packed into rows of the job's size."""
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    out = str(folder / "packed.npz")
    size = ["--batch", given["--batch"], "--seq", given["--seq"]]
    size += ["--vocab-size", str(shapes.MODELS[given["--model"]].vocab_size)]
    script = [sys.executable, str(HERE / "alpaca_like.py"), "--out", out, *size]
    # Without a device: the job that reads the file needs all of it.
    subprocess.run(script, check=True, capture_output=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return out


def with_mfu(rows: list[dict]) -> list[dict]:
    """Peers' share of the peak: the arithmetic of a job is that of our row of the same job."""
    key = ("model", "adapter", "batch", "seq", "documents_per_row")
    per_token = {
        tuple(row[k] for k in key): row["mfu"] / row["tokens_per_second"] for row in rows if row.get("mfu")
    }
    for row in rows:
        if "error" not in row and "mfu" not in row and tuple(row[k] for k in key) in per_token:
            row["mfu"] = per_token[tuple(row[k] for k in key)] * row["tokens_per_second"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", action="append", choices=sorted(SUITES), required=True)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the peers' models are or are written"
    )
    parser.add_argument("--only", action="append", help="frameworks to run; all if not given")
    parser.add_argument("--first", type=int, default=None, help="only so many jobs of each suite")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds a job may take")
    parser.add_argument(
        "--budget", type=float, default=3600.0, help="seconds after which nothing new is started"
    )
    parser.add_argument(
        "--packages", type=Path, help="folder of packages that take precedence in jobs that ask for it"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result files")
    parser.add_argument("--commit", default=None, help="commit to record where the tree has no .git")
    options = parser.parse_args()
    begin, commit = time.monotonic(), common.commit(options.commit)
    run = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    for suite in options.suite:
        rows: list[dict] = []
        for framework, arguments in SUITES[suite][: options.first]:
            if options.only and framework not in options.only:
                continue
            if NEWER in arguments and options.packages is None:
                print(f"{suite}: {framework} with --packages is left out", flush=True)
                continue
            if time.monotonic() - begin > options.budget:
                print(f"{suite}: out of time before {framework} {' '.join(arguments)}", flush=True)
                continue
            model = arguments[arguments.index("--model") + 1]
            folder = options.folder / model
            if framework != PRONGHORN and not (folder / "config.json").is_file():
                script = [sys.executable, str(HERE / "random_llama.py"), "--model", model, str(folder)]
                subprocess.run(script, check=True, capture_output=True)
            packages = options.packages and options.packages.resolve()
            row = run_job(framework, arguments, folder, run, commit, options.limit, packages)
            rows.append(row)
            print(_line(row, time.monotonic() - begin), flush=True)
            common.write(options.out / f"step-{suite}.json", with_mfu(rows))


def _line(row: dict, seconds: float) -> str:
    if "error" in row:
        return f"{seconds:5.0f} s  {row['framework']} {' '.join(row['arguments'])}: {row['error']}"
    return (
        f"{seconds:5.0f} s  {row['framework']} {row['model']} {row['weights']} {row['batch']}x{row['seq']} "
        f"{row['memory_policy']} {row.get('attention', '')}: {row['tokens_per_second']:,.0f} tokens/s, "
        f"{row['peak_device_gib']:.2f} GiB, loss {row['loss']:.3f}, gradient norm {row['grad_norm']:.3f}"
    )


if __name__ == "__main__":
    main()
