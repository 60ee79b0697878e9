"""Recipes: the choice within a budget, and the file."""

import itertools
import json

import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.quantization import QuantizationConfig, read_quantization
from pronghorn.quantization.recipe import Option, allocate


def random_options(seed: int, modules: int) -> dict[str, list[Option]]:
    random = np.random.default_rng(seed)
    options = {}
    for module in range(modules):
        size, cost = int(random.integers(50, 200)), float(random.uniform(0, 1))
        options[str(module)] = [
            Option("16bit", 4 * size, 0.0),
            Option("nf4", size, cost),
            Option("int8", 2 * size, cost * float(random.uniform(0, 0.05))),
        ]
    return options


def test_the_choice_is_within_the_budget_and_one_step_of_the_best():
    for seed in range(5):
        options = random_options(seed, 6)
        for budget in (1300, 1800, 2500):
            chosen = allocate(options, budget)
            assert sum(option.nbytes for option in chosen.values()) <= budget
            choices = [c for c in itertools.product(*options.values()) if sum(o.nbytes for o in c) <= budget]
            best = min(sum(option.cost for option in choice) for choice in choices)
            worst_step = max(o.cost for found in options.values() for o in found)
            assert best <= sum(option.cost for option in chosen.values()) <= best + worst_step


def test_no_budget_takes_the_smallest_and_a_large_one_the_best():
    options = random_options(0, 4)
    smallest = sum(min(o.nbytes for o in found) for found in options.values())
    assert {option.kind for option in allocate(options, smallest).values()} == {"nf4"}
    assert {option.kind for option in allocate(options, 10**6).values()} == {"16bit"}
    with pytest.raises(InputError, match="larger"):
        allocate(options, smallest - 1)


def test_a_recipe_is_a_configuration(tmp_path):
    path = tmp_path / "recipe.json"
    modules = {"model.layers.1.mlp.up_proj": "int8", "model.layers.0.mlp.down_proj": "16bit"}
    path.write_text(json.dumps({"format": "pronghorn-recipe-1", "kind": "nf4", "modules": modules}))
    config = read_quantization(path)
    assert config.of_module("model.layers.1.mlp.up_proj").kind == "int8"
    assert config.of_module("model.layers.11.mlp.up_proj") == QuantizationConfig("nf4")
    assert config.of_module("model.layers.0.mlp.down_proj") is None


@pytest.mark.parametrize(
    "text,words",
    [
        ("{", "valid JSON"),
        ('{"kind": "nf4"}', "format"),
        ('{"format": "pronghorn-recipe-1", "modules": {}}', "kind"),
        ('{"format": "pronghorn-recipe-1", "kind": "nf4", "modules": ["a"]}', "modules"),
        ('{"format": "pronghorn-recipe-1", "kind": "nf4", "modules": {"a": "int3"}}', "int3"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, words):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as refusal:
        read_quantization(str(path))
    assert "recipe.json" in str(refusal.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_quantization(str(tmp_path / "none.json"))
