"""What examples/ holds runs as it says."""

import dataclasses
import importlib.util
import json
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


def test_notebook_runs_from_the_first_cell_to_the_last(tmp_path, capsys):
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    names = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), names)
        if number == 0:  # it holds what a user changes
            names |= {
                "MODEL": str(tiny.write_model(tmp_path / "model")),
                "OUT": str(tmp_path / "run"),
                "STEPS": 3,
            }
            names["ROWS"] = str(tiny.write_rows(tmp_path / "rows.jsonl"))
    assert len(names["result"].losses) == 3 and np.isfinite(names["result"].evaluations[-1].loss)
    assert (tmp_path / "run" / "peft" / "adapter_config.json").is_file()
    assert (tmp_path / "run" / "merged" / "config.json").is_file()
    assert "held-out loss:" in capsys.readouterr().out
