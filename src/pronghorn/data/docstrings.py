"""Functions and docstrings of the running Python's own standard library, as chat rows.

A data set that every machine already has: each function (or method) that carries a docstring becomes one conversation,
in which the user shows the source without the docstring and the assistant writes it. Sources are parsed with `ast`;
nothing is imported or run.

Train and held-out rows come from different modules: the top-level name decides (`email.message` counts as `email`),
with twins counted as one (`_pydatetime` as `datetime`, `ntpath` as `posixpath`), and a function or docstring that
occurs again, up to layout and case, is left out. So nothing that is held out has been seen in training.
"""

import ast
import functools
import hashlib
import inspect
import os
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pronghorn.errors import InputError

Row = dict[str, list[dict[str, str]]]

INSTRUCTION = "Write the docstring of this Python function."

# tests repeat what they test; idlelib and lib2to3 are programs, not library; the others are installed or generated
_SKIPPED = frozenset(
    {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
)
_PATH_MODULES = frozenset({"posixpath", "ntpath", "genericpath", "macpath"})
_SOURCE_CHARACTERS = (30, 2500)
_DOCSTRING_CHARACTERS = (15, 1200)
_FEWEST = 500  # a full standard library has several thousand


def docstring_rows(split: Literal["train", "heldout"]) -> list[Row]:
    """One split of the running Python's library, as `docstring_splits` makes it (once a process).

    Raises:
      InputError: an unknown split, or a Python without the sources of its library.
    """
    if split not in ("train", "heldout"):
        raise InputError(f"split={split!r} is not known; use 'train' or 'heldout'.")
    return list(_own_library()[split])


@functools.cache
def _own_library() -> dict[str, list[Row]]:
    return docstring_splits()


def docstring_splits(
    *, heldout_fraction: float = 0.1, stdlib: str | Path | None = None
) -> dict[str, list[Row]]:
    """The rows of both splits, always the same ones in the same order for one version of Python.

    Takes about five seconds: the whole library is parsed.

    Args:
      heldout_fraction: share of the rows that is held out; no module has more than a third of them.
      stdlib: the folder to read; None is the running Python's.

    Returns:
      {"train": rows, "heldout": rows}; a row is `{"messages": [user, assistant]}`. Rows are ordered by a hash, so that
      neighbours come from different modules.

    Raises:
      InputError: heldout_fraction outside of (0, 1), or a Python without the sources of its library.
    """
    if not 0 < heldout_fraction < 1:
        raise InputError(f"heldout_fraction={heldout_fraction} must lie between 0 and 1; 0.1 is usual.")
    folder = Path(sysconfig.get_path("stdlib") if stdlib is None else stdlib)
    groups: dict[str, list[tuple[bytes, Row]]] = {}
    seen: set[bytes] = set()
    for file in _source_files(folder):
        relative = file.relative_to(folder)
        for source, docstring in documented_functions(file):
            keys = {_digest(_words(source)), _digest(_words(docstring))}
            if not keys & seen:
                order = _digest(f"{relative.as_posix()}\n{source}")
                groups.setdefault(module_group(relative), []).append((order, chat_row(source, docstring)))
            seen |= keys
    total = sum(map(len, groups.values()))
    if stdlib is None and total < _FEWEST:
        raise InputError(
            f"{folder}: has only {total} documented functions, so this Python came without the sources of its "
            "standard library; use another Python or give a data file with data.path=."
        )
    held_out = _choose_groups({name: len(rows) for name, rows in groups.items()}, heldout_fraction * total)
    splits: dict[str, list[tuple[bytes, Row]]] = {"train": [], "heldout": []}
    for name, rows in groups.items():
        splits["heldout" if name in held_out else "train"].extend(rows)
    return {name: [row for _, row in sorted(rows, key=lambda pair: pair[0])] for name, rows in splits.items()}


def _choose_groups(sizes: dict[str, int], rows: float) -> set[str]:
    """Modules to hold out, in the order of their names' hashes, as long as they fit into `rows`."""
    chosen, left = set(), rows
    for name in sorted(sizes, key=_digest):
        if sizes[name] <= min(left, rows / 3):
            chosen.add(name)
            left -= sizes[name]
    return chosen


def chat_row(source: str, docstring: str) -> Row:
    """One conversation: the function without its docstring, then the docstring."""
    return {
        "messages": [
            {"role": "user", "content": f"{INSTRUCTION}\n\n```python\n{source}\n```"},
            {"role": "assistant", "content": docstring},
        ]
    }


def module_group(relative: Path) -> str:
    """The name by which a file is put into a split: its top-level package or module, twins under one name.

    >>> module_group(Path("email/message.py")), module_group(Path("_pydatetime.py"))
    ('email', 'datetime')
    """
    name = relative.parts[0].removesuffix(".py")
    if name in _PATH_MODULES:
        return "os"
    stripped = name.lstrip("_")
    return stripped.removeprefix("py") if name.startswith("_py") else stripped


def documented_functions(file: Path) -> Iterator[tuple[str, str]]:
    """(source without the docstring, docstring), dedented, for each documented function of sensible length.

    A file that is no valid Python of this version yields nothing.
    """
    try:
        with warnings.catch_warnings(), tokenize.open(file) as opened:
            warnings.simplefilter("ignore")  # invalid escapes in the library's own sources
            text = opened.read()
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, OSError):
        return
    # ast counts lines by \n alone; str.splitlines would also cut at form feeds
    lines = text.split("\n")
    for node in _functions(tree.body):
        pair = _source_and_docstring(node, lines)
        if (
            pair is not None
            and _SOURCE_CHARACTERS[0] <= len(pair[0]) <= _SOURCE_CHARACTERS[1]
            and _DOCSTRING_CHARACTERS[0] <= len(pair[1]) <= _DOCSTRING_CHARACTERS[1]
        ):
            yield pair


def _source_and_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> tuple[str, str] | None:
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None or len(node.body) < 2:  # nothing is left to describe without the docstring
        return None
    expression = node.body[0]
    if expression.lineno == node.lineno or expression.end_lineno is None or node.end_lineno is None:
        return None
    if node.body[1].lineno == expression.end_lineno:  # another statement behind a semicolon
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = lines[first - 1 : expression.lineno - 1] + lines[expression.end_lineno : node.end_lineno]
    while kept and not kept[-1].strip():
        kept.pop()
    # a blank line that stood behind the docstring says nothing any more
    after = expression.lineno - first
    while after < len(kept) and not kept[after].strip():
        kept.pop(after)
    source = textwrap.dedent("\n".join(kept))
    if source[0].isspace():  # a string inside reaches further left than the function
        return None
    return source, inspect.cleandoc(docstring).strip()


def _source_files(folder: Path) -> list[Path]:
    """Every .py file of the library but the skipped folders, in a fixed order."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        found += [
            Path(parent, name) for name in names if name.endswith(".py") and not name.startswith("test_")
        ]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _functions(statements: list[Any]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function below these statements; expressions, which hold none, are not visited (`ast.walk` does)."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
        for field in ("body", "orelse", "handlers", "finalbody", "cases"):
            inner = getattr(statement, field, None)
            if isinstance(inner, list):
                yield from _functions(inner)


def _words(text: str) -> str:
    """What is compared to find copies: names and numbers, in order, without layout and case."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
