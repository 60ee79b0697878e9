"""Make one adapter out of several of one base, by weights.

"cat" is exact, and the ranks add up; "svd" brings the sum down to --rank; "linear" adds factor to factor, for adapters
that grew from one start.

pronghorn merge-adapters OUT runs/a/adapter runs/b/adapter --weights 0.7 0.3
"""

import argparse
from pathlib import Path

from pronghorn.cli.common import add_json_argument, write_json_if_asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("adapters", nargs="+", help="PEFT adapter folders")
    parser.add_argument(
        "--weights", nargs="+", type=float, default=None, help="one an adapter; equal parts of 1 if not given"
    )
    parser.add_argument("--method", default="cat", choices=("cat", "linear", "svd"))
    parser.add_argument(
        "--rank", type=int, default=None, help="of the result, for svd; the largest if not given"
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    from pronghorn.converters.combine import combine_adapters

    weights = options.weights or [1 / len(options.adapters)] * len(options.adapters)
    numbers = combine_adapters(
        options.adapters, weights, options.out, method=options.method, rank=options.rank
    )
    lost = f", {numbers['lost']:.1%} of the sum's norm lost" if "lost" in numbers else ""
    print(f"{options.out}: {numbers['modules']} modules, rank {numbers['rank']}{lost}")
    write_json_if_asked(options, numbers)
    return 0
