"""Choose which linear layers stay in 8 or 16 bits beside 4-bit ones: measured KL on a text, within a memory budget.

Every layer's weights are quantised one at a time and the predictions compared with the model's own; a choice is made
within the budget and judged on text that was not measured on. The recipe is a small JSON file:

pronghorn sensitivity FOLDER recipe.json --text calibration.txt --heldout other.txt --budget 0.1
pronghorn train job.yaml model=FOLDER quantization=recipe.json
pronghorn convert FOLDER OUT --quantization recipe.json
"""

import argparse
import sys
from pathlib import Path

from pronghorn.cli.common import add_json_argument, use_compile_cache, write_json_if_asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="16-bit Hugging Face folder, GGUF file or hub name")
    parser.add_argument("out", type=Path, help="recipe to write")
    parser.add_argument(
        "--text", type=Path, required=True, help="text to measure on, like what the model is for"
    )
    parser.add_argument(
        "--heldout",
        type=Path,
        default=None,
        help="text to judge on; by default the end of --text is kept for it",
    )
    parser.add_argument(
        "--budget", type=float, default=0.1, help="weight memory over that of 4 bits throughout"
    )
    parser.add_argument("--kind", default="nf4", choices=("nf4", "fp4"))
    parser.add_argument("--better", default="int8,16bit", help="what the others may be")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens to measure on")
    parser.add_argument("--heldout-tokens", type=int, default=2048, help="tokens to judge on")
    parser.add_argument("--row", type=int, default=256, help="tokens read together")
    parser.add_argument(
        "--costs",
        type=Path,
        default=None,
        help="an earlier recipe of the same model and text: measure no cost twice",
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    use_compile_cache()
    from pronghorn.evaluation.recipe_search import SearchConfig
    from pronghorn.jobs import make_recipe

    config = SearchConfig(
        budget=options.budget,
        kind=options.kind,
        better=tuple(options.better.split(",")),
        tokens=options.tokens,
        heldout_tokens=options.heldout_tokens,
        row=options.row,
    )
    recipe = make_recipe(
        options.model,
        options.out,
        text=options.text,
        heldout=options.heldout,
        config=config,
        costs=options.costs,
        progress=_show,
    )
    kind = recipe["kind"]
    worst = sorted(recipe["costs"], key=lambda module: -recipe["costs"][module][kind])[:5]
    print(f"modules that cost most in {kind}, KL in nats a token when they alone are quantised:")
    for module in worst:
        print(f"  {recipe['costs'][module][kind]:.2e}  {module} -> {recipe['modules'].get(module, kind)}")
    kl = recipe["kl"]["heldout"]
    for name, label in (("uniform", f"{kind} throughout"), ("recipe", "this recipe")):
        print(
            f"{label:<16} {recipe['bytes'][name] / 2**20:8.1f} MiB of weights, held-out KL {kl[name]['mean']:.4f} (p99 "
            f"{kl[name]['p99']:.2f}), same first choice {kl[name]['top1_agreement']:.1%}"
        )
    write_json_if_asked(options, {name: recipe[name] for name in ("kind", "bytes", "kl", "modules")})
    print(f"{options.out}: {len(recipe['modules'])} of {len(recipe['costs'])} modules are not {kind}")
    return 0


def _show(what: str, done: int, total: int) -> None:
    """One line that is written over on a terminal, and a few lines elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done}/{total} ", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done in (total, total // 2):
        print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)
