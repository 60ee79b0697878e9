"""What this machine has (devices, versions, memory), and whether each kernel is right on it.

Exits 1 when a kernel departs from its oracle.
"""

import argparse

from pronghorn.cli.common import add_json_argument, write_json_if_asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    from pronghorn.verification.doctor import examine

    numbers = examine(print_line=print)
    write_json_if_asked(options, numbers)
    return 0 if numbers["passed"] else 1
