"""`plan` and `preview`: what a job needs and what the model will see, before anything is trained."""

import html
import json
import re
import shutil

import pytest

from tests.cli.conftest import invoke


@pytest.fixture(scope="module")
def plan(run, model_dir, tmp_path_factory):
    """The plan of the job of `run`, from a folder without weights."""
    root = tmp_path_factory.mktemp("plan")
    folder = shutil.copytree(model_dir, root / "model")
    (folder / "model.safetensors").unlink()
    numbers = root / "plan.json"
    finished = invoke("plan", run.job_file, f"model={folder}", "--json", numbers)
    assert finished.code == 0, finished.err
    return json.loads(numbers.read_text()), finished.out, folder


def test_device_peak_without_weights_is_the_one_that_the_run_had(plan, run):
    numbers, _, _ = plan
    assert numbers["peak_device_bytes"] == run.numbers["planned_device_bytes"]


def test_plan_counts_parameters_and_holds_them_all(plan):
    numbers, shown, _ = plan
    rank, layers, hidden, ffn = 3, 2, 48, 64
    assert numbers["trained_parameters"] == layers * rank * (2 * hidden + hidden + ffn)
    assert numbers["peak_device_bytes"] > 4 * (numbers["trained_parameters"] + numbers["frozen_parameters"])
    assert numbers["peak_host_bytes"] > 0 and numbers["flops_per_step"] > 0
    assert f"{numbers['trained_parameters']:,} trained" in shown


def test_plan_of_going_on_with_an_adapter_is_that_of_the_adapter(plan, run, tmp_path):
    numbers, _, folder = plan
    path = tmp_path / "plan.json"
    arguments = [f"model={folder}", "lora=null", f"adapter={run.folder / 'adapter'}", "--json", path]
    finished = invoke("plan", run.job_file, *arguments)
    assert finished.code == 0, finished.err
    of_adapter = json.loads(path.read_text())
    same = ("trained_parameters", "frozen_parameters", "peak_device_bytes")
    assert {name: of_adapter[name] for name in same} == {name: numbers[name] for name in same}


def test_preview_shows_rows_with_their_mask_and_counts_the_set(run, tmp_path):
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    finished = invoke("preview", run.job_file, "--rows", 2, "--html", page, "--json", numbers)
    assert finished.code == 0, finished.err
    counts = json.loads(numbers.read_text())
    assert counts["format"] == "messages"
    assert counts["documents"] == 9 and counts["heldout_documents"] == 3  # a quarter of twelve
    assert 0 < counts["trained_tokens"] < counts["real_tokens"]
    assert finished.out.count("is lazy") + finished.out.count("so lazy") == 2
    trained = [html.unescape(text) for text in re.findall(r"<ins[^>]*>(.*?)</ins>", page.read_text())]
    assert len(trained) == 2 and all(text.endswith("lazy<|im_end|>") for text in trained)
