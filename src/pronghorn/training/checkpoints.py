"""Checkpoints that are whole or do not count.

Layout: `checkpoints/step_00000060/` with `state/` (Orbax), `metadata.json` (step, settings that must match) and,
written last, `manifest.json` (size and sha256 of every file). A checkpoint grows in `step_00000060.partial`, every
file is fsynced, and a rename publishes it; older ones are removed only after that. So whatever happens in the middle
of a save, the newest complete checkpoint is intact, and what has no manifest, or differs from it, is skipped aloud.

Orbax copies the state to the host and writes on its own threads while training goes on; a thread here waits for it
and publishes. One save is in flight at most. What `Retention` gives up is removed after the new checkpoint is there,
or, where the disk would not hold both, before it; the newest complete one never is.
"""

import dataclasses
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.errors import InputError, RunError
from pronghorn.files import fsync_folder, fsync_tree, write_json

_FREE_SPACE_MARGIN = 64 << 20
_ASIDE = ".passed-over"


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
      last: so many of the newest.
      every: those of steps that are multiples of this, for good; None keeps none for that.
      best: the one with the smallest `heldout_loss` in its metadata.
    """

    last: int = 2
    every: int | None = None
    best: bool = False

    def given_up(self, complete: list["Checkpoint"]) -> list["Checkpoint"]:
        """Those of the complete checkpoints, in order of their steps, that need not stay."""
        kept = {c.step for c in complete[-self.last :]}
        if self.every is not None:
            kept |= {c.step for c in complete if c.step % self.every == 0}
        judged = [c for c in complete if isinstance(c.metadata.get("heldout_loss"), float)]
        if self.best and judged:
            kept.add(min(judged, key=lambda c: c.metadata["heldout_loss"]).step)
        return [c for c in complete if c.step not in kept]

    def most(self, save_every: int | None, total_steps: int) -> int:
        """How many are on disk at a time in a run of so many steps, the one that is being written included."""
        saves = 1 if save_every is None else -(-total_steps // save_every)
        forever = 0 if self.every is None else total_steps // self.every
        return min(saves, self.last + 1 + forever) + self.best


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: its folder, step and metadata."""

    path: Path
    step: int
    metadata: dict[str, Any]


