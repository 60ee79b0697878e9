"""`generate` prints what the library's function returns for the same prompt."""

import json

import pytest

import pronghorn as ph
from tests.cli.conftest import invoke


@pytest.fixture(scope="module")
def loaded(model_dir):
    return ph.load(model_dir, dtype="float32")


def generate(model_dir, tmp_path, *options):
    """(printed text, numbers)."""
    numbers = tmp_path / "numbers.json"
    options = [*options, "--dtype", "float32", "--max-new-tokens", 12, "--json", numbers]
    finished = invoke("generate", model_dir, *options)
    assert finished.code == 0, finished.err
    return finished.out, json.loads(numbers.read_text())


def test_greedy_answer_to_a_message_goes_through_the_template(loaded, model_dir, tmp_path):
    shown, numbers = generate(model_dir, tmp_path, "--prompt", "what is fox?")
    messages = [{"role": "user", "content": "what is fox?"}]
    expected = ph.generate(*loaded, messages, max_new_tokens=12)
    assert shown == expected + "\n" and numbers["text"] == expected and len(expected) > 3
    assert numbers["prompt"] == "what is fox?" and numbers["seconds"] > 0


def test_raw_prompt_is_continued_as_it_is(loaded, model_dir, tmp_path):
    (tmp_path / "prompt.txt").write_text("the lazy dog", encoding="utf-8")
    shown, _ = generate(model_dir, tmp_path, "--raw", "--prompt-file", tmp_path / "prompt.txt")
    assert shown == ph.generate(*loaded, "the lazy dog", max_new_tokens=12) + "\n"
    assert shown != generate(model_dir, tmp_path, "--prompt", "the lazy dog")[0]


def test_adapter_changes_the_answer(run, model_dir, tmp_path):
    plain, _ = generate(model_dir, tmp_path, "--prompt", "what is fox?")
    adapted, _ = generate(
        model_dir, tmp_path, "--prompt", "what is fox?", "--adapter", run.folder / "adapter"
    )
    merged, _ = generate(run.merged, tmp_path, "--prompt", "what is fox?")
    assert adapted == merged != plain


def test_sampled_answer_depends_on_the_seed_alone(model_dir, tmp_path):
    options = ["--prompt", "what is fox?", "--temperature", 1.5, "--top-k", 50, "--top-p", 0.99]
    one, again, other = (generate(model_dir, tmp_path, *options, "--seed", seed)[0] for seed in (1, 1, 2))
    assert one == again != other
