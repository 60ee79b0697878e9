import json
import subprocess
import sys

import jax
import pytest

from pronghorn.errors import InputError
from tests.training.resumable import assert_same_run, make_trainer, outcome
from tests.training.small import small_model


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_is_bit_exact_with_the_uninterrupted_one(tmp_path, uninterrupted, stop):
    first = make_trainer(tmp_path).train(stop_after=stop)
    assert first.interrupted and first.steps == stop
    trainer = make_trainer(tmp_path)
    result = trainer.train(resume=True)
    assert (result.resumed_from, result.steps, result.interrupted) == (stop, 7, False)
    assert_same_run(outcome(trainer, result), uninterrupted, since=stop)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["loss"] for line in lines] == uninterrupted[0]


KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_default_matmul_precision", "highest")
# As conftest.py has it for the run that goes on: only programs that are compiled alike agree in every bit.
jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
from tests.training.resumable import make_trainer
trainer = make_trainer(sys.argv[1])
iterate = trainer.loader.iterate
def killing(*steps):
    for count, batch in enumerate(iterate(*steps)):
        if count == 5:  # the checkpoint of step 4 may be half written
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
trainer.loader.iterate = killing
trainer.train()
"""


def test_a_killed_run_resumes_bit_exact_from_what_is_complete(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    cache = jax.config.jax_compilation_cache_dir
    child = subprocess.run([sys.executable, "-c", KILLED, str(folder), cache], capture_output=True, text=True)
    assert child.returncode == -9, child.stderr[-2000:]
    trainer = make_trainer(folder)
    result = trainer.train(resume="auto")
    assert result.resumed_from in (2, 4)
    assert_same_run(outcome(trainer, result), uninterrupted, since=result.resumed_from)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, uninterrupted, capsys):
    make_trainer(tmp_path).train(stop_after=5)
    (tmp_path / "checkpoints" / "step_00000005" / "manifest.json").unlink()
    trainer = make_trainer(tmp_path)
    result = trainer.train(resume=True)
    assert result.resumed_from == 4
    assert "step_00000005: skipped" in capsys.readouterr().out
    assert_same_run(outcome(trainer, result), uninterrupted, since=4)


def test_resuming_another_run_is_refused_in_one_sentence(tmp_path):
    make_trainer(tmp_path).train(stop_after=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=r"train\.learning_rate is 0\.02 .* 0\.01;"):
        make_trainer(tmp_path, learning_rate=2e-2).train(resume=True)
    with pytest.raises(InputError, match="total steps is 9"):
        make_trainer(tmp_path, max_steps=9).train(resume=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_resuming_a_finished_run_gives_its_weights_and_trains_nothing(tmp_path, uninterrupted):
    make_trainer(tmp_path).train()
    trainer = make_trainer(tmp_path)
    result = trainer.train(resume=True)
    assert (result.steps, result.resumed_from, result.losses, result.interrupted) == (7, 7, [], False)
    assert_same_run(outcome(trainer, result), uninterrupted, since=7)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "lion", "lion_8bit", "muon"])
def test_a_run_with_any_optimizer_resumes_bit_exact(tmp_path, optimizer):
    def trainer_in(folder):
        model = small_model(rank=None) if optimizer == "muon" else None  # an adapter's factors it refuses
        return make_trainer(folder, model=model, optimizer=optimizer, max_steps=4, save_every=None)

    whole = trainer_in(tmp_path / "whole")
    expected = outcome(whole, whole.train())
    assert trainer_in(tmp_path / "cut").train(stop_after=2).interrupted
    trainer = trainer_in(tmp_path / "cut")
    assert_same_run(outcome(trainer, trainer.train(resume=True)), expected, since=2)
