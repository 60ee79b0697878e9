"""What happens to a run when something breaks: nothing that was trained is lost, and nobody is told otherwise.

Killed processes are in `test_resume.py`, and fifty of them in `benchmarks/kill_and_resume.py`.
"""

import contextlib
import json
import os
import subprocess

import jax
import numpy as np
import pytest

from pronghorn.errors import RunError
from pronghorn.lora import split
from pronghorn.training import checkpoints, memory_plan
from pronghorn.training.checkpoints import CheckpointWriter, Retention, newest_checkpoint, restore
from tests.training.resumable import assert_same_run, make_trainer, outcome
from tests.training.small import VOCAB, same_leaves
from tests.training.test_checkpoints import some_state

MIB = 1 << 20


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave):
    """Take all of the disk but `leave` bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with (folder / "filler").open("wb") as file:
        file.write(b"\0" * (free - leave))


def state(step):
    return some_state(step, size=MIB)  # four MiB


def test_a_disk_that_fills_up_during_a_save_keeps_the_checkpoint_before_and_leaves_no_half(
    tmp_path, monkeypatch
):
    with small_disk(tmp_path / "disk", 120 * MIB) as disk:
        with CheckpointWriter(disk / "checkpoints", Retention(last=1)) as writer:
            writer.save(state(1), step=1, metadata={})
            writer.wait()
            make_room = writer._make_room
            # Another process takes the disk between the check and the write.
            monkeypatch.setattr(writer, "_make_room", lambda *args: (make_room(*args), fill(disk, 2 * MIB)))
            writer.save(state(2), step=2, metadata={})
            with pytest.raises(RunError, match=r"could not be written .*; free space"):
                writer.wait()
            assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step_00000001"]
            monkeypatch.setattr(writer, "_make_room", make_room)
            (disk / "filler").unlink()
            writer.save(state(3), step=3, metadata={})
        checkpoint = newest_checkpoint(disk / "checkpoints", print)
        assert checkpoint.step == 3
        assert same_leaves(restore(checkpoint, jax.eval_shape(lambda: state(0))), state(3))


def test_a_run_on_a_full_disk_trains_on_and_says_which_checkpoint_is_missing(
    tmp_path,
    uninterrupted,
    capsys,
    monkeypatch,
):
    """Checkpoints of steps 2 and 4 do not fit; that of step 6 does, and the last one again does not."""
    real, save = checkpoints._free_bytes, CheckpointWriter.save

    def on_a_disk_that_is_full_at_times(self, state, *, step, metadata):
        monkeypatch.setattr(checkpoints, "_free_bytes", lambda path: MIB if step in (2, 4, 7) else real(path))
        save(self, state, step=step, metadata=metadata)

    monkeypatch.setattr(CheckpointWriter, "save", on_a_disk_that_is_full_at_times)
    trainer = make_trainer(tmp_path)
    result = trainer.train()
    assert_same_run(outcome(trainer, result), uninterrupted, since=0)
    assert result.failed_saves == 3
    printed = capsys.readouterr().out
    assert printed.count("Training goes on without this checkpoint") == 3 and "1 MiB left" in printed
    assert newest_checkpoint(tmp_path / "checkpoints", print).step == 6


def test_what_would_be_given_up_anyway_makes_room_but_never_the_newest(tmp_path, monkeypatch):
    capacity = 13 * MIB  # three of four MiB each and a bit

    def free(folder):
        return capacity - sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    monkeypatch.setattr(checkpoints, "_FREE_SPACE_MARGIN", MIB // 2)
    monkeypatch.setattr(checkpoints, "_free_bytes", free)
    with CheckpointWriter(tmp_path, Retention(last=2)) as writer:
        for step in (1, 2, 3):
            writer.save(state(step), step=step, metadata={})
        writer.wait()
        (tmp_path / "other").write_bytes(b"\0" * 4 * MIB)
        writer.save(state(4), step=4, metadata={})  # fits because step 2 goes first, and step 3 stays
        assert not (tmp_path / "step_00000002").exists() and (tmp_path / "step_00000003").exists()
        writer.wait()
        (tmp_path / "other").write_bytes(b"\0" * 9 * MIB)
        with pytest.raises(RunError, match="MiB left"):
            writer.save(state(5), step=5, metadata={})
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000003", "step_00000004"]


def test_a_truncated_or_flipped_file_anywhere_is_found(tmp_path):
    with CheckpointWriter(tmp_path, Retention(last=2)) as writer:
        for step in (1, 2):
            writer.save(some_state(step), step=step, metadata={"settings": {}})
    newest = tmp_path / "step_00000002"
    random = np.random.default_rng(0)
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        content = path.read_bytes()
        flipped = bytearray(content)
        if content:
            flipped[random.integers(len(content))] ^= 1 << int(random.integers(8))
        for broken in (content[: len(content) // 2], bytes(flipped), content + b"\0"):
            if broken == content:
                continue
            path.write_bytes(broken)
            said = []
            checkpoint = newest_checkpoint(tmp_path, said.append)
            path.write_bytes(content)
            if path.name == "manifest.json" and checkpoint.step == 2:
                continue  # trailing bytes that JSON allows change nothing
            assert checkpoint.step == 1 and len(said) == 1, path
    assert newest_checkpoint(tmp_path, print).step == 2


def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(tmp_path, uninterrupted):
    make_trainer(tmp_path, keep_checkpoints=9).train()
    folder = tmp_path / "checkpoints"
    for step in (6, 7):
        (folder / f"step_{step:08d}" / "metadata.json").write_text("{}")
    trainer = make_trainer(tmp_path, keep_checkpoints=1)
    result = trainer.train(resume=True, stop_after=1)
    assert (result.resumed_from, result.steps) == (4, 5)
    assert [path.name for path in folder.iterdir()] == ["step_00000005"]
    trainer = make_trainer(tmp_path)
    assert_same_run(outcome(trainer, trainer.train(resume=True)), uninterrupted, since=5)


def test_a_data_worker_that_dies_loses_no_finished_step(tmp_path, uninterrupted, capsys):
    trainer = make_trainer(tmp_path)
    batch_at = trainer.loader.batch_at

    def dying(step):
        if step == 3:
            raise OSError(5, "Input/output error")
        return batch_at(step)

    trainer.loader.batch_at = dying
    with pytest.raises(OSError, match="Input/output"):
        trainer.train()
    assert "go on with train.resume=true" in capsys.readouterr().out
    trainer = make_trainer(tmp_path)
    result = trainer.train(resume=True)
    assert result.resumed_from == 3
    assert_same_run(outcome(trainer, result), uninterrupted, since=3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == uninterrupted[0]


def poisoned(trainer, steps):
    """Give the batches of `steps`, counted from 0, a token that the model lacks: its loss is NaN."""
    batch_at = trainer.loader.batch_at

    def batch(step):
        made = batch_at(step)
        if step in steps:
            made["input_ids"][0, 0, 0] = VOCAB
        return made

    trainer.loader.batch_at = batch
    return trainer


def test_a_nan_at_a_step_changes_nothing_but_that_step_and_the_run_resumes_through_it(tmp_path):
    whole = poisoned(make_trainer(tmp_path / "whole"), {3})
    result = whole.train()
    assert [np.isfinite(loss) for loss in result.losses] == [True] * 3 + [False] + [True] * 3
    assert result.skipped == 1 and all(np.isfinite(v).all() for v in outcome(whole, result)[2].values())
    again = poisoned(make_trainer(tmp_path / "again"), {3})
    again.train(stop_after=4)
    resumed = poisoned(make_trainer(tmp_path / "again"), {3})
    rest = resumed.train(resume=True)
    assert rest.losses == result.losses[4:] and rest.skipped == 1
    for name, value in outcome(whole, result)[2].items():
        assert np.array_equal(outcome(resumed, rest)[2][name], value), name


def test_a_run_that_stops_for_its_nans_saves_what_it_learned_before(tmp_path):
    settings = {"max_skipped_streak": 2, "save_every": None, "log_every": 1}
    trainer = poisoned(make_trainer(tmp_path, **settings), {3, 4, 5, 6})
    with pytest.raises(RunError, match="not finite"):
        trainer.train()
    checkpoint = newest_checkpoint(tmp_path / "checkpoints", print)
    graph, trainable, _ = split(trainer.model)
    state = memory_plan.prepare_step(graph, trainable, trainer.config, trainer.total_steps).state
    saved = restore(checkpoint, state)
    assert int(saved.step) == checkpoint.step >= 5 and int(saved.skipped) == checkpoint.step - 3
