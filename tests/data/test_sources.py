"""Every source gives the same rows with their origins, and what cannot be read is told with file and line."""

import json
import sys

import pytest

from pronghorn.data.sources import Row, content_hash, hold_out, load_rows
from pronghorn.errors import InputError

ROWS = [
    {"prompt": "a\nb", "completion": 'é, "c"'},
    {"prompt": "東京", "completion": " "},
    {"prompt": "x", "completion": "y"},
]


def _write(path):
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text(
            "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n", encoding="utf-8"
        )
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"])
def test_every_file_kind_gives_the_same_rows_without_the_datasets_library(ending, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    rows = load_rows(_write(tmp_path / f"train{ending}"))
    assert [dict(row.values) for row in rows] == ROWS
    assert all(row.origin.startswith(str(tmp_path)) for row in rows)


def test_origins_name_the_line_where_a_row_starts(tmp_path):
    assert [r.origin.rpartition(":")[2] for r in load_rows(_write(tmp_path / "a.jsonl"))] == ["1", "3", "5"]
    assert [r.origin.rpartition(":")[2] for r in load_rows(_write(tmp_path / "a.csv"))] == ["2", "4", "5"]


def test_byte_order_mark_is_not_data(tmp_path):
    for name, text in (("a.jsonl", '{"text": "t"}'), ("a.json", '[{"text": "t"}]'), ("a.csv", "text\nt\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_rows(tmp_path / name)[0].values == {"text": "t"}


def test_json_object_that_holds_one_array_and_json_lines_under_the_wrong_ending(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert [r.values for r in load_rows(path)] == ROWS
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert [r.values for r in load_rows(path)] == ROWS


def test_folder_of_files_takes_the_split(tmp_path):
    _write(tmp_path / "train-00000.jsonl")
    _write(tmp_path / "train-00001.parquet")
    (tmp_path / "test.jsonl").write_text('{"text": "held out"}\n')
    assert len(load_rows(tmp_path)) == 2 * len(ROWS)
    assert load_rows(tmp_path, "test")[0].values == {"text": "held out"}
    with pytest.raises(InputError, match="no file of split 'dev'"):
        load_rows(tmp_path, "dev")


def test_datasets_folders_objects_and_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list(ROWS)
    train.save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict({"train": train, "test": train.select([1])})
    splits.save_to_disk(str(tmp_path / "two"))
    for source in (train, splits, tmp_path / "one", tmp_path / "two"):
        assert [dict(r.values) for r in load_rows(source)] == ROWS
    assert [dict(r.values) for r in load_rows(tmp_path / "two", "test")] == ROWS[1:2]
    with pytest.raises(InputError, match="choose one of train, test"):
        load_rows(splits, "validation")


def test_hub_name_is_asked_for_its_split(monkeypatch):
    import types

    asked = []

    def load_dataset(name, configuration, *, split):
        asked.append((name, configuration, split))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_rows("org/name:small", "test")[0] == Row(ROWS[0], "org/name:small:row 1")
    assert load_rows("name")
    assert asked == [("org/name", "small", "test"), ("name", None, "train")]


def test_hub_failure_and_missing_library_are_told(monkeypatch):
    import types

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network\nand more")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"org/name: no such file or folder.*ConnectionError: no network\)"):
        load_rows("org/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        load_rows("org/name")


def test_rows_in_memory_keep_their_number():
    assert load_rows(ROWS)[1] == Row(ROWS[1], "row 2")
    assert load_rows(load_rows(ROWS)) == load_rows(ROWS)


BAD = {
    "a.jsonl": {
        "malformed": (b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON .*starts with '\{\"a\":'"),
        "not an object": (b"[1, 2]\n", r"a\.jsonl:1: a row must be a JSON object"),
        "not UTF-8": (b'{"a": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        "deep": (b'{"a": ' + b"[" * 100_000 + b"\n", r"a\.jsonl:1: nested too deeply"),
        "huge number": (b'{"a": ' + b"9" * 5000 + b"}\n", r"a\.jsonl:1: not valid JSON"),
        "empty": (b"", r"a\.jsonl: the file is empty"),
        "blank": (b"\n \n", "has no rows"),
        "binary": (bytes(range(256)), r"a\.jsonl:1: not valid JSON"),
    },
    "a.json": {
        "malformed": (b'[{"a": 1},\n{"a" 2}]', r"a\.json:2: not valid JSON"),
        "number": (b"3", r"a\.json: holds a single int"),
        "numbers": (b"[1]", r"row 1: a int, not a mapping"),
        "empty array": (b"[]", "has no rows"),
        "deep": (b"[" * 100_000, "nested too deeply"),
    },
    "a.csv": {
        "too many fields": (b"a,b\n1,2\n1,2,3\n", r"a\.csv:3: 3 fields where the header has 2"),
        "open quote": (b'a,b\n1,"2\n', r"a\.csv:\d: not valid CSV"),
        "double header": (b"a,a\n1,2\n", r"a\.csv:1: the header"),
        "header alone": (b"a,b\n", "has no rows"),
        "not UTF-8": (b"a,b\n\xff,2\n", "not UTF-8"),
    },
    "a.parquet": {
        "not Parquet": (b"PAR1 nothing of the kind PAR1", "not a readable Parquet file"),
        "short": (b"x", "not a readable Parquet file"),
    },
    "a.xlsx": {"ending": (b"text", "the ending '.xlsx' is not one pronghorn reads")},
    "a.txt": {"encoding": (b"caf\xe9", "not UTF-8 at byte 3")},
}


@pytest.mark.parametrize(("file", "case"), [(file, case) for file, cases in BAD.items() for case in cases])
def test_unreadable_file_is_told_in_one_sentence(file, case, tmp_path):
    content, message = BAD[file][case]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_rows(tmp_path / file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_truncated_parquet_is_refused(tmp_path):
    path = _write(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        load_rows(path)


def test_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pronghorn.data.sources.MAX_LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 200 + '"}')
    with pytest.raises(InputError, match=r"a\.jsonl:1: a line of more than"):
        load_rows(tmp_path / "a.jsonl")


def test_too_large_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pronghorn.data.sources.MAX_FILE_BYTES", 10)
    with pytest.raises(InputError, match=r"set data\.cache_dir"):
        load_rows(_write(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/train.jsonl", "no such file"),
        ("/nowhere", "no such file"),
        ("./nowhere", "no such file"),
        ("a/b/c", "neither a file"),
        ([], "has no rows"),
        ([1], "row 1: a int"),
        (3, "dataset of type int"),
        ({"train": []}, "has no rows"),
    ],
)
def test_unusable_source_is_told_with_the_cure(source, message):
    with pytest.raises(InputError, match=message):
        load_rows(source)


def test_empty_folder_is_told(tmp_path):
    with pytest.raises(InputError, match="no data file in the folder"):
        load_rows(tmp_path)


def test_hold_out_is_a_partition_and_repeats():
    rows = load_rows([{"text": str(i)} for i in range(40)])
    train, held = hold_out(rows, 0.1, seed=3)
    assert len(held) == 4 and sorted(train + held, key=lambda r: int(r.values["text"])) == rows
    assert hold_out(rows, 0.1, seed=3) == (train, held)
    assert hold_out(rows, 0.1, seed=4)[1] != held
    assert hold_out(rows, 0.0, seed=3) == (rows, [])
    with pytest.raises(InputError, match="eval_fraction"):
        hold_out(rows[:1], 0.5, seed=0)


def test_texts_of_a_folder_are_rows_in_order_without_hidden_ones_and_links_out_are_refused(tmp_path):
    folder, outside = tmp_path / "notes", tmp_path / "outside.md"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("b.txt", "deep/a.md", ".git/c.txt", ".hidden.md"):
        (folder / name).write_text(name)
    outside.write_text("secret")
    assert [row.values["text"] for row in load_rows(folder)] == ["b.txt", "deep/a.md"]
    assert [row.origin for row in load_rows(folder)][1] == str(folder / "deep/a.md")
    (folder / "link.md").symlink_to(outside)
    with pytest.raises(InputError, match="a link that leaves the folder"):
        load_rows(folder)


def test_hub_cache_whose_files_are_links_to_its_own_blobs_is_read(tmp_path):
    snapshot, blobs = tmp_path / "snapshots/0123/data", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text('{"text": "t"}\n')
    (snapshot / "train.jsonl").symlink_to(blobs / "abc")
    assert len(load_rows(snapshot)) == 1


def test_content_hash_follows_the_bytes_and_not_the_place(tmp_path):
    for place, text in (("one", "a"), ("two", "a"), ("three", "b")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "rows.jsonl").write_text(json.dumps({"text": text}))
    one, two, three = (content_hash(str(tmp_path / place)) for place in ("one", "two", "three"))
    assert one == two != three
