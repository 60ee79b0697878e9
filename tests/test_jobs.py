"""The pieces of the library joined for a command: what is read, in which order, and what is saved with a result."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from pronghorn import jobs
from pronghorn.configuration import JobConfig, from_mapping
from pronghorn.converters import huggingface, peft
from pronghorn.converters.huggingface import load, load_model
from pronghorn.data import DataConfig
from pronghorn.errors import InputError, RunError
from pronghorn.lora import LoRAConfig, add_lora, merge, split
from pronghorn.lora_sites import select
from pronghorn.models import Decoder
from pronghorn.models.experts_config import ExpertsConfig
from pronghorn.training import TrainConfig, Trainer, compile_run, memory_plan
from pronghorn.training.compile_run import program_key
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


def job_of(model, rows, folder, **changes):
    """A job of two steps."""
    settings = {
        "model": str(model),
        "dtype": "float32",
        "lora": {"rank": 2, "targets": ["q_proj", "up_proj"]},
        "data": {"path": rows, "max_length": 64, "eval_fraction": 0.25},
        "train": {"max_steps": 2, "learning_rate": 0.05, "output_dir": str(folder), "general_text": None},
    }
    for key, value in changes.items():
        settings[key] = settings[key] | value if isinstance(value, dict) and key in settings else value
    return from_mapping(JobConfig, settings)


def test_rows_are_read_then_the_step_is_compiled_then_weights_are_read(
    model_dir, rows, tmp_path, monkeypatch
):
    events = []

    def record(owner, name):
        real = getattr(owner, name)

        def spy(*arguments, **options):
            events.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, spy)

    record(jobs, "read_data")
    record(compile_run, "compile_step")
    record(memory_plan, "compile_evaluation")
    record(huggingface, "read_weights")
    trainer = jobs.prepare_job(job_of(model_dir, rows, tmp_path / "run"))
    assert events == ["read_data", "compile_evaluation", "compile_step", "read_weights"]
    trainer.train()
    assert len(events) == 4  # nothing is compiled a second time


def test_plan_is_told_before_weights_are_read(model_dir, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface, "read_weights", None)  # the first call to fail
    with pytest.raises(TypeError):
        jobs.prepare_job(job_of(model_dir, rows, tmp_path / "run"))
    assert "device memory " in (told := capsys.readouterr().out) and "the weights are loaded now" in told


def test_job_that_does_not_fit_is_refused_before_weights_are_read(model_dir, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "read_weights", None)
    monkeypatch.setattr(memory_plan, "device_limit", lambda: 1 << 16)
    with pytest.raises(InputError, match="no policy fits"):
        jobs.prepare_job(job_of(model_dir, rows, tmp_path / "run"))


def test_rank_that_a_weight_does_not_have_is_refused_before_anything_is_compiled(
    model_dir, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(compile_run, "compile_step", None)
    with pytest.raises(InputError, match=r"lora.rank=17 is over 16"):
        jobs.prepare_job(job_of(model_dir, rows, tmp_path / "run", lora={"rank": 17, "init": "pissa"}))


def test_earlier_run_is_found_before_anything_is_compiled(model_dir, rows, tmp_path):
    job = job_of(model_dir, rows, tmp_path)
    jobs.require_run_folder(job)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="holds an earlier run"):
        jobs.require_run_folder(job)
    jobs.require_run_folder(job_of(model_dir, rows, tmp_path, train={"resume": True}))


@pytest.fixture
def keys(monkeypatch):
    """What programs would have been compiled for, in the place of programs."""
    found = []

    def compile_nothing(trainer):
        found.append(program_key(trainer))
        return types.SimpleNamespace(memory_lines=lambda: [""], compile_seconds=0.0)

    monkeypatch.setattr(Trainer, "compile", compile_nothing)
    return found


RECIPE = {
    "format": "pronghorn-recipe-1",
    "kind": "nf4",
    "modules": {
        "model.layers.0.self_attn.q_proj": "int8",
        "model.layers.1.mlp.down_proj": "16bit",
    },
}


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": None},
        {"lora": None, "dtype": "bfloat16", "layers": "scanned"},
        {"lora": {"targets": "all-linear", "dropout": 0.1, "rank_pattern": {"q_proj": 3}}},
        {"lora": {"use_dora": True}, "quantization": "nf4"},
        {"lora": {"init": "pissa", "targets": ["q_proj", "embed_tokens"]}},
        {"lora": {"init": "pissa_niter_2"}, "layers": "scanned"},
        {"lora": {"init": "loftq", "targets": ["o_proj"]}, "quantization": "int8"},
        {"lora": {"targets": ["lm_head", "down_proj"]}, "quantization": "fp8"},
        {"quantization": RECIPE},
        {"new_tokens": ["lazy fox"], "layers": "scanned"},
        {"train": {"paged_optimizer": True, "deterministic": True, "memory_policy": "layer_inputs"}},
    ],
    ids=str,
)
def test_programs_compiled_from_shapes_are_for_the_model_that_is_loaded(
    model_dir, rows, tmp_path, changes, keys
):
    if changes.get("quantization") is RECIPE:
        (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
        changes = changes | {"quantization": str(tmp_path / "recipe.json")}
    if "new_tokens" in changes:
        rows = str(tiny.write_rows(tmp_path / "new.jsonl", [tiny.chat("a", "the lazy fox")] * 8))
    trainer = jobs.prepare_job(job_of(model_dir, rows, tmp_path / "run", **changes))
    assert keys == [program_key(trainer)]


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "lm_head", "embed_tokens")], ids=str)
def test_programs_are_for_the_model_with_an_adapter_that_is_gone_on_with(
    model_dir, rows, tmp_path, targets, keys
):
    lora = LoRAConfig(rank=2, targets=targets, use_dora=targets == "all-linear")
    peft.save_adapter(add_lora(load_model(model_dir), lora), tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    trainer = jobs.prepare_job(job_of(model_dir, rows, tmp_path / "run", adapter=adapter, lora=None))
    assert keys == [program_key(trainer)]


def test_programs_are_for_a_folder_that_is_quantised_already(model_dir, rows, tmp_path, keys):
    jobs.convert_model(str(model_dir), tmp_path / "nf4", "bfloat16", 1 << 30, "nf4")
    trainer = jobs.prepare_job(job_of(tmp_path / "nf4", rows, tmp_path / "run"))
    assert keys == [program_key(trainer)]
    jobs.prepare_job(job_of(model_dir, rows, tmp_path / "run"))
    assert keys[0] != keys[1]
