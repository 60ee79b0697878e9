"""Memory, FLOPs and tokens of a job before anything is loaded or allocated.

The step is compiled on abstract arrays and the numbers are the compiled program's own. Only the model's config.json
and the job are read.

pronghorn plan job.yaml --json plan.json
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


def run(options: argparse.Namespace) -> int:
    job = read_job_arguments(options)
    use_compile_cache()
    from pronghorn.jobs import plan_job

    plan = plan_job(job)
    print(plan)
    write_json_if_asked(options, dataclasses.asdict(plan))
    return 0
