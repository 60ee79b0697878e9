"""Rows from files, folders, the Hugging Face hub or memory; every row remembers where it came from.

JSON Lines and CSV need only the standard library, Parquet needs pyarrow; the `datasets` library is imported only for
its own folders and for hub names. Whatever cannot be read is an `InputError` that names the file and the line.
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pronghorn.data.permutation import permutation
from pronghorn.errors import InputError

MAX_FILE_BYTES = 16 * 2**30  # rows are held in memory; a larger file is a mistake or needs splitting
MAX_LINE_BYTES = 64 * 2**20  # one JSON Lines row; longer is a file without line breaks
MAX_FIELD_CHARS = 16 * 2**20  # one CSV field; longer is a quote that never closes
MAX_TEXT_BYTES = 256 * 2**20  # one .txt or .md file, which is one document before it is split
SHOWN_CHARS = 60
TEXT_ENDINGS = (".txt", ".md")


class Row(NamedTuple):
    """One row: its columns, and where it came from ("train.jsonl:17")."""

    values: Mapping[str, Any]
    origin: str


def load_rows(source: Any, split: str | None = None) -> list[Row]:
    """Read every row of `source`.

    Args:
      source: a path (.jsonl, .ndjson, .json, .parquet, .csv, .tsv, a folder of those, a .txt or .md file, a folder of
        such with folders in it, or a folder written by `datasets.save_to_disk`), a hub name ("org/name" or
        "org/name:configuration"), a sequence of mappings, or a `datasets.Dataset` or `DatasetDict`.
      split: which split where there are several; None takes "train".

    Returns:
      At least one row, in file order.

    Raises:
      InputError: nothing there, nothing in it, or a row that cannot be read (file:line and its beginning).
    """
    for file in _files(source, split):
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(
                f"{file}: {size / 2**30:.1f} GiB, over the {MAX_FILE_BYTES // 2**30} that are held in memory; set "
                "data.cache_dir, which streams the rows"
            )
    rows = list(_rows(source, split))
    if not rows:
        raise InputError(f"{_describe(source, split)} has no rows; give a file with at least one")
    return rows


def stream_rows(source: Any, split: str | None = None) -> Iterator[Row]:
    """`load_rows` one row after the other: nothing is held, and there may be none. JSON files are read whole.

    Raises:
      InputError: while the rows are read, as `load_rows`.
    """
    return iter(_rows(source, split))


def content_hash(source: str, split: str | None = None) -> str:
    """SHA-256 of what a path holds: the bytes of its files, or the rows of what has no files of its own."""
    digest = hashlib.sha256()
    files = _files(source, split)
    for file in files:
        try:
            with file.open("rb") as opened:
                digest.update(f"{file.name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    if not files:
        for row in stream_rows(source, split):
            digest.update(
                json.dumps(row.values, default=str, ensure_ascii=False).encode("utf-8", "surrogatepass")
            )
            digest.update(b"\n")
    return digest.hexdigest()


def _files(source: Any, split: str | None) -> list[Path]:
    """The plain files that a path is read from; none for a hub name, a `datasets` folder or memory."""
    if not isinstance(source, str | Path):
        return []
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir() and not _is_datasets_folder(path):
        return _folder_files(path, split)
    return []


def hold_out(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (train, held out), both in their old order; the same for the same count, fraction and seed.

    At least one row is held out when `fraction` > 0, and at least one is left.

    Raises:
      InputError: fewer than two rows to split.
    """
    if fraction == 0:
        return rows, []
    if len(rows) < 2:
        raise InputError(f"data.eval_fraction={fraction} needs at least two rows, there are {len(rows)}")
    held = held_out_rows(len(rows), fraction, seed)
    return [r for r, out in zip(rows, held, strict=True) if not out], [
        r for r, out in zip(rows, held, strict=True) if out
    ]


def held_out_rows(rows: int, fraction: float, seed: int) -> np.ndarray:
    """bool[rows]: which rows `hold_out` holds out."""
    count = min(max(round(rows * fraction), 1), rows - 1)
    held = np.zeros(rows, bool)
    held[permutation(rows, seed=seed, stream=-1)[:count]] = True
    return held


