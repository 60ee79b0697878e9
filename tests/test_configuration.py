"""YAML and key=value arguments become frozen dataclasses, or a sentence that names the key and the cure."""

import dataclasses
from pathlib import Path

import pytest

from pronghorn.configuration import JobConfig, from_mapping, read_job
from pronghorn.data import DataConfig
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig
from pronghorn.training import TrainConfig

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


def job(text="", *overrides, tmp_path=None) -> JobConfig:
    if tmp_path is None:
        return read_job(None, ["model=x", *overrides])
    (tmp_path / "job.yaml").write_text("model: x\n" + text, encoding="utf-8")
    return read_job(tmp_path / "job.yaml", overrides)


def refusal(*overrides) -> str:
    with pytest.raises(InputError) as caught:
        job("", *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_said_is_the_default():
    assert job() == JobConfig(model="x", lora=LoRAConfig(), data=DataConfig(), train=TrainConfig())


def test_every_section_of_a_file_is_read(tmp_path):
    text = """
dtype: float32
lora:
  rank: 4
  alpha: 8
  targets: [q_proj, "layers.*.mlp.up_proj"]
  layers: [0, 2]
data:
  path: rows.jsonl
  columns: {prompt: question, completion: answer}
  eval_fraction: 0.1
train:
  learning_rate: 2e-4
  max_grad_norm: null
  schedule: linear
  resume: auto
"""
    assert job(text, tmp_path=tmp_path) == JobConfig(
        model="x",
        dtype="float32",
        lora=LoRAConfig(rank=4, alpha=8.0, targets=("q_proj", "layers.*.mlp.up_proj"), layers=(0, 2)),
        data=DataConfig(
            path="rows.jsonl", columns={"prompt": "question", "completion": "answer"}, eval_fraction=0.1
        ),
        train=TrainConfig(learning_rate=2e-4, max_grad_norm=None, schedule="linear", resume="auto"),
    )


def test_arguments_win_over_the_file_and_leave_the_rest_of_it(tmp_path):
    text = "train: {max_steps: 5, batch_size: 3}\n"
    read = job(text, "train.max_steps=7", "data.max_length=9", tmp_path=tmp_path)
    assert (read.train.max_steps, read.train.batch_size, read.data.max_length) == (7, 3, 9)


@pytest.mark.parametrize("text", ["2e-4", "0.0002", "2E-4", "2.0e-04"])
def test_floats_may_be_written_in_any_way(text):
    assert job("", f"train.learning_rate={text}").train.learning_rate == 2e-4


def test_whole_numbers_are_floats_where_a_float_is_asked_for():
    read = job("", "train.epochs=3", "lora.alpha=32")
    assert type(read.train.epochs) is float and type(read.lora.alpha) is float


@pytest.mark.parametrize(
    ("text", "targets"),
    [("all-linear", "all-linear"), ("[q_proj, k_proj]", ("q_proj", "k_proj")), ("lm_head", "lm_head")],
)
def test_targets_are_a_text_or_a_list(text, targets):
    assert job("", f"lora.targets={text}").lora.targets == targets


def test_lora_null_trains_every_weight(tmp_path):
    assert job("lora: null\n", tmp_path=tmp_path).lora is None
    assert job("", "lora=null").lora is None


def test_settings_inside_a_section_that_the_file_leaves_out_make_it_again(tmp_path):
    assert job("lora: null\n", "lora.rank=2", tmp_path=tmp_path).lora == LoRAConfig(rank=2)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("auto", "auto")])
def test_resume_is_a_truth_value_or_auto(text, value):
    assert job("", f"train.resume={text}").train.resume == value


