"""Rendered rows of a job's data, each token coloured by whether it is in the loss, and how well the rows pack.

pronghorn preview job.yaml --rows 3 --html preview.html
"""

import argparse
from pathlib import Path

from pronghorn.cli.common import add_job_arguments, add_json_argument, read_job_arguments, write_json_if_asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    add_json_argument(parser)
    parser.add_argument("--rows", type=int, default=3, help="how many rows to show")
    parser.add_argument(
        "--html", type=Path, default=None, metavar="PATH", help="also write them as one HTML file"
    )


def run(options: argparse.Namespace) -> int:
    job = read_job_arguments(options)
    from pronghorn.jobs import preview_job

    numbers = preview_job(job, rows=options.rows, html=options.html)
    write_json_if_asked(options, numbers)
    return 0
