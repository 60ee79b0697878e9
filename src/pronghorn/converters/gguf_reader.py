"""Reading a GGUF file: metadata, tensor table, and tensors decoded to the dtype asked for.

Layout (GGUF version 2 and 3, little endian): the magic "GGUF", a u32 version, u64 counts of tensors and of key-value
pairs, the pairs, the tensor table, padding to `general.alignment`, the tensor data. A string is a u64 length and
UTF-8 bytes. Source: the GGUF specification in ggml's `docs/gguf.md`.

The file is mapped, not read, and nothing in it is trusted: every count, length and offset is checked against the size
of the file before memory is reserved for it, and whatever is wrong becomes one `InputError` sentence.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pronghorn.converters import gguf_blocks
from pronghorn.errors import InputError

_SCALARS: dict[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_SMALLEST_PAIR = 8 + 4 + 1  # an empty key, a type and one byte
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension, a type and an offset
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_CHUNK_ELEMENTS = 1 << 22  # decode 16 MiB of fp32 at a time


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table. `shape` is in numpy order (rows first); `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    nbytes: int


class _Cursor:
    """A position in the mapped header; every read is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position, self.end = path, data, 0, len(data)

    def corrupt(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}; the file is truncated or damaged, fetch it again.")

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        if count > self.end - self.position:
            raise self.corrupt(
                f"{what} at byte {self.position} needs {count} bytes and the file ends at {self.end}"
            )
        start, self.position = self.position, self.position + count
        return self.data[start : self.position]

    def number(self, layout: str, what: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def count(self, smallest: int, what: str) -> int:
        """A u64 count of things that take at least `smallest` bytes each."""
        count = self.number("<Q", what)
        if count * smallest > self.end - self.position:
            raise self.corrupt(f"{what} says {count}, more than the {self.end} bytes of the file can hold")
        return count

    def string(self, what: str) -> str:
        content = self.take(self.count(1, f"the length of {what}"), what)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise self.corrupt(f"{what} before byte {self.position} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        """A metadata value: int, float, bool, str, list of str, or a numpy array of numbers."""
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise self.corrupt(f"{what} has the unknown value type {kind}")
        element = self.number("<I", f"the element type of {what}")
        if element == _STRING:
            return [self.string(what) for _ in range(self.count(8, f"the length of {what}"))]
        if element not in _SCALARS:
            raise self.corrupt(f"{what} is an array of the unsupported value type {element}")
        dtype = np.dtype(_SCALARS[element])
        count = self.count(dtype.itemsize, f"the length of {what}")
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)


class GGUFFile:
    """A mapped GGUF file. Use as a context manager.

    Attributes:
      path: where it lies.
      metadata: key -> int, float, bool, str, list of str, or numpy array.
      tensors: name -> `TensorInfo`, in file order.

    Raises:
      InputError: the file is missing, is no GGUF file of version 2 or 3, is truncated or inconsistent, or holds a
        block format that is not in `gguf_blocks.FORMATS`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if size < 24:
                    raise InputError(f"{self.path}: is no GGUF file ({size} bytes are less than a header).")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read as a GGUF file ({error.strerror}).") from None
        try:
            self._read_header()
        except BaseException:
            self._data.close()
            raise

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()

    def _read_header(self) -> None:
        cursor = _Cursor(self.path, self._data)
        if cursor.take(4, "the magic") != b"GGUF":
            raise InputError(f"{self.path}: is no GGUF file (it does not begin with the letters GGUF).")
        version = cursor.number("<I", "the version")
        if version not in (2, 3):
            reason = "is big-endian" if version in (2 << 24, 3 << 24) else f"has GGUF version {version}"
            raise InputError(f"{self.path}: {reason}; only little-endian files of version 2 and 3 are read.")
        tensor_count = cursor.count(_SMALLEST_TENSOR, "the number of tensors")
        pair_count = cursor.count(_SMALLEST_PAIR, "the number of metadata pairs")
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = cursor.string("a metadata key")
            if key in self.metadata:
                raise cursor.corrupt(f"the metadata key {key!r} occurs twice")
            self.metadata[key] = cursor.value(cursor.number("<I", f"the type of {key!r}"), f"{key!r}")
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise InputError(
                f"{self.path}: is one part of a split GGUF file; join the parts with llama-gguf-split --merge."
            )
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise cursor.corrupt(f"general.alignment is {alignment!r}, not a positive multiple of 8")
        rows = [self._read_tensor_row(cursor) for _ in range(tensor_count)]
        start = -(-cursor.position // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for info in rows:
            if info.name in self.tensors:
                raise cursor.corrupt(f"the tensor {info.name!r} occurs twice")
            if info.offset % alignment or start + info.offset + info.nbytes > cursor.end:
                raise cursor.corrupt(
                    f"the tensor {info.name!r} needs {info.nbytes} bytes at byte {start + info.offset} "
                    f"and the file ends at {cursor.end}"
                )
            self.tensors[info.name] = dataclasses.replace(info, offset=start + info.offset)

    def _read_tensor_row(self, cursor: _Cursor) -> TensorInfo:
        name = cursor.string("a tensor's name")
        dimensions = cursor.number("<I", f"the number of dimensions of {name!r}")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise cursor.corrupt(f"the tensor {name!r} has {dimensions} dimensions")
        # ggml writes the fastest axis first
        shape = tuple(cursor.number("<Q", f"the shape of {name!r}") for _ in range(dimensions))[::-1]
        ggml_type = cursor.number("<I", f"the type of {name!r}")
        offset = cursor.number("<Q", f"the offset of {name!r}")
        block = gguf_blocks.FORMATS.get(ggml_type)
        if block is None:
            known = gguf_blocks.OTHER_TYPE_NAMES.get(ggml_type, f"number {ggml_type}")
            supported = ", ".join(format_.name for format_ in gguf_blocks.FORMATS.values())
            raise InputError(f"{self.path}: {name!r} is stored as {known}; supported are {supported}.")
        if 0 in shape or shape[-1] % block.elements:
            raise cursor.corrupt(
                f"the tensor {name!r} has shape {shape}, which {block.name} blocks cannot fill"
            )
        return TensorInfo(name, shape, ggml_type, offset, math.prod(shape) // block.elements * block.nbytes)

    def read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
        """The tensor `name`, decoded in fp32 and rounded once to `dtype` (to nearest, ties to even).

        Returns:
          An array of its own, in the tensor's shape (rows first).
        """
        info = self.tensors[name]
        block = gguf_blocks.FORMATS[info.ggml_type]
        row_bytes = info.shape[-1] // block.elements * block.nbytes
        stored = np.frombuffer(self._data, np.uint8, info.nbytes, info.offset).reshape(-1, row_bytes)
        out = np.empty((len(stored), info.shape[-1]), dtype)
        step = max(1, _CHUNK_ELEMENTS // info.shape[-1])
        for row in range(0, len(stored), step):
            # a garbled scale may overflow the narrower dtype; the values are then infinite, as the file says
            with np.errstate(over="ignore", invalid="ignore"):
                out[row : row + step] = gguf_blocks.dequantize(stored[row : row + step], info.ggml_type)
        del stored  # the map cannot be closed while a view of it is alive
        return out.reshape(info.shape)
