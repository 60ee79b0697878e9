"""What examples/ holds runs as it says."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np

import pronghorn as ph
from pronghorn.configuration import read_job
from pronghorn.data import tokenize_rows
from tests import tiny

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_functional_script_learns_and_saves_an_adapter_that_loads(tmp_path):
    spec = importlib.util.spec_from_file_location("functional", EXAMPLES / "functional.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model, rows = tiny.write_model(tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl")
    options = ["--steps", "6", "--max-length", "64", "--learning-rate", "0.02"]
    losses = script.main([str(model), str(rows), str(tmp_path / "adapter"), *options])
    assert len(losses) == 6 and np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3
    adapted, _ = ph.load(model, adapter=tmp_path / "adapter", dtype="float32")
    assert adapted.adapter.rank == 16


def test_functional_script_is_short():
    assert len((EXAMPLES / "functional.py").read_text().splitlines()) < 80


def test_every_row_of_the_chat_recipe_is_a_chat_with_an_answer_in_the_loss():
    data = read_job(EXAMPLES / "sft_chat.yaml").data
    rows = ph.load_rows(EXAMPLES.parent / data.path)
    dataset = tokenize_rows(rows, tiny.tiny_tokenizer(), dataclasses.replace(data, max_length=1024))
    assert dataset.format.name == "messages" and dataset.stats.documents == len(rows) == 40
    assert dataset.stats.untrained == 0
