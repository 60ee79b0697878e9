"""A reader sees the old file or folder or the whole new one, whatever happens while it is written."""

import errno
import json
import os

import pytest

from pronghorn import files
from pronghorn.errors import InputError, RunError
from pronghorn.files import made_once, new_folder, require_new, write_atomic, write_json


@pytest.fixture
def full_disk(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(folder, text="new"):
    (folder / "inner").mkdir()
    (folder / "inner/file").write_text(text)


@pytest.mark.parametrize("content", ["é東\n", b"\x00\xff"])
def test_file_has_the_content_and_nothing_is_beside_it(tmp_path, content):
    path = tmp_path / "deep/er/file"
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == ["deep", "deep/er", "deep/er/file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_full_disk_leaves_the_old_file(tmp_path, full_disk):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RunError, match=r"No space left on device\); free space"):
        write_atomic(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_file_under_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(RunError, match="could not be written"):
        write_atomic(tmp_path / "taken/file", "new")


def test_numbers_that_json_lacks_become_null(tmp_path):
    write_json(tmp_path / "x.json", {"a": [float("nan"), (float("-inf"), 1.5)], 2: {"b": True}, "é": None})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": [None, [None, 1.5]], "2": {"b": True}, "é": None}
    assert "é" in text and text.endswith("}\n")


@pytest.mark.parametrize("exists", [False, True])
def test_folder_appears_whole_when_the_block_ends(tmp_path, exists):
    if exists:
        (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        fill(folder)
        assert "out/inner" not in names(tmp_path)
    assert names(tmp_path) == ["out", "out/inner", "out/inner/file"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, InputError])
def test_after_an_error_neither_the_folder_nor_parents_made_for_it_are_left(tmp_path, error):
    (tmp_path / "was here").mkdir()
    with pytest.raises(error), new_folder(tmp_path / "was here/deep/er/out") as folder:
        fill(folder)
        raise error
    assert names(tmp_path) == ["was here"]


def test_full_disk_leaves_no_folder(tmp_path, full_disk):
    refused = pytest.raises(RunError, match=r"out: could not be written \(No space left")
    with refused, new_folder(tmp_path / "deep/out") as folder:
        fill(folder)
    assert names(tmp_path) == []


def test_folder_that_holds_something_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    before = names(tmp_path)
    for refuse in (lambda: require_new(tmp_path / "out"), lambda: new_folder(tmp_path / "out").__enter__()):
        with pytest.raises(InputError, match="out: exists and is not empty; choose another"):
            refuse()
    assert names(tmp_path) == before


def test_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match="exists and is not empty"):
        require_new(tmp_path / "out")


@pytest.mark.parametrize("out", ["absent", "empty"])
def test_absent_and_empty_folders_are_new(tmp_path, out):
    (tmp_path / "empty").mkdir()
    require_new(tmp_path / out)


def test_folder_made_by_two_at_once_is_that_of_the_first(tmp_path):
    path = tmp_path / "cache" / "model"

    def make(content, meanwhile=lambda: None):
        def fill(folder):
            folder.mkdir()
            (folder / "config.json").write_text(content)
            meanwhile()

        return fill

    made_once(path, make("slow", meanwhile=lambda: made_once(path, make("fast"))))
    assert (path / "config.json").read_text() == "fast"
    assert list(path.parent.iterdir()) == [path]


def test_folder_that_could_not_be_made_once_leaves_nothing(tmp_path):
    def fail(folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left"):
        made_once(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []


def test_replaced_folder_holds_the_new_files_only(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    with new_folder(tmp_path / "out", replace=True) as folder:
        fill(folder)
    assert names(tmp_path) == ["out", "out/inner", "out/inner/file"]


@pytest.mark.parametrize("inside", [True, False])
def test_folder_to_replace_is_back_after_a_failure(tmp_path, monkeypatch, inside):
    """Inside the block, and between the two renames that swap the folders."""
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    before, rename = names(tmp_path), files.Path.rename

    def fail(self, target):
        if str(target) == str(tmp_path / "out") and "replaced" not in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    if not inside:
        monkeypatch.setattr(files.Path, "rename", fail)
    with pytest.raises(RunError), new_folder(tmp_path / "out", replace=True) as folder:
        fill(folder)
        if inside:
            raise OSError(errno.EIO, "Input/output error")
    assert names(tmp_path) == before and (tmp_path / "out/inner/file").read_text() == "old"


def test_folder_under_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(RunError, match="could not be written"), new_folder(tmp_path / "taken/out"):
        pass
    assert names(tmp_path) == ["taken"]