def _rows(source: Any, split: str | None) -> Iterator[Row]:
    if isinstance(source, str | Path):
        return _rows_of_path(str(source), split)
    if isinstance(source, Mapping):  # datasets.DatasetDict is one
        return _rows_of_splits(source, split)
    if isinstance(source, Iterable) and not isinstance(source, bytes):
        return _rows_of_memory(source, "row ")
    raise InputError(
        f"dataset of type {type(source).__name__}: give a path, a hub name, a list of mappings or a datasets.Dataset"
    )


def _describe(source: Any, split: str | None) -> str:
    name = f"dataset {str(source)!r}" if isinstance(source, str | Path) else "the dataset"
    return f"{name}, split {split!r}," if split else name


def _rows_of_memory(source: Iterable[Any], prefix: str) -> Iterator[Row]:
    for number, values in enumerate(source, 1):
        if isinstance(values, Row):
            yield values
        elif isinstance(values, Mapping):
            yield Row(values, f"{prefix}{number}")
        else:
            raise InputError(
                f"{prefix}{number}: a {type(values).__name__}, not a mapping of columns to values"
            )


def _rows_of_splits(splits: Mapping[str, Any], split: str | None) -> Iterator[Row]:
    wanted = split or "train"
    if wanted not in splits:
        raise InputError(
            f"split {wanted!r} is not in the dataset; choose one of {', '.join(map(str, splits))}"
        )
    return _rows_of_memory(splits[wanted], f"{wanted} row ")


def _rows_of_path(source: str, split: str | None) -> Iterator[Row]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split)
    if path.exists():
        return _read_file(path)
    if (
        path.suffix.lower() in _READERS
        or path.is_absolute()
        or source.startswith((".", "~"))
        or "\\" in source
    ):
        raise InputError(f"{source}: no such file; check the path (relative to {str(Path.cwd())!r})")
    return _read_hub(source, split)


def _read_file(path: Path) -> Iterator[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: the ending {path.suffix!r} is not one pronghorn reads; use {', '.join(sorted(_READERS))}"
        )
    if not path.is_file():
        raise InputError(f"{path}: not a plain file; give a file or a folder")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; give one with at least one row")
    try:
        yield from reader(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check its permissions"
        ) from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise InputError(
                    f"{path}:{number}: a line of more than {MAX_LINE_BYTES // 2**20} MiB; "
                    "JSON Lines holds one object a line"
                )
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield _json_row(line, f"{path}:{number}")