def state_arrays(state: Any) -> dict[str, jax.Array]:
    """The leaves of a state by name, for example `trainable.layers.0.lora_A.value`: what is written and compared."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def state_bytes(state: Any) -> int:
    """Bytes that a checkpoint of `state` takes: on disk, and as a copy on the host while it is written."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time.

    Example:
      >>> with CheckpointWriter(folder, Retention(last=2)) as writer:
      ...     writer.save(state, step=60, metadata={"settings": settings})
    """

    def __init__(self, folder: str | Path, retention: Retention | None = None):
        self.folder = Path(folder).absolute()
        self.retention = retention or Retention()
        self._checkpointer: Any = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def save(self, state: Any, *, step: int, metadata: Mapping[str, Any]) -> None:
        """Copy `state` to the host and start to write it; waits for an earlier save first.

        The arrays of `state` may be donated or changed as soon as this returns.

        Args:
          metadata: JSON values; `heldout_loss` is what `Retention.best` goes by.

        Raises:
          RunError: the disk has no room, or the save before this one failed.
        """
        import orbax.checkpoint as ocp

        self.wait()
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f"{final.name}.partial"
        for leftover in self.folder.glob("step_*.partial"):  # of a run that was killed while it saved
            shutil.rmtree(leftover, ignore_errors=True)
        self._make_room(state_bytes(state), step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if final.exists():
                _remove(final)
            partial.mkdir()
            if self._checkpointer is None:
                self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            self._checkpointer.save(partial / "state", args=ocp.args.PyTreeSave(state_arrays(state)))
        except (OSError, ValueError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"{partial}: the checkpoint could not be written ({error}); free space."
            ) from error
        self._thread = threading.Thread(
            target=self._publish, args=(partial, final, {"step": step, **metadata}), name="checkpoint"
        )
        self._thread.start()

    def _publish(self, partial: Path, final: Path, metadata: dict[str, Any]) -> None:
        try:
            self._checkpointer.wait_until_finished()
            write_json(partial / "metadata.json", metadata)
            fsync_tree(partial)
            write_json(partial / "manifest.json", {"files": _file_table(partial)})
            partial.rename(final)
            fsync_folder(self.folder)
            self._remove_old()
        except BaseException as error:  # handed to the thread that trains, which raises it
            self._failure = error
            shutil.rmtree(partial, ignore_errors=True)  # half a checkpoint only takes the next one's room

    def continue_from(self, step: int) -> None:
        """Put aside what is newer than the checkpoint that a run resumes from, since it was passed over as damaged:
        it must not count as one of those that are kept. It goes when the next checkpoint is there."""
        for path in self.folder.glob("step_*"):
            if _step_of(path) > step:
                aside = path.with_name(path.name + _ASIDE)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

    def _remove_old(self) -> None:
        for path in self.folder.glob("step_*"):
            if path.name.endswith(_ASIDE) or not (path / "manifest.json").is_file():
                _remove(path)
        for checkpoint in self.retention.given_up(_complete(self.folder)):
            _remove(checkpoint.path)

    def _make_room(self, needed: int, step: int) -> None:
        """Give up now what would be given up anyway once `step` is there, if that is what the disk needs."""
        complete = [c for c in _complete(self.folder) if c.step < step] if self.folder.is_dir() else []
        given_up = self.retention.given_up([*complete, Checkpoint(self.folder, step, {})])
        spare = [c for c in given_up if c.step != complete[-1].step]
        freed = sum(path.stat().st_size for c in spare for path in c.path.rglob("*") if path.is_file())
        if _free_bytes(self.folder) < needed + _FREE_SPACE_MARGIN <= _free_bytes(self.folder) + freed:
            for checkpoint in spare:
                _remove(checkpoint.path)
        check_free_space(self.folder, needed)

    def wait(self) -> None:
        """Until the last save is on disk.

        Raises:
          RunError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise RunError(
                f"{self.folder}: a checkpoint could not be written ({failure}); free space or choose another "
                "output_dir."
            ) from failure

    def close(self) -> None:
        """`wait`, and let Orbax's threads go."""
        try:
            self.wait()
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None


def _complete(folder: Path) -> list[Checkpoint]:
    """Checkpoints that have a manifest, by step; their files are not read."""
    found = []
    for path in folder.glob("step_*"):
        if _step_of(path) >= 0 and (path / "manifest.json").is_file():
            try:
                metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                metadata = {}
            found.append(Checkpoint(path, _step_of(path), metadata if isinstance(metadata, dict) else {}))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _step_of(path: Path) -> int:
    """The step of a checkpoint's folder; -1 for one that is unfinished or put aside."""
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1


