"""Batches are a pure function of the step, hold every document once an epoch, and the thread dies loudly."""

import threading

import numpy as np
import pytest

from pronghorn.data.formats import DetectedFormat
from pronghorn.data.loader import Loader
from pronghorn.data.tokenization import TokenizationStats, TokenizedDataset
from pronghorn.errors import InputError, RunError

KEYS = {"input_ids", "labels", "segment_ids", "positions"}


def _dataset(lengths, seed=0):
    """Documents of the given lengths; every token is unique, so that a document can be told from its tokens."""
    total = int(np.sum(lengths))
    tokens = np.arange(1, total + 1, dtype=np.int32)
    trained = np.random.default_rng(seed).random(total) < 0.6
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    trained[offsets[:-1]] = False
    stats = TokenizationStats(len(lengths), len(lengths), total, int(trained.sum()), 0, 0, 0, 0, 0, {})
    origins = tuple(f"row {i}" for i in range(len(lengths)))
    return TokenizedDataset(tokens, trained, offsets, origins, stats, DetectedFormat("text", "made"))


LENGTHS = [3, 9, 1, 5, 5, 7, 2, 11, 4, 5, 6, 8, 3]
DATASET = _dataset(LENGTHS)


def _loader(**options):
    return Loader(DATASET, **{"batch_size": 2, "micro_batches": 2, "max_length": 11, "seed": 1, **options})


def _documents(loader, epoch):
    """(tokens, labels) of every document of an epoch, in order, read back from its batches."""
    found = []
    for step in range(epoch * len(loader), (epoch + 1) * len(loader)):
        batch = loader.batch_at(step)
        rows = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
        for r in range(len(rows["input_ids"])):
            segments = rows["segment_ids"][r]
            for segment in range(1, segments.max() + 1):
                (places,) = np.nonzero(segments == segment)
                assert (np.diff(places) == 1).all()
                assert rows["positions"][r][places].tolist() == list(range(len(places)))
                found.append((tuple(rows["input_ids"][r][places]), tuple(rows["labels"][r][places])))
            padding = segments == 0
            assert not rows["input_ids"][r][padding].any() and not rows["positions"][r][padding].any()
            assert (rows["labels"][r][padding] == -100).all()
            assert not np.any(np.diff(segments[~padding]) < 0) and not padding[: (~padding).sum()].any()
    return found


ALL = sorted(tuple(map(tuple, DATASET.document(i))) for i in range(len(DATASET)))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_document_is_in_an_epoch_exactly_once(packing, epoch):
    assert sorted(_documents(_loader(packing=packing), epoch)) == ALL


def test_batch_has_static_shapes_and_int32():
    loader = _loader(batch_size=3, micro_batches=2)
    for step in range(2 * len(loader)):
        batch = loader.batch_at(step)
        assert set(batch) == KEYS
        assert all(a.shape == (2, 3, 11) and a.dtype == np.int32 for a in batch.values())


def test_batch_is_a_pure_function_of_the_step():
    forward, backward = _loader(), _loader()
    steps = range(4 * len(forward))
    seen = [forward.batch_at(step) for step in steps]
    for step in reversed(steps):
        again = backward.batch_at(step)
        assert all(np.array_equal(seen[step][name], again[name]) for name in KEYS)


def test_order_depends_on_epoch_and_seed():
    loader = _loader()
    assert _documents(loader, 0) != _documents(loader, 1)
    assert _documents(loader, 0) != _documents(_loader(seed=2), 0)


def test_without_shuffling_documents_come_in_order_in_every_epoch():
    loader = _loader(packing=False, shuffle=False)
    for epoch in range(2):
        documents = [DATASET.document(i) for i in range(len(DATASET))]
        assert _documents(loader, epoch) == [tuple(map(tuple, d)) for d in documents]


