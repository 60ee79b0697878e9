"""Mixtures: shares, seeking, and every part gone through epoch by epoch."""

import collections

import numpy as np
import pytest

from pronghorn.data import DataConfig, Loader, MixedDataset, MixtureSource, read_sets
from pronghorn.data.mixture import BLOCK, Interleaving
from tests import tiny

from .test_loader import _dataset

PARTS = (_dataset([3, 5, 2, 7, 4, 4]), _dataset([6, 1, 2]), _dataset([9]))


def _mixed(shares=(0.5, 0.3, 0.2)):
    return MixedDataset(PARTS, ("a", "b", "c"), shares)


def _loader(**options):
    return Loader(_mixed(), **({"batch_size": 2, "micro_batches": 2, "max_length": 9, "seed": 3} | options))


@pytest.mark.parametrize("shares", [(1,), (0.5, 0.5), (3, 1, 1), (1e-9, 1), (0.1,) * 7 + (0.3,)])
def test_blocks_hold_the_shares_and_rows_are_counted_on(shares):
    mix = Interleaving(shares, seed=1)
    rows = mix.rows(0, 3 * BLOCK)
    for part, share in enumerate(np.asarray(shares) / np.sum(shares)):
        own = [index for p, index in rows if p == part]
        assert own == list(range(len(own)))
        assert abs(len(own) / len(rows) - share) <= 1 / BLOCK + 1e-12
    assert mix.rows(BLOCK - 3, BLOCK + 5) == rows[BLOCK - 3 : BLOCK + 5]
    assert len(shares) == 1 or rows != Interleaving(shares, seed=2).rows(0, 3 * BLOCK)


@pytest.mark.parametrize("packing", [True, False])
def test_batch_is_a_pure_function_of_the_step_and_rows_are_of_one_part(packing):
    forward, backward = _loader(packing=packing), _loader(packing=packing)
    steps = [*range(12), 5000]
    seen = {step: forward.batch_at(step) for step in steps}
    for step in reversed(steps):
        again = backward.batch_at(step)
        assert all(np.array_equal(seen[step][name], again[name]) for name in again)
        for row in forward.documents_at(step):
            assert len({forward.dataset.place(d)[0] is part for d in row for part in PARTS[:1]}) == 1


def test_each_part_is_gone_through_before_it_begins_anew():
    loader = _loader(packing=False)
    order = collections.defaultdict(list)
    for step in range(60):
        for row in loader.documents_at(step):
            part = int(np.searchsorted(loader.dataset.bounds, row[0], "right")) - 1
            order[part].append(int(row[0]))
    for part, documents in order.items():
        size = len(PARTS[part])
        epochs = [documents[i : i + size] for i in range(0, len(documents) - size + 1, size)]
        assert len(epochs) >= 3 and all(len(set(epoch)) == size for epoch in epochs)


def test_batches_hold_the_documents_of_their_parts():
    loader = _loader()
    batch, rows = loader.batch_at(7), loader.documents_at(7)
    for ids, documents in zip(batch["input_ids"].reshape(-1, 9), rows, strict=True):
        tokens = [t for d in documents for t in loader.dataset.document(int(d))[0]]
        assert ids[: len(tokens)].tolist() == tokens and not ids[len(tokens) :].any()


def test_sums_of_a_mixture_and_fingerprints():
    mixed = _mixed()
    assert len(mixed) == 10 and mixed.stats.documents == 10 and mixed.stats.real_tokens == mixed.lengths.sum()
    assert mixed.fingerprint == _mixed().fingerprint != _mixed((0.4, 0.4, 0.2)).fingerprint
    assert len(list(mixed.origins)) == 10


def test_mixture_is_read_from_a_configuration_and_each_part_holds_rows_out(tmp_path):
    names = ("a", "b")
    for name in names:
        tiny.write_rows(tmp_path / f"{name}.jsonl", [tiny.chat(f"{name}{i}", "x" * i) for i in range(8)])
    sources = [MixtureSource(str(tmp_path / f"{n}.jsonl"), w) for n, w in zip(names, (3, 1), strict=True)]
    data = DataConfig(mixture=sources, max_length=64, eval_fraction=0.25)
    train, held = read_sets(data, tiny.tiny_tokenizer())
    assert train.shares == (0.75, 0.25) and [len(p) for p in train.parts] == [6, 6]
    assert [len(p) for p in held.parts] == [2, 2]
    assert set(train.origins).isdisjoint(held.origins)
    evaluation = Loader(held, batch_size=1, max_length=64, shuffle=False, weighted=False)
    assert sum(len(row) for step in range(len(evaluation)) for row in evaluation.documents_at(step)) == 4
    unweighted = [MixtureSource(source.path) for source in sources]
    train, _ = read_sets(DataConfig(mixture=unweighted, max_length=64, packing=False), tiny.tiny_tokenizer())
    assert train.shares == (0.5, 0.5)
