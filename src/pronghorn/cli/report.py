"""One HTML file about a run: curves, unusual steps and their rows, answers while training, every setting.

pronghorn report runs/mine
"""

import argparse
from pathlib import Path

from pronghorn.cli.common import add_json_argument, write_json_if_asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="train.output_dir of the run; it may still be going")
    parser.add_argument(
        "--out", type=Path, default=None, help="the file to write; RUN/report.html if not given"
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    from pronghorn.evaluation.run_report import losses_of, write_run_report

    numbers = losses_of(options.run)
    path = write_run_report(options.run, options.out)
    print(f"report: {path}")
    write_json_if_asked(options, {"report": str(path), **numbers})
    return 0
