"""Names of trainable leaves as Hugging Face counts layers, from the tree alone.

A tree of parameters has segments of layers, and in a scanned segment one leaf for the same place of every period. So a
stacked leaf has several names.
"""

from typing import Any

import jax
from flax import nnx


def layer_names(trainable: Any) -> list[list[tuple[str, int | None]]]:
    """Of each leaf the (name, layer) pairs it holds, layer None outside of layers: `layers.3.mlp.down_proj.lora_A`, 3.

    Layers are counted over the segments that have a trained leaf; where adapters are on some layers of a scanned
    pattern only, the count is theirs.
    """
    flat = jax.tree_util.tree_flatten_with_path(trainable, is_leaf=is_variable)[0]
    paths = [jax.tree_util.keystr(path, simple=True, separator=".").split(".") for path, _ in flat]
    repeats = [leaf.shape[0] if is_stacked(leaf) else 1 for _, leaf in flat]
    places = [_place(path) for path in paths]
    period: dict[int, int] = {}
    length: dict[int, int] = {}
    for place, repeat in zip(places, repeats, strict=True):
        if place is not None:
            segment, index = place
            period[segment] = max(period.get(segment, 0), index + 1)
            length[segment] = max(length.get(segment, 0), repeat)
    named: list[list[tuple[str, int | None]]] = []
    for path, place, repeat in zip(paths, places, repeats, strict=True):
        if place is None:
            named.append([(".".join(path), None)] * repeat)
            continue
        segment, index = place
        start = sum(period[s] * length[s] for s in period if s < segment)
        layers = [start + turn * period[segment] + index for turn in range(repeat)]
        named.append([(".".join(["layers", str(layer), *path[4:]]), layer) for layer in layers])
    return named


def _place(path: list[str]) -> tuple[int, int] | None:
    """(segment, place in its period) of `segments.0.layers.3...`."""
    if len(path) > 4 and path[0] == "segments" and path[2] == "layers":
        return int(path[1]), int(path[3])
    return None


def is_variable(leaf: Any) -> bool:
    """Whether a node of a parameter tree is an NNX variable, which carries the names of its axes."""
    return isinstance(leaf, nnx.Variable)


def is_stacked(leaf: Any) -> bool:
    """Whether a leaf holds the weights of several layers, `[layers, ...]`."""
    axes: tuple[str, ...] = leaf.get_metadata().get("logical_axes", ()) if is_variable(leaf) else ()
    return axes[:1] == ("layers",)
