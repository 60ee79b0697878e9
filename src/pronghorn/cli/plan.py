"""Memory, FLOPs and tokens of a job before anything is loaded or allocated.

The step is compiled on abstract arrays and the numbers are the compiled program's own. Only the model's config.json
and the job are read. With train.memory_policy=auto (the default) policies are compiled from fast to small, up to the
first that fits the device, or --memory; a table tells what the others would cost.

pronghorn plan job.yaml --json plan.json
pronghorn plan job.yaml --memory 24
pronghorn plan job.yaml --device h100        # on a machine without one
"""

import argparse
import dataclasses

from pronghorn.cli.common import (
    add_job_arguments,
    add_json_argument,
    read_job_arguments,
    use_compile_cache,
    write_json_if_asked,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    add_json_argument(parser)
    parser.add_argument(
        "--memory",
        metavar="GIB",
        type=float,
        default=None,
        help="device memory to fit; default: the device's own",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        default=None,
        help="a GPU that need not be here: h100; default: this machine's",
    )


def run(options: argparse.Namespace) -> int:
    job = read_job_arguments(options)
    use_compile_cache()
    from pronghorn.jobs import plan_job

    plan = plan_job(job, memory_gib=options.memory, device=options.device)
    print(plan)
    write_json_if_asked(options, dataclasses.asdict(plan))
    return 0
