"""What several commands share: the job arguments, the JSON option, the compile cache."""

import argparse
from pathlib import Path
from typing import Any

from pronghorn.configuration import JobConfig, read_job
from pronghorn.files import write_json


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and key=value; see `read_job_arguments`."""
    parser.add_argument("config", help="YAML job file, or the first key=value argument")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.max_steps=60")


def read_job_arguments(options: argparse.Namespace) -> JobConfig:
    """The job of the arguments; without a file, when the first argument is a key=value too."""
    if "=" in options.config and not _exists(options.config):
        return read_job(None, [options.config, *options.overrides])
    return read_job(options.config, options.overrides)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # longer than a file name can be
        return False


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """--json PATH."""
    parser.add_argument("--json", metavar="PATH", type=Path, default=None, help="also write the numbers here")


def write_json_if_asked(options: argparse.Namespace, values: dict[str, Any]) -> None:
    """Write `values` to --json, if given."""
    if options.json is not None:
        write_json(options.json, values)


def use_compile_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that the second run of a job starts at once."""
    from pronghorn.compile_cache import keep_programs_in

    folder = cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home only costs compile time
    keep_programs_in(folder)


def cache_folder() -> Path:
    """The user's cache folder for pronghorn: $XDG_CACHE_HOME/pronghorn, by default ~/.cache/pronghorn."""
    import os

    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "pronghorn" if base else Path.home() / ".cache" / "pronghorn"