def _json_row(line: bytes, origin: str) -> Row:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{origin}: not UTF-8 at byte {error.start} of the line, which {_starts(line)}"
        ) from error
    except RecursionError as error:
        raise InputError(f"{origin}: nested too deeply; the line {_starts(line)}") from error
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{origin}: not valid JSON ({reason}); the line {_starts(line)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{origin}: a row must be a JSON object {{...}}; the line {_starts(line)}")
    return Row(values, origin)


def _starts(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return f"starts with {text[:SHOWN_CHARS]!r}"


def _read_json(path: Path) -> Iterator[Row]:
    """An array of objects; an object that holds one such array; or JSON Lines under the wrong ending."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply; the file {_starts(data[:1000])}") from error
    except ValueError as error:
        first = data.lstrip().split(b"\n", 1)[0].strip()
        if first.startswith(b"{") and first.endswith(b"}"):
            yield from _read_jsonl(path)
            return
        place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{place}: not valid JSON ({reason}); the file {_starts(data[:1000])}") from error
    if isinstance(value, dict):
        arrays = [v for v in value.values() if isinstance(v, list) and all(isinstance(x, dict) for x in v)]
        value = arrays[0] if len(arrays) == 1 and "messages" not in value else [value]
    if not isinstance(value, list):
        raise InputError(
            f"{path}: holds a single {type(value).__name__}; give an array of objects [{{...}}, ...]"
        )
    yield from _rows_of_memory(value, f"{path}:row ")


def _read_csv(path: Path) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    old_limit = csv.field_size_limit(MAX_FIELD_CHARS)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            if len(set(header)) != len(header) or not all(header):
                raise InputError(f"{path}:1: the header must name every column once, it is {header!r}")
            start = reader.line_num + 1
            for fields in reader:
                origin, start = f"{path}:{start}", reader.line_num + 1
                if len(fields) != len(header):
                    if not fields:
                        continue
                    raise InputError(
                        f"{origin}: {len(fields)} fields where the header has {len(header)}; "
                        f"the row starts with {str(fields[0])[:SHOWN_CHARS]!r}"
                    )
                yield Row(dict(zip(header, fields, strict=True)), origin)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not valid CSV ({error}); check the quotes") from error
    finally:
        csv.field_size_limit(old_limit)


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow; run: pip install pyarrow") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}:row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{path}: not a readable Parquet file after row {number} ({reason})") from error


def _read_text(path: Path) -> Iterator[Row]:
    """One row a file."""
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise InputError(
            f"{path}: over {MAX_TEXT_BYTES // 2**20} MiB is no single text; cut it into files, or into JSON Lines rows "
            'such as {"text": "..."}'
        )
    try:
        yield Row({"text": path.read_bytes().decode("utf-8-sig")}, str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def _is_datasets_folder(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def _read_folder(path: Path, split: str | None) -> Iterator[Row]:
    if _is_datasets_folder(path):
        datasets = _datasets_library(str(path))
        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:
            raise InputError(f"{path}: not a readable `datasets` folder ({_first_line(error)})") from error
        if isinstance(loaded, Mapping):
            return _rows_of_splits(loaded, split)
        return _rows_of_memory(loaded, f"{path}:row ")
    return (row for file in _folder_files(path, split) for row in _read_file(file))


def _folder_files(path: Path, split: str | None) -> list[Path]:
    """The data files of a folder, those of the split where they are named so; else all texts in it and below."""
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in _READERS and p.is_file())
    rows = [file for file in files if file.suffix.lower() not in TEXT_ENDINGS]
    texts = [] if rows else _text_files(path)
    files = rows or texts
    if not files:
        raise InputError(f"{path}: no data file in the folder; expected {', '.join(sorted(_READERS))}")
    for file in files:
        _refuse_way_out(path, file)
    if texts and not split:
        return texts
    wanted = split or "train"
    of_split = [
        p for p in files if p.stem == wanted or p.stem.startswith((f"{wanted}-", f"{wanted}_", f"{wanted}."))
    ]
    if not of_split and split:
        names = ", ".join(p.name for p in files[:5])
        raise InputError(f"{path}: no file of split {split!r}; the folder has {names}")
    return of_split or files


def _text_files(path: Path) -> list[Path]:
    """Every .txt and .md under a folder, in order; hidden folders and links to folders are left alone."""
    found = []
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found += [Path(folder) / n for n in names if Path(n).suffix.lower() in TEXT_ENDINGS and n[0] != "."]
    return sorted(file for file in found if file.is_file())


def _refuse_way_out(folder: Path, file: Path) -> None:
    """A link may point inside the folder or, in the hub's cache, to the repository's own blobs."""
    real_folder, real_file = folder.resolve(), file.resolve()
    allowed = [real_folder]
    for parent in (real_folder, *real_folder.parents):
        if parent.parent.name == "snapshots":
            allowed.append(parent.parent.parent / "blobs")
    if not any(real_file.is_relative_to(root) for root in allowed):
        raise InputError(
            f"{file}: is a link that leaves the folder; put the file itself there, or give its own path"
        )


def _read_hub(name: str, split: str | None) -> Iterator[Row]:
    repository, _, configuration = name.partition(":")
    parts = repository.split("/")
    if len(parts) > 2 or not all(
        p and p.replace("-", "").replace("_", "").replace(".", "").isalnum() for p in parts
    ):
        raise InputError(f"{name}: neither a file, a folder, nor a hub name of the form org/name")
    datasets = _datasets_library(name)
    try:
        loaded = datasets.load_dataset(repository, configuration or None, split=split or "train")
    except Exception as error:
        raise InputError(
            f"{name}: no such file or folder, and the hub or its cache did not give split {split or 'train'!r} "
            f"({_first_line(error)})"
        ) from error
    return _rows_of_memory(loaded, f"{name}:row ")


def _datasets_library(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source}: needs the `datasets` library; run: pip install datasets") from error
    return datasets


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    **dict.fromkeys(TEXT_ENDINGS, _read_text),
}
