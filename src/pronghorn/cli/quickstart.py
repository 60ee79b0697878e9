"""Fine-tune a real language model on this machine, export it, and check what was exported.

SmolLM2-135M learns to write docstrings from Python's own standard library: about ten minutes on two CPU cores, about
a minute on a recent NVIDIA GPU. Everything lands in one folder; open its report.html.
"""

import argparse
from pathlib import Path

from pronghorn.cli.common import add_json_argument, use_compile_cache, write_json_if_asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder to write")
    parser.add_argument("--model", default=None, help="folder, GGUF file or hub name instead of SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=None, help="optimizer updates (default: by device)")
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    import dataclasses

    from pronghorn.errors import InputError
    from pronghorn.quickstart import QuickstartConfig, run_quickstart

    use_compile_cache()
    config = QuickstartConfig.for_this_machine()
    if options.steps is not None:
        if options.steps < 1:
            raise InputError(f"--steps {options.steps}: give a whole number, at least 1.")
        config = dataclasses.replace(config, steps=options.steps)
    report = run_quickstart(options.out, model=options.model, config=config)
    write_json_if_asked(options, report)
    return 0
