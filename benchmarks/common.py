"""What every benchmark records (device, versions, commit, command), how it times, and where the rows go."""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def seconds_since_start() -> float:
    """How long this process has been there, its imports included (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return up - ticks / os.sysconf("SC_CLK_TCK")


def versions(*extra: str) -> dict[str, str]:
    """Installed versions of what decides a figure."""
    found = {"python": sys.version.split()[0]}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", *extra):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device() -> str:
    """The device's name, as JAX or PyTorch reports it."""
    import jax

    return str(jax.devices()[0].device_kind)


def commit(given: str | None = None) -> str:
    """The commit measured: given on the command line where the tree has no .git, else git's answer."""
    if given:
        return given
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
        return head + ("-dirty" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(given_commit: str | None = None, *extra_versions: str) -> dict[str, Any]:
    """The fields that every result file carries."""
    return {
        "device": device(),
        "versions": versions(*extra_versions),
        "commit": commit(given_commit),
        "command": " ".join(["python", *(a for a in _without_paths(sys.argv))]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _without_paths(arguments: list[str]) -> list[str]:
    """The command as a reader of the repository would type it: no absolute path of the machine that ran it."""
    root = str(Path(__file__).resolve().parents[1]) + "/"
    shown, skip = [], False
    for argument in arguments:
        if skip or argument == "--out":
            skip = not skip
            continue
        shown.append(argument.replace(root, ""))
    return shown


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """--out and --commit."""
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="result file")
    parser.add_argument("--commit", default=None, help="commit to record where the tree has no .git")


def write(path: Path, value: Any) -> None:
    """Write `value` as JSON; a run that is killed meanwhile leaves the file as it was."""
    from pronghorn.files import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(value, indent=1) + "\n")
    print(f"wrote {path.name}", flush=True)


def milliseconds(function: Callable[..., Any], *arguments: Any, repeats: int = 10, samples: int = 5) -> float:
    """Median time of one call of a compiled function, in ms: `repeats` calls are queued and waited for together.

    Queued calls hide the host's dispatch; a call shorter than about 50 us would measure it instead.
    """
    import jax

    for _ in range(2):
        jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(repeats):
            out = function(*arguments)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / repeats * 1e3)
    return statistics.median(found)
