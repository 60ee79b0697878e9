"""One tiny model and one short training run for all tests of the commands, which run in this process."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import jax
import pytest
import yaml

from pronghorn.cli import main
from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def _commands_leave_no_trace(tmp_path_factory):
    """Compiled programs go to a folder of the tests, and jax's settings are put back."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@dataclasses.dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


def invoke(*arguments) -> Finished:
    """`pronghorn ARGUMENTS` in this process."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        jax.default_matmul_precision("highest"),
    ):
        code = main([str(argument) for argument in arguments])
    return Finished(code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under `folder`: {path: content}."""
    entries = sorted(folder.rglob("*"))
    return {str(e.relative_to(folder)): e.read_bytes() if e.is_file() else None for e in entries}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="session")
def job(model_dir, rows_file):
    """A job as the mapping that YAML holds; `train.output_dir` is for the test to set."""
    return {
        "model": str(model_dir),
        "dtype": "float32",
        "lora": {"rank": 3, "targets": ["q_proj", "down_proj"]},
        "data": {"path": str(rows_file), "max_length": 64, "eval_fraction": 0.25},
        "train": {"learning_rate": 0.05, "max_steps": 4, "batch_size": 2, "save_every": 2, "log_every": 1},
    }


@dataclasses.dataclass(frozen=True)
class Run:
    job_file: Path
    folder: Path
    merged: Path
    numbers: dict
    out: str


@pytest.fixture(scope="session")
def run(job, tmp_path_factory):
    """`train` of four steps with a merge."""
    root = tmp_path_factory.mktemp("run")
    job_file, merged, numbers = root / "job.yaml", root / "merged", root / "numbers.json"
    job_file.write_text(yaml.safe_dump(job, allow_unicode=True), encoding="utf-8")
    finished = invoke(
        "train", job_file, "--merge", merged, "--json", numbers, f"train.output_dir={root / 'run'}"
    )
    assert finished.code == 0, finished.err
    return Run(job_file, root / "run", merged, json.loads(numbers.read_text()), finished.out)
