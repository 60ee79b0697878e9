"""`FlatTree`: a tree of many small fp32 leaves as one vector, so that an optimizer updates it in one pass.

An adapter on every linear of a 32-layer model is 448 arrays. Updated one by one they cost over a thousand launches a
step, each for a few microseconds of work; as one vector the whole of Adam is one pass over memory. Leaves lie one after
the other, largest first, each padded with zeros to a multiple of `ALIGNMENT`, so that what works in blocks (sums of
squares, 8-bit moments) never sees two leaves in one block. Any elementwise Optax transformation takes a FlatTree as it
is: it is a pytree with a single leaf.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

ALIGNMENT = 256


@dataclasses.dataclass(frozen=True)
class FlatLayout:
    """Where each leaf lies. `shapes` are in the order of the tree's leaves."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tree: Any) -> "FlatLayout":
        """The layout of a tree of arrays or shapes."""
        leaves, structure = jax.tree.flatten(tree)
        return cls(structure, tuple(tuple(leaf.shape) for leaf in leaves))

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """Leaves in the order they lie in the vector: by size, so that equal ones form a matrix."""
        return tuple(sorted(range(len(self.shapes)), key=lambda index: -self.padded(index)))

    def padded(self, index: int) -> int:
        """Elements of the vector that leaf `index` takes."""
        return -(-math.prod(self.shapes[index]) // ALIGNMENT) * ALIGNMENT

    @functools.cached_property
    def starts(self) -> dict[int, int]:
        """Where each leaf begins."""
        found, start = {}, 0
        for index in self.order:
            found[index] = start
            start += self.padded(index)
        return found

    def flatten(self, tree: Any) -> "FlatTree":
        """The vector of a tree of this structure, fp32."""
        leaves = jax.tree.leaves(tree)
        parts = []
        for index in self.order:
            leaf = leaves[index].reshape(-1).astype(jnp.float32)
            missing = self.padded(index) - leaf.size
            parts.append(jnp.pad(leaf, (0, missing)) if missing else leaf)
        return FlatTree(jnp.concatenate(parts), self)

    def unflatten(self, vector: jax.Array) -> Any:
        """The tree of a vector: slices, which fuse into what reads them."""
        leaves = [
            vector[self.starts[index] : self.starts[index] + math.prod(shape)].reshape(shape)
            for index, shape in enumerate(self.shapes)
        ]
        return jax.tree.unflatten(self.structure, leaves)

    def square_sums(self, vector: jax.Array) -> jax.Array:
        """Sum of squares of each leaf, `[leaves]`: blocks first, then the blocks of a leaf, both in a fixed order."""
        blocks = jnp.sum(jnp.square(vector.reshape(-1, ALIGNMENT)), axis=1)
        sums, first = [], 0
        for count, size in _runs([self.padded(index) // ALIGNMENT for index in self.order]):
            sums.append(jnp.sum(blocks[first : first + count * size].reshape(count, size), axis=1))
            first += count * size
        places = sorted(range(len(self.order)), key=lambda place: self.order[place])
        return jnp.concatenate(sums)[jnp.asarray(places)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlatTree:
    """The leaves of `layout` in one vector."""

    vector: jax.Array
    layout: FlatLayout = dataclasses.field(metadata={"static": True})

    def tree(self) -> Any:
        """The leaves as they were."""
        return self.layout.unflatten(self.vector)


def is_flat(tree: Any) -> bool:
    """Whether a tree of parameters, or something with its structure, is held as one vector."""
    return isinstance(tree, FlatTree)


def as_tree(tree: Any) -> Any:
    """The leaves of a FlatTree; any other tree as it is."""
    return tree.tree() if is_flat(tree) else tree


def _runs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(how many in a row, of which size)."""
    runs: list[tuple[int, int]] = []
    for size in sizes:
        if runs and runs[-1][1] == size:
            runs[-1] = (runs[-1][0] + 1, size)
        else:
            runs.append((1, size))
    return runs
