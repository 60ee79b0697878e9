"""From a model, a text and a budget to a recipe: measure what each module costs, choose, and say what it came to."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.errors import InputError
from pronghorn.evaluation.sensitivity import Costs, Sensitivity
from pronghorn.models.parameters import named_parameters
from pronghorn.quantization import QuantizationConfig
from pronghorn.quantization.quantize_model import empty_like
from pronghorn.quantization.recipe import FORMAT, KEPT, Option, allocate

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How a recipe is searched.

    Attributes:
      budget: weight memory over that of the model quantised alike throughout, as a share of it; embeddings count.
      kind: of the modules that are cheap to quantise: "nf4" or "fp4".
      better: what the others may be: "int8", "16bit", or both.
      tokens: of the calibration text that is measured on.
      heldout_tokens: of the text that the choice is judged on.
      row: tokens that are read together.

    Raises:
      InputError: a value that cannot be used.
    """

    budget: float = 0.1
    kind: str = "nf4"
    better: tuple[str, ...] = ("int8", KEPT)
    tokens: int = 1024
    heldout_tokens: int = 2048
    row: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.budget < 10:
            raise InputError(
                f"budget={self.budget} must be a share of the weight memory, such as 0.1 for 10 % more."
            )
        if self.kind not in ("nf4", "fp4"):
            raise InputError(f"kind={self.kind!r} is not known here; use nf4 or fp4.")
        if not self.better or not set(self.better) <= {"int8", KEPT}:
            raise InputError(f"better={','.join(self.better)!r} is not known; use int8, {KEPT}, or both.")
        if self.row < 2 or min(self.tokens, self.heldout_tokens) < self.row:
            raise InputError(f"row={self.row} must be at least 2, and at most tokens and heldout_tokens.")


def text_rows(token_ids: Sequence[int], tokens: int, row: int) -> np.ndarray:
    """int32 `[rows, row]`: rows spread evenly over a text, `tokens` in all if it has as many.

    Raises:
      InputError: the text is shorter than one row.
    """
    ids = np.asarray(token_ids, np.int32)
    count = min(tokens // row, ids.size // row)
    if count == 0:
        raise InputError(
            f"the text has {ids.size} tokens, and a row takes {row}; give more text or shorter rows."
        )
    starts = np.linspace(0, ids.size - row, count).astype(int)
    return np.stack([ids[start : start + row] for start in starts])


def search_recipe(
    path: str | Path,
    calibration: Sequence[int],
    heldout: Sequence[int],
    config: SearchConfig | None = None,
    *,
    known: Mapping[str, Mapping[str, float]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A recipe for the model of a folder, as `recipe.read_recipe` returns it, with every figure behind it.

    Measured in fp32, whatever the dtype of the folder; bytes are those of the folder's dtype.

    Args:
      path: a 16-bit model: folder, GGUF file or hub name.
      calibration, heldout: token ids of two texts.
      config: budget and sizes.
      known: "costs" of an earlier recipe, which are not measured again.
      progress: called with what is measured, how much is done and how much there is.

    Raises:
      InputError: a model or text that cannot be used.
    """
    from pronghorn.converters.huggingface import load_model

    config = config or SearchConfig()
    model = load_model(path, dtype="float32", layers="unrolled")
    vocab = model.config.vocab_size
    rows = {
        "calibration": text_rows(calibration, config.tokens, config.row),
        "heldout": text_rows(heldout, config.heldout_tokens, config.row),
    }
    if max(int(ids.max()) for ids in rows.values()) >= vocab:
        raise InputError(f"{path}: the tokenizer has ids past the model's vocabulary of {vocab}.")
    dtype = "float32" if model.source is None else model.source.dtype
    small = QuantizationConfig(config.kind)  # type: ignore[arg-type]
    large = QuantizationConfig("int8")

    say = progress or (lambda *_: None)
    sensitivity = Sensitivity(model, rows["calibration"])
    shapes = sensitivity.modules
    costs: Costs = {module: dict((known or {}).get(module, {})) for module in shapes}

    def measure(modules: Sequence[str], way: QuantizationConfig) -> None:
        wanted = [(module, way) for module in modules if way.kind not in costs[module]]
        found = sensitivity.measure(wanted, progress=lambda done, total: say(way.kind, done, total))
        for module, kinds in found.items():
            costs[module] |= kinds

    def nbytes(module: str, kind: str) -> int:
        shape = shapes[module]
        if kind == KEPT:
            return math.prod(shape) * jnp.dtype(dtype).itemsize
        way = small if kind == config.kind else large
        return _bytes(empty_like(shape, dtype, way))

    measure(list(shapes), small)
    linears = sum(math.prod(shape) for shape in shapes.values())
    others = (sum(math.prod(p.shape) for p in named_parameters(model).values()) - linears) * jnp.dtype(
        dtype
    ).itemsize
    uniform = sum(nbytes(module, config.kind) for module in shapes)
    allowed = int(config.budget * (uniform + others))
    if "int8" in config.better:
        # What is far from being worth its bytes need not be measured: 8 bits cannot save more than there is.
        extra = {module: nbytes(module, "int8") - nbytes(module, config.kind) for module in shapes}
        worthwhile, spent = [], 0
        for module in sorted(shapes, key=lambda m: -costs[m][config.kind] / extra[m]):
            if spent <= 2 * allowed:
                worthwhile.append(module)
            spent += extra[module]
        measure(worthwhile, large)

    options: dict[str, list[Option]] = {}
    for module, kinds in costs.items():
        found = {config.kind: kinds[config.kind]}
        found |= {"int8": kinds["int8"]} if "int8" in config.better and "int8" in kinds else {}
        found |= {KEPT: 0.0} if KEPT in config.better else {}
        options[module] = [Option(kind, nbytes(module, kind), cost) for kind, cost in found.items()]
    chosen = allocate(options, uniform + allowed)
    ways = {"uniform": dict.fromkeys(shapes, small)}
    ways["recipe"] = {
        module: small if option.kind == config.kind else large
        for module, option in chosen.items()
        if option.kind != KEPT
    }
    judge = {"calibration": sensitivity}
    say("held-out text", 0, 1)
    judge["heldout"] = Sensitivity(model, rows["heldout"])
    kl = {
        text: {name: dataclasses.asdict(judge[text].joint(how)) for name, how in ways.items()}
        for text in judge
    }
    say("held-out text", 1, 1)
    recipe_bytes = sum(option.nbytes for option in chosen.values())
    return {
        "format": FORMAT,
        "kind": config.kind,
        "nested": small.nested,
        "modules": {m: option.kind for m, option in chosen.items() if option.kind != config.kind},
        "search": dataclasses.asdict(config),
        "texts": {
            text: {"tokens": int(ids.size), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}
            for text, ids in rows.items()
        },
        "bytes": {
            "uniform": uniform + others,
            "recipe": recipe_bytes + others,
            "more": (recipe_bytes - uniform) / (uniform + others),
            "more_of_linears": (recipe_bytes - uniform) / uniform,
        },
        "sum_of_costs": {
            "uniform": sum(costs[module][config.kind] for module in shapes),
            "recipe": sum(option.cost for option in chosen.values()),
        },
        "kl": kl,
        "costs": costs,
    }


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
