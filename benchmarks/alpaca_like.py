"""A data set with the lengths of an instruction set such as Alpaca, made from nothing but a seed.

Lengths are log-normal with a median of 150 tokens: instruction sets have many short answers and a few long ones. Draws
come from the hash of `data/permutation.py`, so they are the same under every version of numpy.

    python benchmarks/alpaca_like.py            # percentiles, and how full packed rows are
    python benchmarks/alpaca_like.py --out batch.npz --batch 1 --seq 4096 --vocab-size 128256
"""

import argparse
import statistics
from pathlib import Path

import numpy as np

from pronghorn.data import Loader, TokenizationStats, TokenizedDataset
from pronghorn.data.formats import DetectedFormat
from pronghorn.data.permutation import permutation

MEDIAN_TOKENS = 150
SPREAD = 0.6  # of the logarithm: 5 % are below 56 tokens, 5 % above 402
SHORTEST, LONGEST = 16, 2048


def lengths(seed: int, count: int) -> np.ndarray:
    """int64[count]: tokens of each document, a stratified sample of the distribution in an order of the seed."""
    normal = statistics.NormalDist()
    quantiles = np.asarray([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    found = np.rint(MEDIAN_TOKENS * np.exp(SPREAD * quantiles)).astype(np.int64)
    return np.clip(found, SHORTEST, LONGEST)[permutation(count, seed=seed, stream=0)]


def dataset(seed: int, count: int, vocab_size: int, *, prompt_share: float = 0.0) -> TokenizedDataset:
    """Documents of those lengths and random ids; the first `prompt_share` of each is not in the loss."""
    sizes = lengths(seed, count)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    tokens = np.random.default_rng(seed).integers(0, vocab_size, int(offsets[-1]), dtype=np.int32)
    place = np.arange(len(tokens)) - np.repeat(offsets[:-1], sizes)
    trained = place >= np.maximum(1, np.repeat((sizes * prompt_share).astype(np.int64), sizes))
    stats = TokenizationStats(
        rows=count,
        documents=count,
        real_tokens=len(tokens),
        trained_tokens=int(trained.sum()),
        truncated=0,
        dropped=0,
        empty=0,
        untrained=0,
        duplicates=0,
        length_percentiles={p: int(np.percentile(sizes, p)) for p in (5, 25, 50, 75, 95, 99, 100)},
    )
    origins = tuple(f"made:{i + 1}" for i in range(count))
    return TokenizedDataset(tokens, trained, offsets, origins, stats, DetectedFormat("text", "made"))


def packed_loader(
    rows: int, tokens: int, vocab_size: int, *, seed: int = 0, count: int = 20_000, prompt_share: float = 0.0
) -> Loader:
    """A loader of [1, rows, tokens] packed batches; needs `tokens` >= LONGEST."""
    made = dataset(seed, count, vocab_size, prompt_share=prompt_share)
    return Loader(made, batch_size=rows, max_length=tokens, packing=True, seed=seed)


def packed_batch(rows: int, tokens: int, vocab_size: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """[1, rows, tokens] of packed documents, all trained: the format of `random_batch` of step.py."""
    count = max(2_000, 20 * rows * tokens // MEDIAN_TOKENS)
    return packed_loader(rows, tokens, vocab_size, seed=seed, count=count).batch_at(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="file for one packed batch, .npz")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    options = parser.parse_args()
    if options.out is not None:
        np.savez(options.out, **packed_batch(options.batch, options.seq, options.vocab_size))
        return
    sizes = lengths(0, 52_000)
    told = ", ".join(f"{p} % {int(np.percentile(sizes, p))}" for p in (5, 25, 50, 75, 95, 99, 100))
    print(f"52,000 documents, {int(sizes.sum()):,} tokens; lengths {told}")
    for tokens in (2048, 4096, 8192):
        loader = packed_loader(4, tokens, 32_000, count=52_000)
        print(f"rows of {tokens}: {loader.efficiency:.2%} full")


if __name__ == "__main__":
    main()
