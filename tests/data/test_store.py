"""The tokenised cache: the same set as in memory, found by content, safe against kills and neighbours."""

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from pronghorn.data import DataConfig, Loader, read_sets, reading, store
from pronghorn.errors import InputError
from tests import tiny


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    tiny.write_rows(path, [tiny.chat(f"q{i}", f"é{i} " * (i % 7)) | {"weight": 1 + i % 2} for i in range(40)])
    return path


def _read(path, tmp_path, **options):
    data = DataConfig(path=str(path), max_length=48, cache_dir=str(tmp_path / "cache"), **options)
    return read_sets(data, tiny.tiny_tokenizer())


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_mapped_set_is_the_one_in_memory(rows, tmp_path, fraction):
    plain = read_sets(
        DataConfig(path=str(rows), max_length=48, eval_fraction=fraction), tiny.tiny_tokenizer()
    )
    for one, other in zip(plain, _read(rows, tmp_path, eval_fraction=fraction), strict=True):
        if one is None:
            assert other is None
            continue
        assert isinstance(other.tokens, np.memmap)
        assert one.stats == other.stats and one.format == other.format
        assert list(one.origins) == list(other.origins) and one.fingerprint == other.fingerprint
        a, b = (Loader(d, batch_size=2, max_length=48, seed=1).batch_at(1) for d in (one, other))
        assert all(np.array_equal(a[name], b[name]) for name in a) and "weights" in a


def test_set_is_tokenised_once_and_again_when_anything_that_decides_it_changes(rows, tmp_path, monkeypatch):
    made = []
    real = reading.tokenize_into
    monkeypatch.setattr(reading, "tokenize_into", lambda *a, **k: made.append(1) or real(*a, **k))
    for _ in range(2):
        _read(rows, tmp_path)
    _read(rows, tmp_path, seed=5, eval_fraction=0.5)  # decides batches, not tokens
    assert len(made) == 1
    for options in ({"loss_on": "last"}, {"overlong": "drop"}, {"system_prompt": "s"}):
        _read(rows, tmp_path, **options)
    assert len(made) == 4
    rows.write_text(rows.read_text() + json.dumps(tiny.chat("one", "more")) + "\n")
    _read(rows, tmp_path)
    assert len(made) == 5 and len(list((tmp_path / "cache").iterdir())) == 5


@pytest.mark.parametrize("harm", ["truncate tokens", "no meta", "meta of nothing", "no origins"])
def test_damaged_set_is_made_again(rows, tmp_path, harm):
    expected = _read(rows, tmp_path)[0].fingerprint
    (folder,) = (tmp_path / "cache").iterdir()
    if harm == "truncate tokens":
        os.truncate(folder / "tokens.bin", 8)
    elif harm == "no meta":
        (folder / "meta.json").unlink()
    elif harm == "meta of nothing":
        (folder / "meta.json").write_text("[]")
    else:
        (folder / "origins.bin").unlink()
    assert _read(rows, tmp_path)[0].fingerprint == expected


def test_refused_rows_leave_nothing_behind(rows, tmp_path):
    rows.write_text(rows.read_text() + '{"messages": 3}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:41"):
        _read(rows, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


KILLED = """
import sys, time
from pathlib import Path
from pronghorn.data import store
def make(arrays):
    print("writing", flush=True)
    time.sleep(60)
store.cached(sys.argv[1], "key", make)
"""


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    (left,) = tmp_path.iterdir()
    store._remove_leftovers(tmp_path / "key")
    assert left.is_dir()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert left.is_dir() and not (tmp_path / "key").exists()
    store._remove_leftovers(tmp_path / "key")
    assert not left.exists()


def test_runs_at_the_same_time_get_the_same_set(rows, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(_read(rows, tmp_path)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({dataset.fingerprint for dataset in found}) == 1 and len(found) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_cache_streams_a_set_that_would_be_too_large_for_memory(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("pronghorn.data.sources.MAX_FILE_BYTES", 10)
    with pytest.raises(InputError, match=r"data\.cache_dir"):
        read_sets(DataConfig(path=str(rows), max_length=48), tiny.tiny_tokenizer())
    assert len(_read(rows, tmp_path)[0]) == 40
