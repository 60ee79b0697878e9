"""Bad input ends a command with exit code 2 and one sentence, and nothing is left on the disk."""

import json
import re
import shutil

import pytest
import yaml

from pronghorn.converters.huggingface import load_model
from pronghorn.converters.peft import save_adapter
from pronghorn.lora import LoRAConfig, add_lora
from tests import tiny
from tests.cli.conftest import invoke, tree


@pytest.fixture
def refused(tmp_path, caplog):
    """Run a command that must refuse; returns its sentence. Everything in `tmp_path` must stay as it is."""

    def call(*arguments) -> str:
        before = tree(tmp_path)
        finished = invoke(*arguments)
        assert finished.code == 2, finished
        sentence = finished.err
        assert sentence.startswith(f"pronghorn {arguments[0]}: ") and "Traceback" not in sentence
        assert sentence.count("\n") == 1 and sentence.endswith("\n") and len(sentence) < 1000
        assert not re.search(r"[.!?] [A-Z]", sentence), "more than one sentence"
        assert not caplog.records, "a library said something too"
        assert tree(tmp_path) == before, "something was left behind"
        return sentence

    return call


@pytest.fixture
def train(refused, job, tmp_path):
    """Call `train` on the job with some keys set; returns the refusal."""

    def call(*overrides, **keys):
        job_file = tmp_path / "job.yaml"
        job_file.write_text(yaml.safe_dump({**job, **keys}))
        return refused("train", job_file, f"train.output_dir={tmp_path / 'run'}", *overrides)

    return call


@pytest.fixture
def broken(model_dir, tmp_path):
    """A copy of the model folder for a test to damage."""
    return shutil.copytree(model_dir, tmp_path / "broken")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_job_file(refused, tmp_path):
    assert "absent.yaml: no such file" in refused("train", tmp_path / "absent.yaml")


def test_malformed_yaml_names_the_line(refused, tmp_path):
    (tmp_path / "job.yaml").write_text("model: x\ndata: [unclosed\n")
    sentence = refused("train", tmp_path / "job.yaml")
    assert "job.yaml: not valid YAML" in sentence and "line 3" in sentence


def test_unknown_key_names_the_nearest(train):
    assert "train.learning_rat: unknown key; did you mean train.learning_rate?" in train(
        "train.learning_rat=1e-4"
    )


def test_wrong_type_names_the_key(train):
    assert "train.max_steps: 'many' must be a whole number" in train("train.max_steps=many")


def test_missing_model_folder(train, tmp_path):
    assert f"{tmp_path / 'absent'}: no such file or folder" in train(model=str(tmp_path / "absent"))


def test_unknown_architecture_names_the_supported_ones(train, broken):
    edit_config(broken, model_type="sphinx")
    sentence = train(model=str(broken))
    assert "'sphinx'" in sentence and " llama" in sentence and "qwen{" in sentence  # stems together


