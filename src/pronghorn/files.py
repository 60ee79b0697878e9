"""Writing files so that a reader sees the old one or the whole new one, never half of it."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pronghorn.errors import InputError, RunError


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write `content` to a temporary sibling, fsync it, rename it over `path`, fsync the folder.

    Raises:
      RunError: when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise _cannot_write(path, error) from None


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, atomically; NaN and infinities become null, since JSON has neither."""
    write_atomic(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def require_new(path: str | Path) -> None:
    """Refuse a path where `new_folder` could not put a folder: anything but nothing and an empty folder.

    Raises:
      InputError: `path` exists and is not empty.
    """
    path = Path(path)
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise _cannot_write(path, error) from None
    if taken:
        raise InputError(f"{path}: exists and is not empty; choose another folder or remove it first.")


def made_once(path: Path, make: Callable[[Path], Any]) -> None:
    """A folder of a cache that any number of processes make at once: the first to end wins, and what it made stays.

    Args:
      path: the folder, which is not there yet.
      make: fills a folder that is given to it and does not exist.

    Raises:
      RunError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as place:
            made = Path(place) / "made"
            make(made)
            try:
                made.rename(path)
            except OSError:
                # Another process was faster. Its folder holds the same, and somebody may be reading it by now.
                if not path.is_dir() or not any(path.iterdir()):
                    raise
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextlib.contextmanager
def new_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary sibling folder to fill; it becomes `path` by rename when the block ends without an error.

    After an error nothing is left: not the temporary folder, and no parent folder that was made for it.

    Args:
      path: the folder to appear. It may exist when it is empty, or when `replace` is true.
      replace: move an existing folder aside, and delete it only after the new one is in its place.

    Raises:
      InputError: `path` exists and is not empty, and `replace` is false.
      RunError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    if not replace:
        require_new(path)
    made = [parent for parent in path.parents if not parent.exists()]
    temporary = aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
        yield temporary
        fsync_tree(temporary)
        if path.exists():
            aside = path.with_name(f".{path.name}.replaced-{os.getpid()}")
            path.rename(aside)
        temporary.rename(path)
        fsync_folder(path.parent)
    except BaseException as error:
        if aside is not None and aside.exists() and not path.exists():
            aside.rename(path)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # not made yet, or something else is in it by now
                parent.rmdir()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _cannot_write(path: Path, error: OSError) -> RunError:
    reason = error.strerror or str(error)
    return RunError(f"{path}: could not be written ({reason}); free space or choose another folder.")


def fsync_tree(folder: Path) -> None:
    """fsync every file and folder under `folder`, so that a rename after it publishes whole files."""
    for entry in folder.rglob("*"):
        if entry.is_file() and not entry.is_symlink():
            with entry.open("rb") as file:
                os.fsync(file.fileno())
        elif entry.is_dir():
            fsync_folder(entry)
    fsync_folder(folder)


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
