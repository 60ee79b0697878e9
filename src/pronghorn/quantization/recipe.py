"""Recipes: which modules of a model are quantised how, chosen by measured cost within a budget, as a JSON file.

Every module has one option a kind: its bytes, and what it costs the model in KL. Costs of modules add up nearly, so

    minimise Σ_m cost(m, k_m)    subject to    Σ_m bytes(m, k_m) <= budget

is a knapsack. On each module's lower convex hull of (bytes, cost) the steps are taken in the order of cost saved a
byte, which is within one step of the optimum; a step that does not fit is passed over for smaller ones.

The file:

    {"format": "pronghorn-recipe-1", "kind": "nf4", "nested": true,
     "modules": {"model.layers.3.mlp.down_proj": "int8", "model.layers.29.mlp.down_proj": "16bit"}, ..}

"kind" is that of every linear module inside of layers that "modules" does not name. The other keys (the text, the
budget, every measured cost) are for readers and for choosing again; applying a recipe does not look at them.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pronghorn.errors import InputError

FORMAT = "pronghorn-recipe-1"
KEPT = "16bit"
_MAX_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to keep a module: its kind (or KEPT), its bytes, and its cost in KL, nats a token."""

    kind: str
    nbytes: int
    cost: float


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """{module: the option chosen}, of the least total cost that was found within `budget` bytes in all.

    Raises:
      InputError: not even the smallest options fit.
    """
    hulls = {module: _hull(found) for module, found in options.items()}
    chosen = {module: hull[0] for module, hull in hulls.items()}
    left = budget - sum(option.nbytes for option in chosen.values())
    if left < 0:
        raise InputError(
            f"recipe: the budget is {-left:,} bytes below the smallest choice; give a larger one."
        )
    steps = [
        ((before.cost - after.cost) / (after.nbytes - before.nbytes), module, before, after)
        for module, hull in hulls.items()
        for before, after in itertools.pairwise(hull)
    ]
    for _, module, before, after in sorted(steps, key=lambda step: -step[0]):
        # Along a hull the savings fall, so a module's steps come in order; past one that did not fit none is taken.
        if chosen[module] is before and after.nbytes - before.nbytes <= left:
            left -= after.nbytes - before.nbytes
            chosen[module] = after
    return chosen


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options worth taking, from the smallest up: each step saves less a byte than the one before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _saving(small: Option, large: Option) -> float:
    return (small.cost - large.cost) / (large.nbytes - small.nbytes)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe of a file: "kind", "nested", "modules" and whatever else it says.

    Raises:
      InputError: naming the file and the key: it is no recipe.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: over 16 MiB is no recipe; give a file of `pronghorn sensitivity`.")
        value = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: the recipe cannot be read ({error.strerror}); check the path.") from None
    except (ValueError, RecursionError):
        raise InputError(
            f"{path}: is not valid JSON; give a recipe that `pronghorn sensitivity` wrote."
        ) from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(
            f'{path}: has no "format": "{FORMAT}"; give a recipe that `pronghorn sensitivity` wrote.'
        )
    modules = value.get("modules", {})
    if not isinstance(modules, dict) or not all(isinstance(kind, str) for kind in modules.values()):
        raise InputError(f'{path}: "modules" has to be {{"module": "kind"}}; correct the recipe.')
    if not isinstance(value.get("kind"), str) or not isinstance(value.get("nested", True), bool):
        raise InputError(f'{path}: "kind" has to be a name and "nested" true or false; correct the recipe.')
    return value
