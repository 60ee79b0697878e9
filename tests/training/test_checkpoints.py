import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError, RunError
from pronghorn.training import checkpoints
from pronghorn.training.checkpoints import (
    CheckpointWriter,
    Retention,
    best_checkpoint,
    check_settings,
    newest_checkpoint,
    restore,
)
from tests.training.small import same_leaves


def some_state(step, *, size=1000):
    return {
        "step": jnp.int32(step),
        "weights": {
            "a": jnp.arange(size, dtype=jnp.float32) + step,
            "b": jnp.full((3, 2), 1 / 3, jnp.bfloat16),
        },
        "rng": jax.random.key_data(jax.random.key(step)),
    }


@pytest.fixture
def three(tmp_path):
    """Checkpoints of steps 1, 2 and 3."""
    with CheckpointWriter(tmp_path, Retention(last=3)) as writer:
        for step in (1, 2, 3):
            writer.save(some_state(step), step=step, metadata={"settings": {"train.seed": 0}})
    return tmp_path


def test_what_is_restored_has_the_same_bits(three):
    said = []
    checkpoint = newest_checkpoint(three, said.append)
    assert (checkpoint.step, said) == (3, [])
    restored = restore(checkpoint, jax.eval_shape(lambda: some_state(0)))
    assert same_leaves(restored, some_state(3))
    assert jax.tree.structure(restored) == jax.tree.structure(some_state(3))


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = some_state(5, size=1_000_003)
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 7, state), donate_argnums=0)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(state, step=5, metadata={})
        for _ in range(3):
            state = overwrite(state)
    restored = restore(
        newest_checkpoint(tmp_path, print), jax.eval_shape(lambda: some_state(0, size=1_000_003))
    )
    assert same_leaves(restored, expected)


def test_only_the_newest_are_kept(tmp_path):
    with CheckpointWriter(tmp_path, Retention(last=2)) as writer:
        for step in (1, 2, 3, 4):
            writer.save(some_state(step), step=step, metadata={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_every_so_many_and_the_best_are_kept_for_good(tmp_path):
    with CheckpointWriter(tmp_path, Retention(last=1, every=4, best=True)) as writer:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 1.5), (5, None), (6, float("nan")), (7, 1.25)):
            metadata = {} if loss is None else {"heldout_loss": loss}
            writer.save(some_state(step), step=step, metadata=metadata)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in (2, 4, 7)]
    assert best_checkpoint(tmp_path, print).step == 2
    (tmp_path / "step_00000002" / "metadata.json").write_text('{"heldout_loss": 0.5}')
    said = []
    assert best_checkpoint(tmp_path, said.append).step == 7 and "step_00000002: skipped" in said[0]


def test_a_checkpoint_without_its_manifest_is_skipped_aloud(three):
    (three / "step_00000003" / "manifest.json").unlink()
    said = []
    assert newest_checkpoint(three, said.append).step == 2
    assert len(said) == 1 and "step_00000003" in said[0] and "never finished" in said[0]


def test_a_half_written_checkpoint_is_skipped_aloud(three):
    (three / "step_00000003").rename(three / "step_00000003.partial")
    said = []
    assert newest_checkpoint(three, said.append).step == 2
    assert "never finished" in said[0]


def test_a_flipped_bit_is_found_and_named(three):
    victim = max(
        (three / "step_00000003" / "state").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    said = []
    assert newest_checkpoint(three, said.append).step == 2
    assert victim.name in said[0] and "differs" in said[0]


def test_a_lost_file_is_found_and_named(three):
    (three / "step_00000003" / "metadata.json").unlink()
    said = []
    assert newest_checkpoint(three, said.append).step == 2
    assert "metadata.json is missing" in said[0]


def test_nothing_complete_gives_none(three):
    for folder in three.iterdir():
        shutil.rmtree(folder / "state")
    assert newest_checkpoint(three, lambda text: None) is None
    assert newest_checkpoint(three / "absent", lambda text: None) is None


def test_a_save_that_was_cut_short_is_written_anew(three):
    (three / "step_00000004.partial" / "state").mkdir(parents=True)
    with CheckpointWriter(three, Retention(last=1)) as writer:
        writer.save(some_state(4), step=4, metadata={})
    assert [path.name for path in three.iterdir()] == ["step_00000004"]


def test_a_full_disk_is_refused_before_anything_is_written_or_removed(three, monkeypatch):
    usage = shutil.disk_usage(three)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with CheckpointWriter(three, Retention(last=1)) as writer, pytest.raises(RunError, match=r"1 MiB left"):
        writer.save(some_state(4), step=4, metadata={})
    assert newest_checkpoint(three, print).step == 3
    assert not list(three.glob("step_00000004*"))


def test_a_failure_in_the_background_is_raised_by_the_next_wait(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "fsync_tree", fail)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(some_state(1), step=1, metadata={})
        with pytest.raises(RunError, match="No space left"):
            writer.wait()
    assert newest_checkpoint(tmp_path, lambda text: None) is None


def test_other_settings_are_refused_by_name(three):
    checkpoint = newest_checkpoint(three, print)
    check_settings(checkpoint, {"train.seed": 0})
    with pytest.raises(InputError, match=r"train\.seed is 1 .* 0;"):
        check_settings(checkpoint, {"train.seed": 1})


def test_other_arrays_are_refused_by_name(three):
    checkpoint = newest_checkpoint(three, print)
    state = some_state(0)
    with pytest.raises(InputError, match="only this run has extra"):
        restore(checkpoint, {**state, "extra": state["step"]})
    with pytest.raises(InputError, match=r"weights\.a is float32\[1000\]"):
        restore(checkpoint, some_state(0, size=999))


def test_the_manifest_has_the_size_and_hash_of_every_file(three):
    folder = three / "step_00000003"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(files) == on_disk
    assert all(entry["size"] == (folder / name).stat().st_size for name, entry in files.items())
