"""Fine-tune by a YAML job file and key=value arguments.

pronghorn train job.yaml
pronghorn train job.yaml train.max_steps=60 train.learning_rate=1e-4
pronghorn train model=FOLDER data.path=rows.jsonl train.output_dir=runs/mine

A run that was stopped goes on with train.resume=true and is bit-exact with one that was not.
"""

import argparse
from pathlib import Path
from typing import Any

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
        "--merge", metavar="DIR", default=None, help="also merge the result into DIR and check it"
    )


def run(options: argparse.Namespace) -> int:
    job = read_job_arguments(options)
    use_compile_cache()
    import dataclasses

    from pronghorn.jobs import prepare_job, require_run_folder, save_results

    require_run_folder(job)
    trainer = prepare_job(job, merge_into=options.merge)
    result = trainer.train(resume=job.train.resume)
    saved: dict[str, Any] = {}
    if not result.interrupted:  # then the trainer has saved a checkpoint and printed how to go on
        saved = save_results(trainer, Path(job.train.output_dir), merge_into=options.merge)
    write_json_if_asked(options, dataclasses.asdict(result) | saved)
    return 0
