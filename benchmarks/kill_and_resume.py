"""Kill a training run at random moments, resume it each time, and compare what comes out with a run left alone.

Each process is the command `pronghorn train job.yaml train.resume=auto` with checkpoints every few steps. It gets
SIGKILL after a random time, counted from its start or, every other time, from its first step. When a run reaches its
end in spite of that, its adapter has to be the uninterrupted run's bit for bit, and its metrics.jsonl has to hold every
step once, with the same losses. Then the next run begins.

python benchmarks/kill_and_resume.py --kills 50
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def write_job(root: Path, *, steps: int, save_every: int) -> Path:
    """A tiny model, twelve rows and a job file in `root`."""
    from tests import tiny

    tiny.write_model(root / "model")
    tiny.write_rows(root / "rows.jsonl")
    job = {
        "model": str(root / "model"),
        "dtype": "float32",
        "lora": {"rank": 3, "targets": ["q_proj", "down_proj"], "dropout": 0.2},
        "data": {"path": str(root / "rows.jsonl"), "max_length": 64},
        "train": {
            "learning_rate": 0.01,
            "max_steps": steps,
            "batch_size": 2,
            "warmup_steps": 2,
            "save_every": save_every,
            "compile_cache": str(root / "compiled"),
        },
    }
    (root / "job.yaml").write_text(json.dumps(job))  # JSON is YAML
    return root / "job.yaml"


def start(job: Path, folder: Path) -> subprocess.Popen:
    # Every program is kept, small ones too: a resumed process then starts in the time that Python needs.
    code = (
        "import jax; jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0); "
        "from pronghorn.cli import main; raise SystemExit(main())"
    )
    arguments = ["train", str(job), f"train.output_dir={folder}", "train.resume=auto"]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(job: Path, folder: Path) -> float:
    """Run to the end; returns the seconds it took."""
    begin = time.perf_counter()
    process = start(job, folder)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed:\n{output}")
    return time.perf_counter() - begin


def outcome(folder: Path) -> tuple[bytes, list[tuple[int, float]]]:
    """The adapter's file and (step, loss) of every record."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    losses = [(record["step"], record["loss"]) for record in records]
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), losses


def wait_for_training(process: subprocess.Popen, folder: Path) -> None:
    """Until the process writes its metrics, or ends."""
    begin, metrics = time.time(), folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_mtime > begin):
        time.sleep(0.02)


def kill_runs(job: Path, root: Path, kills: int, seconds: float, whole: Any, seed: int) -> dict[str, Any]:
    """Kill `kills` times, run after run; every finished run is compared with `whole`."""
    moments = random.Random(seed)
    killed, runs, resumed_at, skipped = 0, 0, [], 0
    while killed < kills:
        folder = root / f"run-{runs}"
        while True:
            process = start(job, folder)
            limit = moments.uniform(0.0, 1.0) * seconds
            if killed % 2:
                wait_for_training(process, folder)
                limit /= 4  # most of an uninterrupted process's time is its start
            try:
                output, _ = process.communicate(timeout=limit if killed < kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                killed += 1
            skipped += output.count(": skipped, ")
            resumed_at += [
                int(line.split()[3]) for line in output.splitlines() if "resumed after step" in line
            ]
            if process.returncode == 0:
                break
            if process.returncode != -9:
                raise SystemExit(f"the run failed after {killed} kills:\n{output}")
        assert outcome(folder) == whole, f"{folder.name} differs from the uninterrupted run"
        runs += 1
        shutil.rmtree(folder)
        print(f"{killed} kills, {runs} runs finished, each equal to the uninterrupted one", flush=True)
    return {
        "kills": killed,
        "runs_finished": runs,
        "runs_bit_equal": runs,
        "resumed_at_steps": resumed_at,
        "unfinished_checkpoints_passed_over": skipped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser, "kill-and-resume")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        job = write_job(root, steps=options.steps, save_every=options.save_every)
        finish(job, root / "first")  # fills the compile cache
        seconds = finish(job, root / "whole")
        whole = outcome(root / "whole")
        assert outcome(root / "first") == whole, "two uninterrupted runs differ"
        print(f"uninterrupted: {seconds:.1f} s, {options.steps} steps, {len(whole[1])} records", flush=True)
        found = kill_runs(job, root, options.kills, seconds, whole, options.seed)
    record = {
        **common.environment(options.commit),
        "steps": options.steps,
        "save_every": options.save_every,
        **found,
        "seconds": round(time.perf_counter() - begin),
    }
    common.write(options.out, record)


if __name__ == "__main__":
    main()