def test_micro_batches_hold_the_rows_of_one_large_batch():
    small, large = _loader(batch_size=2, micro_batches=4), _loader(batch_size=8, micro_batches=1)
    assert len(small) == len(large)
    for step in range(2 * len(small)):
        a, b = small.batch_at(step), large.batch_at(step)
        assert all(np.array_equal(a[name].reshape(8, -1), b[name].reshape(8, -1)) for name in KEYS)


def test_last_batch_of_an_epoch_is_filled_with_empty_rows():
    loader = _loader(packing=False, batch_size=5, micro_batches=1)
    assert len(loader) == 3
    last = loader.batch_at(2)
    assert (last["segment_ids"][0].max(axis=1) > 0).tolist() == [True] * 3 + [False] * 2
    assert (loader.batch_at(3)["segment_ids"][0].max(axis=1) > 0).all()


def test_set_smaller_than_a_batch_is_one_step():
    loader = Loader(_dataset([3]), batch_size=4, max_length=8)
    assert len(loader) == 1
    assert loader.batch_at(0)["segment_ids"].sum() == 3


def test_documents_at_names_the_rows_of_a_step():
    loader = _loader()
    batch, documents = loader.batch_at(3), loader.documents_at(3)
    for row, numbers in zip(batch["input_ids"].reshape(-1, 11), documents, strict=True):
        tokens = [t for n in numbers for t in DATASET.document(n)[0]]
        assert row[: len(tokens)].tolist() == tokens and not row[len(tokens) :].any()


def test_length_buckets_shorten_rows_when_documents_fit():
    loader = _loader(packing=False, shuffle=False, batch_size=1, micro_batches=1, length_buckets=(4, 8))
    widths = [loader.batch_at(step)["input_ids"].shape[-1] for step in range(len(loader))]
    assert widths == [next(w for w in (4, 8, 11) if w >= n) for n in LENGTHS]
    assert sorted(_documents(loader, 0)) == ALL


def test_efficiency_is_the_share_of_real_tokens():
    loader = _loader()
    batches = [loader.batch_at(step)["segment_ids"] > 0 for step in range(len(loader))]
    rows = sum(int(b.any(axis=-1).sum()) for b in batches)
    assert loader.efficiency == pytest.approx(sum(int(b.sum()) for b in batches) / (rows * 11))


def test_iterating_equals_asking_for_each_step():
    loader = _loader()
    for start in (0, 3):
        batches = list(loader.iterate(start, start + 7))
        assert len(batches) == 7
        for step, batch in enumerate(batches, start):
            assert all(np.array_equal(batch[name], loader.batch_at(step)[name]) for name in KEYS)


def test_iterating_from_the_stop_gives_nothing():
    assert list(_loader().iterate(5, 5)) == []


class _Broken(Loader):
    def batch_at(self, step):
        if step == 2:
            raise OSError("the disk went away")
        return super().batch_at(step)


def test_error_in_the_thread_is_raised_to_the_reader():
    iterator = _Broken(DATASET, batch_size=2, max_length=11).iterate()
    next(iterator), next(iterator)
    with pytest.raises(OSError, match="the disk went away"):
        next(iterator)


def test_thread_that_vanishes_is_told(monkeypatch):
    monkeypatch.setattr(Loader, "_make_ahead", lambda *args: None)
    with pytest.raises(RunError, match="data thread ended"):
        next(_loader().iterate())


def test_closing_the_iterator_ends_its_thread():
    iterator = _loader().iterate()
    next(iterator)
    (thread,) = [t for t in threading.enumerate() if t.name == "pronghorn-loader"]
    iterator.close()
    thread.join(timeout=5)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"micro_batches": 1.5}, "micro_batches=1.5"),
        ({"max_length": 10}, "a document of 11 tokens"),
        ({"packing": False, "length_buckets": (12,)}, "length_buckets"),
    ],
)
def test_sizes_out_of_range_are_told(options, message):
    with pytest.raises(InputError, match=message):
        _loader(**options)


def test_dataset_without_documents_is_told():
    with pytest.raises(InputError, match="no documents"):
        Loader(_dataset([]), batch_size=1, max_length=4)
