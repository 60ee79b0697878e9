"""safetensors files, read without trusting them and written without ever being half there.

A file is: an unsigned 64-bit little-endian header length n, n bytes of JSON
`{"name": {"dtype": "BF16", "shape": [out, in], "data_offsets": [begin, end]}, "__metadata__": {...}}`, then the data;
offsets count from the end of the header (https://github.com/huggingface/safetensors, "Format").

The header is checked against the file's size before anything is read through it, so a truncated or damaged file gives
one sentence that names it. Damage inside the data itself is not visible here: the format has no checksum. bfloat16 and
the float8 kinds are read with `ml_dtypes`, whose arrays keep every bit.
"""

import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pronghorn.errors import InputError, RunError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DEFAULT_SHARD_BYTES = 5 * 2**30
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be: numpy (or ml_dtypes) dtype and shape."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a file: nothing is read before `read`."""

    file: Path
    offset: int

    def read(self) -> np.ndarray:
        """The tensor as an array of its own (not a view of the file), every bit as stored.

        Raises:
          InputError: when the file has become shorter since its header was checked, or cannot be read.
        """
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                data = np.fromfile(file, self.dtype, math.prod(self.shape))
        except OSError as error:
            raise InputError(f"{self.file}: cannot be read ({error.strerror}); check the file.") from None
        if data.size != math.prod(self.shape):
            raise InputError(f"{self.file}: was cut short while it was read; copy or download it again.")
        return data.reshape(self.shape)