def test_read_job_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        job().model = "y"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.learning_rat=1", "train.learning_rat: unknown key; did you mean train.learning_rate?"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean train.learning_rate?"),
        ("rank=1", "rank: unknown key; did you mean lora.rank?"),
        ("seed=1", "seed: unknown key; did you mean lora.seed or data.seed or train.seed?"),
        ("datta.path=x", "datta: unknown key; did you mean data?"),
        ("data.columns.promt=x", "'promt' is not a column pronghorn reads; the names are messages, "),
        ("zzz=1", "zzz: unknown key; known keys are model, dtype, layers,"),
        ("train.max_steps=many", "train.max_steps: 'many' must be a whole number or null"),
        ("train.max_steps=1.5", "train.max_steps: 1.5 must be a whole number"),
        ("train.max_steps=true", "train.max_steps: true must be a whole number"),
        ("train.batch_size=null", "train.batch_size: null must be a whole number."),
        ("train.learning_rate=fast", "train.learning_rate: 'fast' must be a number."),
        ("train.learning_rate=yes", "train.learning_rate: true must be a number."),
        ("train.learning_rate=nan", "train.learning_rate: nan cannot be used; give a number over 0"),
        ("train.tensorboard=1", "train.tensorboard: 1 must be true or false."),
        ("train.resume=maybe", "train.resume: 'maybe' must be true or false or auto."),
        (
            "train.schedule=square",
            "train.schedule: 'square' is not a choice; use cosine, linear, constant, wsd, inverse_sqrt or polynomial.",
        ),
        ("dtype=int8", "dtype: 'int8' is not a choice; use bfloat16, float16 or float32."),
        ("dtype=[bfloat16]", "dtype: ['bfloat16'] is not a choice"),
        ("data.path=3", "data.path: 3 must be text (put it in quotes) or null."),
        ("data.path=2024-01-02", "data.path: datetime.date(2024, 1, 2) must be text"),
        ("data.path=2024-99-99", "data.path: the value '2024-99-99' is not valid YAML"),
        ("data.path=[", "data.path: the value '[' is not valid YAML"),
        ("data.columns=[a]", "data.columns: ['a'] must be `key: value` pairs or null."),
        ("lora.targets=3", "lora.targets: 3 must be text (put it in quotes) or a list"),
        ("lora.targets=[q_proj, 3]", "lora.targets[1]: 3 must be text"),
        ("lora.layers=3", "lora.layers: 3 must be a list such as [a, b] or null."),
        ("lora.layers=[0, x]", "lora.layers[1]: 'x' must be a whole number."),
        ("lora.rank=0", "lora.rank=0 must be at least 1."),
        ("lora=16", "lora: 16 must be `key: value` pairs; known keys are rank, alpha,"),
        ("train=null", "train: null must be `key: value` pairs; known keys are learning_rate,"),
        ("train.max_steps", "is not of the form key=value"),
        ("=3", "is not of the form key=value"),
        ("train..max_steps=3", "is not of the form key=value"),
        ("model.name=x", "model is 'x', which has no keys inside it; set model itself."),
        (f"data.seed={'[' * 2000}", "data.seed: the value"),
        ("data.seed=[[[[[[[[[1]]]]]]]]]", "data.seed: [[[[[[[...]]]]]]] must be a whole number."),
    ],
)
def test_wrong_settings_are_refused_with_key_and_cure(override, told):
    assert told in refusal(override)


def test_model_is_the_one_thing_that_must_be_given():
    with pytest.raises(InputError, match=r"^model: missing; give it in the job file or as model=VALUE\.$"):
        read_job(None, ["dtype=float32"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"data: [unclosed\n", "not valid YAML"),
        (b"train: {max_steps: 2}\ntrain: {max_steps: 3}\n", "the key 'train' occurs twice"),
        (b"train:\n  seed: 2\n  seed: 3\n", "the key 'seed' occurs twice"),
        (b"!!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"a: &a [1]\n? *a\n: 2\n", "not valid YAML"),
        (b"[" * 3000, "not valid YAML"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"just words\n", "the top level is 'just words'; write `key: value` pairs"),
        (b"- model\n", "the top level is ['model']; write `key: value` pairs"),
        (b"1: 2\n", "1: unknown key"),
        (b"x: " + b"y" * (1 << 20), "over 1 MiB is no job file"),
    ],
)
def test_file_that_is_no_job_is_refused_with_its_name(tmp_path, content, told):
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_job(path)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "unknown key" in told


def test_yaml_s_own_way_to_share_settings_works(tmp_path):
    (tmp_path / "job.yaml").write_text(
        "model: x\ntrain: &t {max_steps: 2, seed: 3}\ndata: {<<: {seed: 1}, seed: 2}\n"
    )
    read = read_job(tmp_path / "job.yaml")
    assert read.data.seed == 2 and read.train.seed == 3


def test_empty_file_is_a_job_whose_settings_are_all_arguments(tmp_path):
    (tmp_path / "job.yaml").write_text("# nothing yet\n")
    assert read_job(tmp_path / "job.yaml", ["model=x"]) == JobConfig(model="x")


def test_folder_and_missing_file_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(InputError, match="no such file"):
            read_job(path)


def test_names_in_messages_start_where_the_mapping_does():
    with pytest.raises(InputError, match=r"^quick\.train\.max_step: unknown key; did you mean quick\.train"):
        from_mapping(JobConfig, {"model": "x", "train": {"max_step": 1}}, "quick.")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_recipes_are_jobs(path):
    assert read_job(path).data.path is not None
