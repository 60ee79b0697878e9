"""Checkpoints that are whole or do not count.

Layout: `checkpoints/step_00000060/` with `state/` (Orbax), `metadata.json` (step, settings that must match) and,
written last, `manifest.json` (size and sha256 of every file). A checkpoint grows in `step_00000060.partial`, every
file is fsynced, and a rename publishes it; older ones are removed only after that. So whatever happens in the middle
of a save, the newest complete checkpoint is intact, and what has no manifest, or differs from it, is skipped aloud.

Orbax copies the state to the host and writes on its own threads while training goes on; a thread here waits for it
and publishes.
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
      >>> with CheckpointWriter(folder, keep=2) as writer:
      ...     writer.save(state, step=60, metadata={"settings": settings})
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        self.folder = Path(folder).absolute()
        self.keep = keep
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

        Raises:
          RunError: the disk has no room, or the save before this one failed.
        """
        import orbax.checkpoint as ocp

        self.wait()
        check_free_space(self.folder, state_bytes(state))
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f"{final.name}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in (partial, final):
                if leftover.exists():
                    shutil.rmtree(leftover)
            partial.mkdir()
            if self._checkpointer is None:
                self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            self._checkpointer.save(partial / "state", args=ocp.args.PyTreeSave(state_arrays(state)))
        except (OSError, ValueError) as error:
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

    def _remove_old(self) -> None:
        complete = sorted(path for path in self.folder.glob("step_*") if (path / "manifest.json").is_file())
        for path in complete[: -self.keep]:
            # The manifest first: a removal that is cut short must not leave something that looks complete.
            (path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)

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


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse when the disk of `folder` cannot take `needed` more bytes.

    Raises:
      RunError: with both figures.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
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
    folder = Path(folder)
    entries = (path for path in folder.glob("step_*") if path.is_dir()) if folder.is_dir() else ()
    for path in sorted(entries, key=lambda path: path.name.partition(".")[0], reverse=True):
        problem = damage(path)
        if problem is not None:
            say(f"{path}: skipped, {problem}.")
            continue
        metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        return Checkpoint(path, int(metadata["step"]), metadata)
    return None


def damage(path: Path) -> str | None:
    """What makes a checkpoint folder unusable, in words, or None when every file is as the manifest says."""
    if path.name.endswith(".partial") or not (path / "manifest.json").is_file():
        return "its save was never finished"
    try:
        expected = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
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
    return jax.tree.unflatten(jax.tree.structure(state), [jnp.array(restored[name]) for name in wanted])