def read_header(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file, in file order, and its metadata. Reads the header only.

    Raises:
      InputError: the file is missing, truncated, or its header contradicts itself or the file's size.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _damaged(path, f"has {size} bytes, which is no header")
            length = int.from_bytes(prefix, "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"says its header has {length} bytes, and the file has {size}")
            text = file.read(length)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions."
        ) from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"has a header that is not valid JSON ({str(error)[:100]})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "has a header that is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise _damaged(path, "has metadata that is no JSON object")
    tensors = {name: _stored_tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_coverage(path, tensors, 8 + length, size)
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def open_weights(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder: `model.safetensors`, or the shards that its index names.

    Raises:
      InputError: no safetensors here (pickled weights are refused with the cure), a damaged file or index, a shard
        outside the folder, a tensor that is missing from its shard or stored twice.
    """
    folder = Path(folder)
    if (folder / SINGLE_NAME).exists():
        return read_header(inside_folder(folder, SINGLE_NAME))[0]
    if not (folder / INDEX_NAME).exists():
        raise _no_weights(folder)
    weight_map = _read_index(folder / INDEX_NAME)
    shards: dict[str, dict[str, StoredTensor]] = {}
    for file_name in dict.fromkeys(weight_map.values()):
        shards[file_name] = read_header(inside_folder(folder, file_name))[0]
    for name, file_name in weight_map.items():
        if name not in shards[file_name]:
            raise InputError(
                f"{folder / file_name}: lacks the tensor {name!r} that {INDEX_NAME} places there; "
                "download both again."
            )
    tensors: dict[str, StoredTensor] = {}
    for file_name, shard in shards.items():
        for name, tensor in shard.items():
            if name in tensors:
                raise InputError(
                    f"{folder / file_name}: holds {name!r}, which {tensors[name].file.name} holds too; "
                    "remove one of the two files from the folder and from the index."
                )
            tensors[name] = tensor
    return tensors


def inside_folder(folder: Path, file_name: str) -> Path:
    """The path of a plain file name in `folder`, refusing every way out of it.

    A link may point inside the folder or, in the hub's cache (`<repository>/snapshots/<revision>/`, where every file
    is a link), to the repository's own `blobs`.

    Raises:
      InputError: for a name with a folder in it, a link that leaves, or no such file.
    """
    plain = file_name not in ("", ".", "..") and not any(part in file_name for part in ("/", "\\", "\0"))
    if not plain:
        raise InputError(
            f"{folder}: names the file {file_name!r}, and only plain names inside the folder are allowed; "
            "correct the index or download the model again."
        )
    path = folder / file_name
    real_folder, real_path = folder.resolve(), path.resolve()
    allowed = [real_folder]
    if real_folder.parent.name == "snapshots":
        allowed.append(real_folder.parent.parent / "blobs")
    if not any(real_path.is_relative_to(root) for root in allowed):
        raise InputError(f"{path}: is a link that leaves the folder; put the file itself there.")
    if not real_path.is_file():
        raise InputError(f"{path}: is missing; download the model again or correct {INDEX_NAME}.")
    return path


def write_file(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    fetch: Callable[[str], Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file, holding one tensor at a time: aside, fsync, then rename.

    Args:
      path: the file to appear.
      specs: every tensor's dtype and shape; the header is written from it before any data exists.
      fetch: name -> array of exactly that dtype and shape, called once for each name.
      metadata: text pairs; transformers and PEFT ask for `{"format": "pt"}`, the default.

    Raises:
      RunError: no room on the disk, or it cannot be written; nothing is left behind.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    # Wide dtypes first keeps every tensor aligned to its item size, as the reference writer does.
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    end = 0
    for name in order:
        spec = specs[name]
        if spec.dtype not in _DTYPE_NAMES:
            raise InputError(f"{path}: {name!r} has dtype {spec.dtype}, which safetensors cannot hold.")
        begin, end = end, end + spec.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    require_space(path.parent, 8 + len(text) + end)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in order:
                array = np.ascontiguousarray(fetch(name))
                assert array.dtype == specs[name].dtype and array.size == math.prod(specs[name].shape), name
                file.write(array.reshape(-1).view(np.uint8).data)
                del array
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        aside.unlink(missing_ok=True)


def write_weights(
    folder: str | Path,
    specs: Mapping[str, TensorSpec],
    fetch: Callable[[str], Any],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[str]:
    """Write a model's tensors into an existing folder: one file, or shards of at most `max_shard_bytes` and an index.

    A tensor larger than `max_shard_bytes` gets a shard of its own. See `write_file` for `specs` and `fetch`.

    Returns:
      the names of the files written.

    Raises:
      RunError: no room on the disk (asked before the first byte), or it cannot be written.
      InputError: `max_shard_bytes` is not positive.
    """
    folder = Path(folder)
    if max_shard_bytes <= 0:
        raise InputError(f"max_shard_bytes={max_shard_bytes} must be positive; 5 GiB is usual.")
    total = sum(spec.nbytes for spec in specs.values())
    require_space(folder, total)
    shards: list[dict[str, TensorSpec]] = [{}]
    room = max_shard_bytes
    for name, spec in specs.items():
        if shards[-1] and spec.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = spec
        room -= spec.nbytes
    if len(shards) == 1:
        write_file(folder / SINGLE_NAME, specs, fetch)
        return [SINGLE_NAME]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file_name, shard in zip(names, shards, strict=True):
        write_file(folder / file_name, shard, fetch)
    weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
    parameters = sum(math.prod(spec.shape) for spec in specs.values())
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX_NAME]


def require_space(folder: Path, nbytes: int) -> None:
    """Raise a RunError unless the disk of `folder` has room for `nbytes` and a little more."""
    needed = nbytes + max(nbytes // 100, 1 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder}: needs {needed / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} GiB free; "
            "free space or choose another folder."
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return result


def _stored_tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """One header entry, checked for itself; `_check_coverage` checks them together."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(path, f"lacks dtype, shape or data_offsets of {name[:100]!r}")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise InputError(
            f"{path}: {name[:100]!r} has dtype {str(dtype_name)[:20]!r}, and known are {', '.join(_DTYPES)}; "
            "convert the model or download the file again."
        )
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"has a shape or data_offsets of {name[:100]!r} that are no lists of counts")
    spec = TensorSpec(_DTYPES[dtype_name], tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise _damaged(
            path,
            f"gives {name[:100]!r} {offsets[1] - offsets[0]} bytes where its shape and dtype need {spec.nbytes}",
        )
    return StoredTensor(spec.dtype, spec.shape, path, start + offsets[0])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(path: Path, tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """The tensors follow each other without overlap or hole and end where the file ends."""
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset + tensor.nbytes > size:
            raise _damaged(
                path,
                f"ends at byte {size}, and {name[:100]!r} at {tensor.offset + tensor.nbytes}: it is truncated",
            )
        if tensor.offset != position:
            raise _damaged(path, f"has an overlap or a hole in front of {name[:100]!r}")
        position += tensor.nbytes
    if position != size:
        raise _damaged(path, f"has {size - position} bytes that belong to no tensor")


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"is not valid JSON ({str(error)[:100]})") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path, "has no weight_map")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not file_name.endswith(".safetensors"):
            raise InputError(
                f"{path}: places {name[:100]!r} in {str(file_name)[:100]!r}, which is no safetensors file; "
                "convert the model to safetensors or download it again."
            )
    return weight_map


def _no_weights(folder: Path) -> InputError:
    pickled = sorted(
        entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickled:
        return InputError(
            f"{folder}: has only pickled weights ({pickled[0]}), which can run code when opened and are never read "
            'here; convert them where you trust them: python -c "import sys; from transformers import '
            "AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])\" "
            f"{folder} OUT."
        )
    return InputError(
        f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}; give the folder that holds the weights."
    )


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}; the file is damaged, copy or download it again.")


def _cannot_write(path: Path, error: OSError) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"{path}: the disk is full; free space or choose another folder.")
    return RunError(f"{path}: could not be written ({error.strerror}); check the folder and its permissions.")
