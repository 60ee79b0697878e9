"""Measure the kernels' block sizes on this machine's GPU and keep the fastest for every later run on such a device.

Every candidate is checked against the kernel's oracle before it is timed. Without arguments all kernels are tuned.

pronghorn tune
pronghorn tune attention --head-dim 128 --budget 60 --json candidates.json
"""

import argparse
from pathlib import Path

from pronghorn.cli.common import add_json_argument, write_json_if_asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kernels",
        nargs="*",
        help="attention, rms_norm, gated_activation, lowrank_gated, rope, cross_entropy, nf4, grouped_linear; "
        "default all",
    )
    parser.add_argument(
        "--head-dim", type=int, action="append", default=None, help="attention's; may be repeated"
    )
    parser.add_argument(
        "--budget", type=float, default=180.0, metavar="SECONDS", help="start nothing after this"
    )
    parser.add_argument(
        "--threads", type=int, default=None, help="compilations at once; default by CPU cores"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="folder of the tuning files; default the package's own",
    )
    parser.add_argument("--no-write", action="store_true", help="only measure and print")
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    from pronghorn.errors import InputError
    from pronghorn.pallas_kernels import autotune, autotune_jobs, launch, tuned
    from pronghorn.versions import installed_versions

    jobs = autotune_jobs.jobs(options.kernels, head_dims=options.head_dim or ())
    if not launch.on_gpu():
        raise InputError("tune: there is no NVIDIA GPU here, and kernels on a CPU have nothing to tune.")
    rows = autotune.tune(jobs, budget=options.budget, threads=options.threads)
    kind, capability = tuned.device_kind_and_capability()
    versions = installed_versions(("pronghorn", "jax", "jaxlib", "jax-cuda13-plugin"))
    write_json_if_asked(
        options, {"device": kind, "compute_capability": capability, "versions": versions, "candidates": rows}
    )
    found = autotune.choices(rows)
    if found and not options.no_write:
        path = tuned.write(kind, capability, versions, found, options.out or tuned.FOLDER)
        print(f"wrote {path.name}: {sum(map(len, found.values()))} choices for {kind}")
    measured = sum("milliseconds" in row for row in rows)
    print(f"{measured} of {len(rows)} candidates measured")
    return 0 if found else 1
