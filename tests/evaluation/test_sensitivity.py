"""What quantising costs, module by module, and the recipe that follows from it."""

import json

import jax
import numpy as np
import pytest

from pronghorn.cli import main
from pronghorn.configuration import read_job
from pronghorn.converters.huggingface import load_model, save_model
from pronghorn.errors import InputError
from pronghorn.evaluation import kl_divergence
from pronghorn.evaluation.recipe_search import SearchConfig, search_recipe, text_rows
from pronghorn.evaluation.sensitivity import Sensitivity
from pronghorn.jobs import plan_job
from pronghorn.models.parameters import named_parameters
from pronghorn.quantization import Int8Array, NF4Array, QuantizationConfig
from tests import tiny

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
MODULE = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model") / "base", **SIZES)


@pytest.fixture(scope="module")
def ids(folder):
    vocab = load_model(folder).config.vocab_size
    return np.random.default_rng(0).integers(0, vocab, 400).astype(np.int32)


@pytest.fixture(scope="module")
def recipe(folder, ids):
    config = SearchConfig(budget=0.15, tokens=64, heldout_tokens=64, row=16)
    return search_recipe(folder, ids[:200], ids[200:], config)


def alone(module: str) -> QuantizationConfig:
    """Only this module is quantised."""
    return QuantizationConfig("nf4", skip=(rf"(?!{module}$).*",))


def test_a_cost_is_the_kl_of_the_model_with_that_module_quantised(folder, ids):
    model, rows = load_model(folder), text_rows(ids, 64, 16)
    sensitivity = Sensitivity(model, rows)
    measured = sensitivity.measure([(MODULE, QuantizationConfig())])[MODULE]["nf4"]
    joint = sensitivity.joint({MODULE: QuantizationConfig()})
    quantized = load_model(folder, quantization=alone(MODULE))
    kinds = [isinstance(p.get(), NF4Array) for p in named_parameters(quantized).values()]
    assert sum(kinds) == 1
    expected = kl_divergence(model, quantized, [{"input_ids": rows}])
    assert measured == pytest.approx(expected.mean, rel=1e-3) and measured > 0
    assert joint.mean == pytest.approx(measured, rel=1e-6)
    assert (joint.positions, joint.top1_agreement) == (expected.positions, expected.top1_agreement)


def test_a_recipe_is_loaded_as_it_was_chosen_and_is_nearer_to_the_model(folder, recipe, tmp_path):
    assert recipe["bytes"]["more"] <= 0.15 and recipe["modules"]
    assert recipe["kl"]["heldout"]["recipe"]["mean"] < recipe["kl"]["heldout"]["uniform"]["mean"]
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    parameters = named_parameters(load_model(folder, quantization=str(path)))
    kinds = {"int8": Int8Array, "16bit": jax.Array}
    for name, parameter in parameters.items():
        if name.startswith("layers.") and len(parameter.shape) == 2:
            kind = recipe["modules"].get(f"model.{name.removesuffix('.weight')}", "nf4")
            assert isinstance(parameter.get(), kinds.get(kind, NF4Array)), name
    nbytes = sum(leaf.nbytes for p in parameters.values() for leaf in jax.tree.leaves(p.get()))
    assert nbytes == recipe["bytes"]["recipe"]


def test_measured_costs_are_not_measured_again(folder, ids, recipe):
    said = []
    config = SearchConfig(budget=0.05, better=("16bit",), tokens=64, heldout_tokens=64, row=16)
    again = search_recipe(
        folder, ids[:200], ids[200:], config, known=recipe["costs"], progress=lambda *what: said.append(what)
    )
    assert {what for what, *_ in said} == {"held-out text"}
    assert set(again["modules"].values()) <= {"16bit"} and again["bytes"]["more"] <= 0.05


def test_jobs_and_plans_know_a_recipe(folder, recipe, tmp_path, monkeypatch):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe | {"modules": {MODULE: "int8"}}))
    job = read_job(None, [f"model={folder}", f"quantization={path}"])
    monkeypatch.setattr("pronghorn.training.plan_memory", lambda *_, quantization, **__: quantization)
    assert plan_job(job) == QuantizationConfig("nf4", modules=((MODULE, "int8"),))
    with pytest.raises(InputError, match="nf3"):
        read_job(None, [f"model={folder}", "quantization=nf3"])


def test_the_command_writes_a_recipe_that_convert_applies(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    out = tmp_path / "recipe.json"
    sizes = ["--tokens", "32", "--heldout-tokens", "32", "--row", "16", "--budget", "0.05"]
    assert main(["sensitivity", str(folder), str(out), "--text", str(text), *sizes]) == 0
    assert "held-out KL" in capsys.readouterr().out
    assert main(["convert", str(folder), str(tmp_path / "mixed"), "--quantization", str(out)]) == 0
    written = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    skipped = {name for name in written["llm_int8_skip_modules"] if name != "lm_head"}
    assert skipped == set(json.loads(out.read_text())["modules"])
    assert main(["sensitivity", str(folder), str(out), "--text", str(tmp_path / "none"), *sizes]) == 2


def test_a_recipe_of_another_model_is_refused(folder, tmp_path):
    path = tmp_path / "recipe.json"
    modules = {"model.layers.7.mlp.up_proj": "int8"}
    path.write_text(json.dumps({"format": "pronghorn-recipe-1", "kind": "nf4", "modules": modules}))
    with pytest.raises(InputError, match=r"layers\.7\.mlp\.up_proj"):
        load_model(folder, quantization=str(path))


def test_a_quantised_model_is_not_measured(folder, ids, tmp_path):
    save_model(load_model(folder, quantization="nf4"), tmp_path / "small", tokenizer_from=folder)
    with pytest.raises(InputError, match="quantised already"):
        search_recipe(tmp_path / "small", ids, ids)
