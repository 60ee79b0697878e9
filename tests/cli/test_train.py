"""`pronghorn train` from a YAML file to an adapter and a merged model that were read back."""

import json
import shutil

import jax
import numpy as np

from pronghorn.converters.huggingface import load, load_model
from pronghorn.lora import merge, split
from pronghorn.models import named_parameters
from tests import tiny
from tests.cli.conftest import invoke, tree
from tests.tolerances import MODEL_LOGITS

IDS = np.arange(24, dtype=np.int32)[None] * 7 % 200


def logits(model):
    graph, trainable, frozen = split(model)
    return np.asarray(jax.jit(lambda t, f: merge(graph, t, f)(IDS))(trainable, frozen))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_numbers_of_the_run_are_written_and_agree_with_the_metrics(run):
    numbers = run.numbers
    steps = [record for record in records(run.folder) if "loss" in record]
    assert numbers["steps"] == len(numbers["losses"]) == 4
    assert [record["loss"] for record in steps] == numbers["losses"]
    assert numbers["final_loss"] == numbers["losses"][-1] < numbers["losses"][0]
    assert numbers["grad_norm_min"] > 0 and numbers["skipped"] == 0 and not numbers["interrupted"]
    assert numbers["evaluations"][-1]["step"] == 4 and numbers["evaluations"][-1]["token_count"] > 0


def test_saved_adapter_gives_the_logits_of_the_merged_model_and_not_of_the_base(run, model_dir):
    adapted, tokenizer = load(model_dir, adapter=run.folder / "adapter", dtype="float32")
    merged, base = load_model(run.merged), load_model(model_dir)
    assert np.abs(logits(adapted) - logits(merged)).max() <= MODEL_LOGITS
    assert np.abs(logits(adapted) - logits(base)).max() > 0.1
    assert tokenizer.chat_template == tiny.tiny_tokenizer().chat_template


def test_what_was_saved_was_compared_with_the_live_model_and_the_numbers_are_told(run):
    assert run.numbers["adapter_kl"] <= 1e-9 and run.numbers["merged_kl"] <= 1e-6
    assert run.numbers["adapter_dir"] == str(run.folder / "adapter")
    assert run.numbers["merged_dir"] == str(run.merged)
    assert json.loads((run.folder / "adapter_check.json").read_text())["adapter_kl_mean"] > 1e-3
    assert f"adapter saved in {run.folder / 'adapter'}; reloaded, its KL" in run.out
    assert f"merged model saved in {run.merged}; reloaded, its mean KL" in run.out


def test_resumed_run_gives_the_steps_and_the_adapter_of_the_uninterrupted_one(run, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints/step_00000004")
    shutil.rmtree(folder / "adapter")
    numbers = tmp_path / "numbers.json"
    finished = invoke(
        "train", run.job_file, f"train.output_dir={folder}", "train.resume=true", "--json", numbers
    )
    assert finished.code == 0, finished.err
    again = json.loads(numbers.read_text())
    assert again["resumed_from"] == 2 and again["losses"] == run.numbers["losses"][2:]
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (run.folder / weights).read_bytes()
    assert [record["step"] for record in records(folder)] == [
        record["step"] for record in records(run.folder)
    ]


def test_earlier_run_is_not_overwritten(run):
    before = tree(run.folder)
    finished = invoke("train", run.job_file, f"train.output_dir={run.folder}")
    assert finished.code == 2
    assert "train.resume=true" in finished.err and "train.overwrite=true" in finished.err
    assert tree(run.folder) == before


def test_without_lora_every_weight_is_trained_and_the_model_is_saved(run, model_dir, tmp_path):
    numbers = tmp_path / "numbers.json"
    settings = ["lora=null", "layers=scanned", "data.eval_fraction=0", "train.max_steps=1"]
    settings.append(f"train.output_dir={tmp_path / 'full'}")
    finished = invoke("train", run.job_file, *settings, "--json", numbers)
    assert finished.code == 0, finished.err
    saved = json.loads(numbers.read_text())
    assert saved["model_dir"] == str(tmp_path / "full/model") and saved["model_kl"] <= 1e-6
    before, after = (named_parameters(load_model(folder)) for folder in (model_dir, tmp_path / "full/model"))
    same = [name for name in before if np.array_equal(before[name].get(), after[name].get())]
    assert before.keys() == after.keys() and not same
    _, tokenizer = load(tmp_path / "full/model")
    assert tokenizer.chat_template == tiny.tiny_tokenizer().chat_template
