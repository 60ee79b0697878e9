"""Which part of a mixture each row of a run comes from: a pure function of (shares, seed, row), found without replay.

Rows come in blocks of 4,096. Each block holds every part as often as its share says, rounded by largest remainder, and
at least once; only their order inside a block is drawn. So a batch far into a run is found at once, and after any
number of blocks the shares are exact to one row in 4,096.
"""

import functools
from collections.abc import Sequence

import numpy as np

from pronghorn.data.permutation import permutation

BLOCK = 4096
_STREAM = 1 << 40  # of the seed's permutations; epochs count from 0


class Interleaving:
    """See the module's text.

    Args:
      shares: of the rows, positive; they need not add up to 1. At most `BLOCK` parts.
      seed: decides the order.
    """

    def __init__(self, shares: Sequence[float], seed: int) -> None:
        exact = np.asarray(shares, np.float64) / np.sum(shares) * BLOCK
        self.counts = np.floor(exact).astype(np.int64)
        left = BLOCK - int(self.counts.sum())
        self.counts[np.argsort(self.counts - exact, kind="stable")[:left]] += 1
        for part in np.flatnonzero(self.counts == 0):
            self.counts[np.argmax(self.counts)] -= 1
            self.counts[part] = 1
        self.seed = seed
        self._block = functools.lru_cache(maxsize=2)(self._made_block)

    def rows(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(part, which of the part's own rows, counted from the first of the run) of rows start .. stop - 1."""
        found = []
        for row in range(start, stop):
            number, place = divmod(row, BLOCK)
            parts, ranks = self._block(number)
            part = int(parts[place])
            found.append((part, int(number * self.counts[part] + ranks[place])))
        return found

    def _made_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(part of each row of the block, how many rows of that part the block has before it)."""
        parts = np.repeat(np.arange(len(self.counts)), self.counts)
        parts = parts[permutation(BLOCK, seed=self.seed, stream=_STREAM + number)]
        order = np.argsort(parts, kind="stable")
        ranks = np.empty(BLOCK, np.int64)
        ranks[order] = np.arange(BLOCK) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        return parts, ranks
