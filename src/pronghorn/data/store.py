"""Tokenised sets on disk, mapped into memory, found again by their content.

A set lies in `<cache_dir>/<key>/`: one file an array (`tokens.bin` int32, `trained.bin` bool, `offsets.bin` int64,
...), the origins as text, and `meta.json` with the number of elements of each. The key is a hash of everything that
decides the tokens: the bytes of the rows' files, tokenizer, template, and the settings of `DataConfig` that are read.
So nothing is ever stale, and a set that changes gets another folder.

A folder gets its name by one rename once it is complete; whatever a killed run left has another name and is removed by
the next run that needs the same set. Runs at the same time each write their own, and the first to finish wins.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pronghorn.data.chat_template import template_source
from pronghorn.data.collect import (
    DOCUMENT_ARRAYS,
    ROW_ARRAYS,
    TOKEN_ARRAYS,
    Collected,
    dataset_of,
    duplicates,
)
from pronghorn.data.config import DataConfig
from pronghorn.data.dataset import TokenizedDataset
from pronghorn.data.formats import DetectedFormat
from pronghorn.errors import InputError, RunError
from pronghorn.files import fsync_tree, write_json

VERSION = 1  # of the layout and of what tokenisation does; another number makes other keys
META = "meta.json"
_WRITTEN = ROW_ARRAYS | DOCUMENT_ARRAYS | TOKEN_ARRAYS
# Digests are written to be compared once, at the end.
_ARRAYS = {**{name: dtype for name, dtype in _WRITTEN.items() if name != "digests"}, "duplicates": np.bool_}
# What of a DataConfig decides the tokens; the rest decides batches, or where rows come from.
_SETTINGS = ("format", "columns", "max_length", "loss_on", "overlong", "system_prompt")


class FileArrays:
    """Arrays that grow in files: what `tokenize_into` writes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes = dict.fromkeys((*_WRITTEN, "duplicates"), 0)
        names = list(self.sizes)
        self._files = {name: (folder / f"{name}.bin").open("wb", buffering=1 << 20) for name in names}
        self._origins = (folder / "origins.txt").open("wb", buffering=1 << 20)
        self._ends = (folder / "origins.bin").open("wb", buffering=1 << 20)
        self._end = 0
        self._hashes = {name: hashlib.sha256() for name in ("offsets", "tokens", "trained", "weights")}

    def append(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).data
        self._files[name].write(data)
        self.sizes[name] += len(values)
        if name in self._hashes:
            self._hashes[name].update(data)

    @property
    def digests(self) -> dict[str, str]:
        return {name: hash_.hexdigest() for name, hash_ in self._hashes.items()}

    def append_origin(self, origin: str) -> None:
        text = origin.encode("utf-8", "replace")
        self._origins.write(text)
        self._end += len(text)
        self._ends.write(self._end.to_bytes(8, "little"))

    def finish(self) -> None:
        """Compare the documents, once all are there."""
        self._files["digests"].flush()
        path = self.folder / "digests.bin"
        self.append("duplicates", duplicates(np.fromfile(path, np.uint64)))
        path.unlink()

    def close(self) -> None:
        for file in (*self._files.values(), self._origins, self._ends):
            file.close()


class MappedOrigins(Sequence[str]):
    """Origins in two files, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._text = _mapped(folder / "origins.txt", np.dtype(np.uint8), None)
        self._ends = _mapped(folder / "origins.bin", np.dtype(np.int64), None)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return self._text[start : int(self._ends[index])].tobytes().decode("utf-8")


def cache_key(content: str, tokenizer: Any, config: DataConfig, vocab_size: int | None) -> str:
    """The name of a set: 40 hexadecimal digits."""
    import tokenizers

    template: Any = config.chat_template
    with contextlib.suppress(InputError):  # rows without conversations need none
        template = [template_source(tokenizer, config.chat_template, tools=tools) for tools in (False, True)]
    described = {
        "version": VERSION,
        "content": content,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "tokenizers": tokenizers.__version__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "probe": list(tokenizer("", add_special_tokens=True)["input_ids"]),
        "template": template,
        "vocab_size": vocab_size,
        **{name: getattr(config, name) for name in _SETTINGS},
    }
    if "strftime_now" in str(template):
        described["day"] = _today()
    text = json.dumps(described, sort_keys=True, default=dict)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def cached(cache_dir: str | Path, key: str, make: Callable[[FileArrays], Collected]) -> TokenizedDataset:
    """The set of a key, made if it is not there.

    Args:
      cache_dir: a folder, made if it is missing.
      key: from `cache_key`.
      make: fills the arrays.

    Raises:
      InputError: whatever `make` raises; nothing is left behind then.
      RunError: the disk is full or the folder cannot be written.
    """
    folder = Path(cache_dir).expanduser() / key
    found = _open(folder)
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        with _temporary(folder) as temporary:
            arrays = FileArrays(temporary)
            try:
                collected = make(arrays)
                arrays.finish()
            finally:
                arrays.close()
            meta = {
                "format": dataclasses.asdict(collected.format),
                "sizes": arrays.sizes,
                "digests": arrays.digests,
            }
            write_json(temporary / META, meta)
            fsync_tree(temporary)
            if _open(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)  # damaged
                with contextlib.suppress(OSError):  # another run was first, which is as good
                    temporary.rename(folder)
    except OSError as error:
        raise RunError(
            f"{folder.parent}: could not be written ({error.strerror or error}); free space or choose another "
            "data.cache_dir"
        ) from None
    found = _open(folder)
    if found is None:
        raise RunError(f"{folder}: was written and cannot be read; choose another data.cache_dir")
    return found


def _open(folder: Path) -> TokenizedDataset | None:
    """The set in a folder; None where it is missing, incomplete or damaged."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        sizes, format = meta["sizes"], DetectedFormat(**meta["format"])
        arrays = {
            name: _mapped(folder / f"{name}.bin", np.dtype(dtype), sizes[name])
            for name, dtype in _ARRAYS.items()
        }
        origins = MappedOrigins(folder)
        offsets = arrays["offsets"]
        whole = len(origins) == len(offsets) - 1 and int(offsets[-1]) == len(arrays["tokens"])
        return (
            dataclasses.replace(dataset_of(arrays, origins, format), digests=meta["digests"])
            if whole
            else None
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def _mapped(path: Path, dtype: np.dtype, size: int | None) -> np.ndarray:
    """A file as an array, read from disk where it is looked at."""
    bytes_ = path.stat().st_size
    if bytes_ % dtype.itemsize or (size is not None and bytes_ != size * dtype.itemsize):
        raise ValueError(f"{path} has {bytes_} bytes")
    return np.memmap(path, dtype, "r") if bytes_ else np.zeros(0, dtype)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that is locked while this process lives, and removed if it is still there at the end."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Temporary folders for the same set whose process is gone."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


def _today() -> str:
    import datetime

    return datetime.datetime.now().date().isoformat()
