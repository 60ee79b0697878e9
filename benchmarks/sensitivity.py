"""What a recipe of `pronghorn sensitivity` gains over NF4 throughout, and over other ways to choose, at equal bytes.

SmolLM2-135M, measured on chats about docstrings and on prose, judged on other modules' docstrings and other prose. With
16-bit embeddings the linears of this small model are half of its weights; "more_of_linears" counts them alone.

    python benchmarks/sensitivity.py
"""

import argparse
import time
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.converters.huggingface import load_model, load_tokenizer, resolve_model_path
from pronghorn.data.docstrings import docstring_rows
from pronghorn.data.general_text import passages
from pronghorn.evaluation import kl_divergence
from pronghorn.evaluation.recipe_search import SearchConfig, search_recipe, text_rows
from pronghorn.evaluation.sensitivity import Sensitivity
from pronghorn.lora import split
from pronghorn.models.parameters import named_parameters
from pronghorn.quantization import QuantizationConfig, quantize
from pronghorn.quantization.recipe import Option, allocate
from pronghorn.quickstart import find_model

NF4, INT8 = QuantizationConfig("nf4"), QuantizationConfig("int8")


def texts(tokenizer: Any, rows: int) -> tuple[list[int], list[int]]:
    """Token ids of (calibration, held-out): every other passage, and functions of the two halves of the library."""
    parts = []
    prose = [passage.text for passage in passages()]
    for half, kind in enumerate(("train", "heldout")):
        chats = [
            tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in docstring_rows(kind)
        ]
        text = "\n\n".join(prose[half::2])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        chosen = tokenizer("".join(chats[:rows]), add_special_tokens=False)["input_ids"]
        parts.append(ids + chosen[: len(ids)])
    return parts[0], parts[1]


def controls(model: Any, recipe: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """Held-out KL of as many bytes spent in other ways: at random, and by the weights' own error."""
    sensitivity = Sensitivity(model, rows)
    names = {n.removesuffix(".weight"): p for n, p in named_parameters(model).items()}
    errors: dict[str, float] = {}
    nbytes: dict[str, tuple[int, int]] = {}
    for module in sensitivity.modules:
        weight = names[module.removeprefix("model.")].get()
        small, large = (quantize(weight.astype(jnp.bfloat16), how) for how in (NF4, INT8))
        difference = small.dequantize().astype(jnp.float32) - weight
        errors[module] = float(jnp.sum(difference**2) / jnp.sum(weight.astype(jnp.float32) ** 2))
        nbytes[module] = tuple(sum(x.nbytes for x in jax.tree.leaves(q)) for q in (small, large))  # type: ignore[assignment]
    random = np.random.default_rng(0)
    noise = {module: float(random.uniform()) for module in errors}
    budget = (
        sum(small for small, _ in nbytes.values()) + recipe["bytes"]["recipe"] - recipe["bytes"]["uniform"]
    )
    found = {}
    for name, score in {"random": noise, "weight error": errors}.items():
        # A score a module is a cost of its bytes: it is spent where the score is highest.
        options = {
            m: [
                Option("nf4", nbytes[m][0], score[m] * (nbytes[m][1] - nbytes[m][0])),
                Option("int8", nbytes[m][1], 0.0),
            ]
            for m in errors
        }
        chosen = allocate(options, budget)
        ways = {m: INT8 if option.kind == "int8" else NF4 for m, option in chosen.items()}
        found[name] = sensitivity.joint(ways).mean
        print(f"{name}: held-out KL {found[name]:.4f}", flush=True)
    return found


def embedding_costs(model: Any, rows: np.ndarray) -> dict[str, float]:
    """Held-out KL of the embedding, which is the head too, alone in fewer bits; a recipe leaves it in 16."""
    parameter = named_parameters(model)["embed_tokens.weight"].variable
    weight, found = parameter.get_value(), {}
    # Variables of its own: those that `split` hands out are the model's, and change with it.
    original = jax.tree.map(lambda array: array, split(model))
    for how in (INT8, NF4):
        parameter.set_value(quantize(weight, how).dequantize().astype(weight.dtype))
        found[how.kind] = kl_divergence(original, split(model), [{"input_ids": rows}]).mean
        print(f"embedding and head alone in {how.kind}: held-out KL {found[how.kind]:.4f}", flush=True)
    parameter.set_value(weight)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_arguments(parser, "sensitivity-smollm2-135m")
    parser.add_argument(
        "--budgets", default="0.1,0.05,0.025", help="the first is measured, the others chosen again"
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--heldout-tokens", type=int, default=2048)
    parser.add_argument("--row", type=int, default=256)
    options = parser.parse_args()
    folder = resolve_model_path(find_model())
    calibration, heldout = texts(load_tokenizer(folder), 400)
    recipes: list[dict[str, Any]] = []
    started = time.perf_counter()
    seconds = 0.0
    for budget in map(float, options.budgets.split(",")):
        config = SearchConfig(
            budget=budget, tokens=options.tokens, heldout_tokens=options.heldout_tokens, row=options.row
        )
        known = recipes[0]["costs"] if recipes else None
        recipes.append(search_recipe(folder, calibration, heldout, config, known=known, progress=_show))
        seconds = seconds or time.perf_counter() - started
        kl, more = recipes[-1]["kl"]["heldout"], recipes[-1]["bytes"]
        print(
            f"+{more['more']:.1%} of the weights (+{more['more_of_linears']:.1%} of the linears): held-out KL "
            f"{kl['recipe']['mean']:.4f}, NF4 throughout {kl['uniform']['mean']:.4f}",
            flush=True,
        )
    model = load_model(folder, dtype="float32")
    rows = text_rows(heldout, options.heldout_tokens, options.row)
    result = {
        "model": "SmolLM2-135M-Instruct (from its Q4_1 file)",
        "seconds": seconds,
        "recipes": [
            recipe if index == 0 else {**recipe, "costs": "as above"} for index, recipe in enumerate(recipes)
        ],
        "other choices at the bytes of the first": controls(model, recipes[0], rows),
        "embedding alone": embedding_costs(model, rows),
        **common.environment(options.commit),
    }
    common.write(options.out, result)


def _show(what: str, done: int, total: int) -> None:
    if done % 30 == 0 or done == total:
        print(f"{what}: {done}/{total}", flush=True)


if __name__ == "__main__":
    main()