@pytest.mark.parametrize("model_type", ["llama", "sphinx"])
def test_remote_code_is_never_run(train, broken, model_type):
    (broken / "modeling.py").write_text(f"open({str(broken / 'ran')!r}, 'w')")
    edit_config(broken, model_type=model_type, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert "auto_map" in train(model=str(broken))
    assert not (broken / "ran").exists()


def test_missing_config_json(train, broken):
    (broken / "config.json").unlink()
    assert "config.json: no such file" in train(model=str(broken))


def test_truncated_safetensors_names_the_file(train, broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    sentence = train(model=str(broken))
    assert "broken/model.safetensors" in sentence and "truncated" in sentence


def test_pickled_weights_say_how_to_convert(train, broken):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    sentence = train(model=str(broken))
    assert "pytorch_model.bin" in sentence and "save_pretrained" in sentence


def test_folder_without_tokenizer(train, broken):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    assert "has no tokenizer" in train(model=str(broken))


def test_no_data_path(train):
    assert "data.path: missing" in train("data.path=null")


def test_missing_data_file(train, tmp_path):
    assert "absent.jsonl: no such file" in train(f"data.path={tmp_path / 'absent.jsonl'}")


def test_malformed_row_names_file_and_line_and_shows_its_start(train, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl")
    lines = path.read_text().splitlines()
    lines[4] = '{"messages": [unquoted'
    path.write_text("\n".join(lines))
    sentence = train(f"data.path={path}")
    assert f"{path}:5: not valid JSON" in sentence and '{"messages": [unq' in sentence


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_set(train, tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    assert "at least one" in train(f"data.path={tmp_path / 'rows.jsonl'}")


def test_data_faults_are_found_before_weights_are_read(train, broken, tmp_path):
    (broken / "model.safetensors").unlink()
    (tmp_path / "rows.jsonl").write_text("\n")
    assert "rows.jsonl" in train(f"data.path={tmp_path / 'rows.jsonl'}", model=str(broken))


def test_everything_masked_says_why(train, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}]} for i in range(3)]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    sentence = train(f"data.path={path}", "data.eval_fraction=0")
    assert "every token is masked" in sentence and "data.loss_on='assistant'" in sentence


def test_answers_that_truncation_cuts_away_count_as_masked(train):
    sentence = train("data.max_length=4")
    assert "every token is masked" in sentence and "data.max_length=4" in sentence


@pytest.mark.parametrize(
    ("changes", "made_elsewhere", "told"),
    [
        ({"seed": 7}, False, "another base model"),
        ({"hidden_size": 32}, False, "another base model"),
        ({"hidden_size": 32}, True, "has shape"),
        ({"num_layers": 3}, True, "no such linear"),
    ],
)
def test_adapter_of_another_model(train, tmp_path, changes, made_elsewhere, told):
    other = load_model(tiny.write_model(tmp_path / "other", **changes))
    save_adapter(add_lora(other, LoRAConfig(rank=2, targets=("down_proj", "o_proj"))), tmp_path / "adapter")
    if made_elsewhere:  # PEFT does not say what the base was
        (tmp_path / "adapter/pronghorn.json").unlink()
    sentence = train(adapter=str(tmp_path / "adapter"))
    assert str(tmp_path / "adapter") in sentence and told in sentence


def test_missing_adapter(train, tmp_path):
    sentence = train(adapter=str(tmp_path / "absent"))
    assert str(tmp_path / "absent") in sentence and "give the folder" in sentence


def test_unknown_lora_target_names_those_that_exist(train):
    sentence = train("lora.targets=[q_prog]")
    assert "q_prog" in sentence and "q_proj" in sentence


def test_taken_folder_for_the_merged_model_is_refused_before_training(train, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert "mine: exists and is not empty" in train("--merge", tmp_path / "mine")


def test_taken_folder_for_the_adapter_is_refused_before_training(train, tmp_path):
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/adapter/thesis.txt").write_text("years of work")
    assert "run/adapter: exists and is not empty" in train()


def test_merge_without_adapter_is_refused_before_training(train, tmp_path):
    assert "no adapter to merge" in train("--merge", tmp_path / "merged", "lora=null")


def test_resume_of_nothing(train):
    assert "no complete checkpoint" in train("train.resume=true")


def test_output_folder_that_is_a_file(train, tmp_path):
    (tmp_path / "taken").write_text("x")
    assert "taken is a file" in train(f"train.output_dir={tmp_path / 'taken'}")


@pytest.mark.parametrize("command", ["plan", "preview"])
def test_commands_that_read_a_job_refuse_like_train(refused, command, tmp_path):
    assert "train.max_step: unknown key; did you mean train.max_steps?" in refused(
        command, "model=x", "train.max_step=2", "--json", tmp_path / "numbers.json"
    )


def test_preview_of_a_malformed_row(refused, job, tmp_path):
    (tmp_path / "rows.jsonl").write_text("[1]\n")
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump({**job, "data": {"path": str(tmp_path / "rows.jsonl")}}))
    assert "rows.jsonl:1" in refused("preview", job_file, "--html", tmp_path / "page.html")


def test_preview_of_less_than_no_rows(refused, run):
    assert "--rows -1" in refused("preview", run.job_file, "--rows", -1)


def test_converting_a_truncated_file_leaves_no_folder(refused, broken, tmp_path):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "broken/model.safetensors" in refused("convert", broken, tmp_path / "deep/er/out")


@pytest.mark.parametrize("command", [("convert",), ("merge", "adapter")])
def test_taken_output_folder(refused, command, model_dir, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    inputs = [model_dir, *([run.folder / "adapter"] if "adapter" in command else [])]
    sentence = refused(command[0], *inputs, tmp_path / "out")
    assert "out: exists and is not empty" in sentence


def test_shards_of_no_size(refused, model_dir, tmp_path):
    assert "must be positive" in refused("convert", model_dir, tmp_path / "out", "--max-shard-gib", 0)


def test_damaged_gguf_file(refused, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    assert "model.gguf" in refused("convert", tmp_path / "model.gguf", tmp_path / "out")


def test_merging_an_adapter_of_another_model(refused, run, tmp_path):
    other = tiny.write_model(tmp_path / "other", num_layers=1)
    sentence = refused("merge", other, run.folder / "adapter", tmp_path / "out")
    assert str(run.folder / "adapter") in sentence


def test_generating_from_an_unreadable_prompt_file(refused, model_dir, tmp_path):
    assert "--prompt-file" in refused("generate", model_dir, "--prompt-file", tmp_path / "absent.txt")


def test_generating_no_tokens(refused, model_dir):
    sentence = refused("generate", model_dir, "--prompt", "x", "--max-new-tokens", 0)
    assert "max_new_tokens" in sentence


def test_generating_past_the_context(refused, model_dir):
    assert "context of 128" in refused("generate", model_dir, "--prompt", "x", "--max-new-tokens", 500)


def test_verifying_an_unknown_architecture(refused, broken, tmp_path):
    edit_config(broken, model_type="sphinx")
    assert "'sphinx'" in refused("verify", broken, "--json", tmp_path / "report.json")
