"""From a `DataConfig` to tokenised sets: one path or a mixture, in memory or in the cache, some of it held out."""

import dataclasses
from typing import Any

import numpy as np

from pronghorn.data.config import DataConfig
from pronghorn.data.dataset import Dataset, MixedDataset, TokenizedDataset
from pronghorn.data.packing import one_a_row, pack
from pronghorn.data.sources import content_hash, held_out_rows, load_rows, stream_rows
from pronghorn.data.store import cache_key, cached
from pronghorn.data.tokenization import tokenize_into, tokenize_rows
from pronghorn.errors import InputError


def read_sets(
    data: DataConfig, tokenizer: Any, vocab_size: int | None = None
) -> tuple[Dataset, Dataset | None]:
    """(training set, held-out set or None) of `data.path` or `data.mixture`, `data.eval_path`, `data.eval_fraction`.

    Of a mixture, the share of every part is held out.

    Raises:
      InputError: no path, or rows that cannot be used.
    """
    if data.path is None and not data.mixture:
        raise InputError("data.path: missing; give a file, a folder or a hub name of rows to train on.")
    if tokenizer is None:
        raise InputError(
            "model: its folder has no tokenizer, which rows need; put tokenizer.json into the folder."
        )
    fraction = 0.0 if data.eval_path is not None else data.eval_fraction
    read = _mixed if data.mixture else _one
    train, held_out = read(data, tokenizer, vocab_size, fraction)
    if data.eval_path is not None:
        own = dataclasses.replace(data, path=data.eval_path, split=None, mixture=())
        held_out, _ = _one(own, tokenizer, vocab_size, 0.0)
    return train, held_out


def _mixed(
    data: DataConfig, tokenizer: Any, vocab_size: int | None, fraction: float
) -> tuple[Dataset, Dataset | None]:
    parts, held = [], []
    for source in data.mixture:
        changes = {name: getattr(source, name) for name in ("path", "split", "format", "columns")}
        part, out = _one(dataclasses.replace(data, mixture=(), **changes), tokenizer, vocab_size, fraction)
        parts.append(part)
        held += [] if out is None else [out]
    names = tuple(source.path for source in data.mixture)
    weights = [
        source.weight if source.weight is not None else _rows_of(part, data)
        for source, part in zip(data.mixture, parts, strict=True)
    ]
    shares = tuple((np.asarray(weights) / np.sum(weights)).tolist())
    train = MixedDataset(tuple(parts), names, shares)
    return train, MixedDataset(tuple(held), names, shares) if held else None


def _rows_of(part: TokenizedDataset, data: DataConfig) -> int:
    return len(pack(part.lengths, data.max_length) if data.packing else one_a_row(len(part)))


def _one(
    data: DataConfig, tokenizer: Any, vocab_size: int | None, fraction: float
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    assert data.path is not None
    if data.cache_dir is None:
        dataset = tokenize_rows(load_rows(data.path, data.split), tokenizer, data, vocab_size=vocab_size)
    else:
        key = cache_key(content_hash(data.path, data.split), tokenizer, data, vocab_size)
        dataset = cached(
            data.cache_dir,
            key,
            lambda arrays: tokenize_into(
                arrays, stream_rows(data.path, data.split), tokenizer, data, vocab_size=vocab_size
            ),
        )
    if not fraction:
        return dataset, None
    rows = dataset.stats.rows
    if rows < 2:
        raise InputError(f"data.eval_fraction={fraction} needs at least two rows, there are {rows}")
    held = held_out_rows(rows, fraction, data.seed)
    return dataset.select_rows(~held), dataset.select_rows(held)
