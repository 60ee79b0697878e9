"""The pieces of the library joined for a command: what is read, in which order, and what is saved with a result."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from pronghorn import jobs
from pronghorn.converters import peft
from pronghorn.converters.huggingface import load, load_model
from pronghorn.data import DataConfig
from pronghorn.errors import InputError, RunError
from pronghorn.lora import LoRAConfig, add_lora, merge, split
from pronghorn.lora_sites import select
from pronghorn.models import Decoder
from pronghorn.models.experts_config import ExpertsConfig
from pronghorn.training import TrainConfig, Trainer
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("jobs") / "model", num_layers=2, hidden_size=16)


@pytest.fixture
def rows(tmp_path):
    return str(tiny.write_rows(tmp_path / "rows.jsonl"))


@pytest.fixture
def trainer(model_dir, rows, tmp_path):
    """A trainer whose adapter is random, as if it had been trained."""

    def make(**data):
        model, tokenizer = load(model_dir, dtype="float32")
        graph, lora, frozen = split(add_lora(model, LoRAConfig(rank=2, targets=("q_proj", "up_proj"))))
        draw = np.random.default_rng(0)
        lora = jax.tree.map(lambda leaf: draw.normal(0, 0.3, leaf.shape).astype(np.float32), lora)
        config = TrainConfig(max_steps=1, output_dir=str(tmp_path / "run"))
        data = DataConfig(path=rows, max_length=64, **data)
        return Trainer(
            merge(graph, jax.tree.map(jax.numpy.asarray, lora), frozen), tokenizer, rows, config, data=data
        )

    return make


def test_held_out_rows_come_from_a_file_of_their_own_or_from_the_training_rows(rows, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    other = str(tiny.write_rows(tmp_path / "other.jsonl", [tiny.chat("a?", "b"), tiny.chat("c?", "d")]))
    counts = []
    for options in ({}, {"eval_fraction": 0.5}, {"eval_path": other}):
        train, held_out = jobs.read_data(DataConfig(path=rows, max_length=64, **options), tokenizer)
        counts.append((len(train), None if held_out is None else len(held_out)))
    assert counts == [(12, None), (6, 6), (12, 2)]


def test_token_ids_that_the_model_lacks_are_refused(rows):
    with pytest.raises(InputError, match="and the model has 40 embeddings"):
        jobs.read_data(DataConfig(path=rows, max_length=64), tiny.tiny_tokenizer(), vocab_size=40)


def adapter_config(folder, **values):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | values
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("values", "rank", "chosen"),
    [
        ({}, 2, {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
        ({"layers_to_transform": [1]}, 2, {"layers.1.self_attn.q_proj"}),
        ({"target_modules": r"model\.layers\.0\..*up_proj"}, 2, {"layers.0.mlp.up_proj"}),
        (
            {"rank_pattern": {"k_proj": 7}, "target_modules": ["k_proj", "lm_head"]},
            7,
            {"layers.0.self_attn.k_proj", "layers.1.self_attn.k_proj", "lm_head"},
        ),
    ],
)
def test_adapter_is_planned_by_the_modules_that_peft_would_choose(tmp_path, values, rank, chosen):
    architecture = tiny.tiny_config()
    shape = jobs.shape_of_adapter(adapter_config(tmp_path / "adapter", **values), architecture)
    assert shape.rank == rank and set(select(Decoder.abstract(architecture), shape)) == chosen


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["gate_proj"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ],
)
def test_adapter_of_experts_is_planned_by_the_linears_that_all_of_them_have(tmp_path, values):
    experts = ExpertsConfig(num_experts=3, experts_per_token=2, width=8)
    architecture = dataclasses.replace(tiny.tiny_config(), family="olmoe", experts=experts)
    shape = jobs.shape_of_adapter(adapter_config(tmp_path / "adapter", **values), architecture)
    chosen = set(select(Decoder.abstract(architecture), shape))
    parts = ["gate_proj", "up_proj"] if "target_parameters" in values else ["gate_proj"]
    assert chosen == {f"layers.{layer}.mlp.experts.{part}" for layer in (0, 1) for part in parts}


def test_adapter_that_fits_nothing_is_refused(tmp_path):
    folder = adapter_config(tmp_path / "adapter", target_modules=["query_key_value"])
    with pytest.raises(InputError, match="belongs to another model"):
        jobs.shape_of_adapter(folder, tiny.tiny_config())


def test_folder_of_an_earlier_save_is_free_until_something_else_is_in_it(model_dir, tmp_path):
    out = tmp_path / "adapter"
    jobs.require_free_folder(out)
    peft.save_adapter(add_lora(load_model(model_dir), LoRAConfig(rank=1, targets=("q_proj",))), out)
    jobs.require_free_folder(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        jobs.require_free_folder(out)


def test_saved_adapter_says_how_far_it_is_from_the_live_model(trainer, tmp_path):
    saved = jobs.save_results(trainer(), tmp_path / "run")
    assert saved == {"adapter_dir": str(tmp_path / "run/adapter"), "adapter_kl": pytest.approx(0, abs=1e-9)}
    check = json.loads((tmp_path / "run/adapter_check.json").read_text())
    assert check["kl_max"] <= 1e-9 < 1e-3 < check["adapter_kl_mean"]
    assert not (tmp_path / "run/adapter/tokenizer.json").exists()  # the base's own does


def test_adapter_that_comes_back_changed_fails_the_run(trainer, tmp_path, monkeypatch):
    real = peft.load_adapter

    def load_changed(*arguments):
        graph, lora, frozen = split(real(*arguments))
        return merge(graph, jax.tree.map(lambda leaf: leaf * 1.001, lora), frozen)

    monkeypatch.setattr(peft, "load_adapter", load_changed)
    with pytest.raises(RunError, match="reloaded, it differs from the trained adapter"):
        jobs.save_results(trainer(), tmp_path / "run")


def test_template_of_the_job_goes_with_the_adapter_and_the_merged_model(trainer, model_dir, tmp_path):
    live = trainer(chat_template=TEMPLATE)
    jobs.save_results(live, tmp_path / "run", merge_into=tmp_path / "merged")
    _, beside_adapter = load(model_dir, adapter=tmp_path / "run/adapter", dtype="float32")
    _, beside_merged = load(tmp_path / "merged")
    assert beside_adapter.chat_template == beside_merged.chat_template == TEMPLATE
    assert live.tokenizer.chat_template == tiny.tiny_tokenizer().chat_template != TEMPLATE