def _remove(path: Path) -> None:
    # The manifest first: a removal that is cut short must not leave something that looks complete.
    (path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _free_bytes(folder: Path) -> int:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse when the disk of `folder` cannot take `needed` more bytes.

    Raises:
      RunError: with both figures.
    """
    free = _free_bytes(folder)
    if free < needed + _FREE_SPACE_MARGIN:
        raise RunError(
            f"{folder}: a checkpoint takes {needed / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} MiB left; "
            "free space or choose another output_dir."
        )


def newest_checkpoint(folder: str | Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint in `folder`, every file checked against its manifest, or None.

    Args:
      folder: the `checkpoints` folder of a run.
      say: told, one sentence each, which newer ones were skipped and why.
    """
    return _first_whole(folder, None, say)


def best_checkpoint(folder: str | Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The complete checkpoint with the smallest held-out loss, checked as in `newest_checkpoint`, or None."""
    judged = {
        c.path: c.metadata["heldout_loss"]
        for c in (_complete(Path(folder)) if Path(folder).is_dir() else ())
        if isinstance(c.metadata.get("heldout_loss"), float)
    }
    return _first_whole(folder, judged, say)


def _first_whole(
    folder: str | Path, judged: Mapping[Path, float] | None, say: Callable[[str], None]
) -> Checkpoint | None:
    """The first undamaged one: newest first, or, of those that are judged, smallest first."""
    folder = Path(folder)
    entries = [path for path in folder.glob("step_[0-9]*") if path.is_dir()] if folder.is_dir() else []
    entries.sort(key=lambda path: path.name, reverse=True)
    if judged is not None:
        entries = sorted((path for path in entries if path in judged), key=lambda path: judged[path])
    for path in entries:
        problem = damage(path)
        if problem is not None:
            say(f"{path}: skipped, {problem}.")
            continue
        metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        return Checkpoint(path, int(metadata["step"]), metadata)
    return None


def damage(path: Path) -> str | None:
    """What makes a checkpoint folder unusable, in words, or None when every file is as the manifest says."""
    if path.name.endswith(_ASIDE):
        return "it was passed over before"
    if path.name.endswith(".partial") or not (path / "manifest.json").is_file():
        return "its save was never finished"
    try:
        expected = dict(json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"])
        actual = _file_table(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it cannot be read ({error})"
    for name, entry in expected.items():
        if name not in actual:
            return f"its file {name} is missing"
        if actual[name] != entry:
            return f"its file {name} differs from the manifest"
    if "metadata.json" not in expected:
        return "its manifest does not name metadata.json"
    return None


def _file_table(folder: Path) -> dict[str, dict[str, Any]]:
    table = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != "manifest.json":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            table[name] = {"size": path.stat().st_size, "sha256": digest}
    return table


def check_settings(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Refuse to resume with settings under which the run would not be the one that was interrupted.

    Raises:
      InputError: naming the first setting that differs, and both values.
    """
    saved = checkpoint.metadata.get("settings", {})
    wanted = json.loads(json.dumps(settings))
    for name in sorted(set(saved) | set(wanted)):
        if saved.get(name) != wanted.get(name):
            raise InputError(
                f"train.resume: {name} is {wanted.get(name)!r} and the checkpoint {checkpoint.path} was made with "
                f"{saved.get(name)!r}; use the same value, or start a new run in another output_dir."
            )


def restore(checkpoint: Checkpoint, state: Any) -> Any:
    """The state in `checkpoint`, with the structure, shapes and dtypes of `state` (arrays or ShapeDtypeStructs).

    Raises:
      InputError: the checkpoint holds other arrays than `state`.
    """
    import orbax.checkpoint as ocp

    wanted = state_arrays(state)
    folder = checkpoint.path.absolute() / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(folder).item_metadata.tree
        for name in sorted(set(saved) ^ set(wanted)):
            where = "the checkpoint" if name in saved else "this run"
            raise InputError(
                f"{checkpoint.path}: only {where} has {name}; resume with the same model and adapter."
            )
        arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
        restored = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arguments))
    for name, leaf in wanted.items():
        found = restored[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise InputError(
                f"{checkpoint.path}: {name} is {found.dtype}{list(found.shape)} and this run's is "
                f"{leaf.dtype}{list(leaf.shape)}; resume with the same model and adapter."
            )
    # A copy: on a CPU jax would borrow numpy's memory, and the step donates the state.
    return jax.tree.unflatten(
        jax.tree.structure(state), [_placed(restored[name], leaf) for name, leaf in wanted.items()]
    )


def _placed(array: np.ndarray, leaf: Any) -> jax.Array:
    """A copy where `leaf` says: on the device, or in pinned host memory."""
    sharding = getattr(leaf, "sharding", None)
    if getattr(sharding, "memory_kind", None) == "pinned_host":
        return jax.device_put(array, sharding, may_alias=False)
    return jnp.array(array)
