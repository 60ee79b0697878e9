"""The data set made from the standard library: what a row is, and that nothing leaks between the splits."""

import ast
import textwrap
from pathlib import Path

import pytest

from pronghorn.data.docstrings import (
    INSTRUCTION,
    docstring_rows,
    docstring_splits,
    documented_functions,
    module_group,
)
from pronghorn.errors import InputError


def _write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


EXAMPLE = '''
    class Box:
        @property
        def size(self):
            """Return the number of things in the box.

                Indented on purpose.
            The end.
            """

            # a comment stays
            return len(self.things)

        def empty(self):
            """There is no body besides this text, so nothing is left to show."""

    async def fetch(address, *, retries=3):
        r"""Fetch a page \\d times."""
        return await go(address, retries)

    def short(): "on the line of the def"; return 1

    def undocumented(x):
        return x + 1
'''


def test_a_function_loses_its_docstring_and_nothing_else(tmp_path):
    found = list(documented_functions(_write(tmp_path, "m.py", EXAMPLE)))
    assert sorted(found) == sorted(
        [
            (
                "@property\ndef size(self):\n    # a comment stays\n    return len(self.things)",
                "Return the number of things in the box.\n\n    Indented on purpose.\nThe end.",
            ),
            (
                "async def fetch(address, *, retries=3):\n    return await go(address, retries)",
                r"Fetch a page \d times.",
            ),
        ]
    )


def test_a_file_of_another_python_or_of_broken_bytes_yields_nothing(tmp_path):
    assert list(documented_functions(_write(tmp_path, "two.py", "print 'hello'"))) == []
    (tmp_path / "bytes.py").write_bytes(b"# coding: utf-8\n\xff\xfe\x00")
    assert list(documented_functions(tmp_path / "bytes.py")) == []


@pytest.mark.parametrize(
    "path, group",
    [
        ("email/mime/text.py", "email"),
        ("json/decoder.py", "json"),
        ("_pydatetime.py", "datetime"),
        ("datetime.py", "datetime"),
        ("pydoc.py", "pydoc"),
        ("_strptime.py", "strptime"),
        ("ntpath.py", "os"),
        ("posixpath.py", "os"),
    ],
)
def test_twin_modules_fall_into_one_group(path, group):
    assert module_group(Path(path)) == group


@pytest.fixture(scope="module")
def splits():
    return {name: docstring_rows(name) for name in ("train", "heldout")}


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="'train' or 'heldout'"):
        docstring_rows("test")


def test_the_library_gives_thousands_of_rows_and_a_tenth_is_held_out(splits):
    total = len(splits["train"]) + len(splits["heldout"])
    assert total > 3000
    assert 0.08 < len(splits["heldout"]) / total <= 0.1


def test_rows_are_a_question_with_the_code_and_an_answer_without(splits):
    for row in splits["heldout"][:200]:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].startswith(f"{INSTRUCTION}\n\n```python\n") and user["content"].endswith(
            "\n```"
        )
        function = ast.parse(user["content"].split("```python\n")[1].removesuffix("\n```")).body[0]
        assert ast.get_docstring(function) is None
        assert len(assistant["content"]) >= 15 and assistant["content"] == assistant["content"].strip()


def test_no_docstring_and_no_code_of_the_heldout_split_is_in_the_training_split(splits):
    for place in (0, 1):
        train = {" ".join(row["messages"][place]["content"].lower().split()) for row in splits["train"]}
        heldout = {" ".join(row["messages"][place]["content"].lower().split()) for row in splits["heldout"]}
        assert not train & heldout


def _library(folder):
    for i in range(40):
        functions = "\n".join(
            f'def work_{i}_{j}(x):\n    """Documentation number {j} of module {i}."""\n    return x * {i} + {j}\n'
            for j in range(1 + i % 4)
        )
        _write(folder, f"module{i}.py" if i % 3 else f"module{i}/inner.py", functions)
    return folder


def test_modules_are_whole_on_one_side(tmp_path):
    made = docstring_splits(heldout_fraction=0.25, stdlib=_library(tmp_path))
    modules = {
        name: {row["messages"][1]["content"].split(" of ")[1] for row in rows} for name, rows in made.items()
    }
    assert modules["train"] and modules["heldout"] and not modules["train"] & modules["heldout"]


def test_rows_and_their_order_do_not_depend_on_the_order_of_the_file_system(tmp_path):
    one = docstring_splits(stdlib=_library(tmp_path / "one"))
    _write(tmp_path / "two", "test/test_skipped.py", EXAMPLE)
    _write(tmp_path / "two", "site-packages/skipped.py", EXAMPLE)
    assert docstring_splits(stdlib=_library(tmp_path / "two")) == one


def test_a_copy_of_a_function_is_left_out(tmp_path):
    text = 'def increment(x):\n    """Add one to a given number."""\n    return x + 1\n'
    _write(tmp_path, "a.py", text)
    _write(tmp_path, "b.py", text.replace("    return x + 1", "    return  x+1"))
    _write(tmp_path, "c.py", text.replace("x + 1", "x + 2"))
    made = docstring_splits(stdlib=tmp_path)
    assert len(made["train"]) + len(made["heldout"]) == 1


def test_a_python_without_library_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="without the sources"):
        docstring_splits()
