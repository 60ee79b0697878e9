"""A permutation that depends on nothing but (count, seed, stream).

numpy does not promise that `Generator.permutation` stays the same between versions, and a resumed run must see the
order of the run it continues. So indices are sorted by a hash of our own: splitmix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", 2014), the finaliser of which is a bijection of 64 bits.
"""

import numpy as np

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def permutation(count: int, *, seed: int, stream: int) -> np.ndarray:
    """int64[count], each index once. `stream` separates uses of one seed (an epoch; negative numbers elsewhere)."""
    start = _mix_int(_mix_int(seed & _MASK) ^ (stream & _MASK))
    keys = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(start)
    return np.argsort(_mix(keys), kind="stable")


def derived_seed(seed: int, index: int) -> int:
    """A seed of its own for part `index` of what has the given seed."""
    return _mix_int(_mix_int(seed & _MASK) ^ (index + 1))


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_int(z: int) -> int:
    z = (z + _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
