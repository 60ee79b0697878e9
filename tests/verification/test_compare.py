"""`verify` passes models that agree with transformers and PEFT, and names the first place where one departs."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from pronghorn.converters import huggingface
from pronghorn.models import assign, named_parameters
from pronghorn.training import losses
from pronghorn.verification import VerifyReport, compare, verify_model
from tests import tiny
from tests.cli.conftest import invoke
from tests.models.reference import tiny_torch_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": 37, "head_dim": 12},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
}
TOKENS = 150


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: a folder that transformers wrote}."""
    root = tmp_path_factory.mktemp("verify")
    for family, special in FAMILIES.items():
        tiny_torch_model(family, num_hidden_layers=2, **special).save_pretrained(str(root / family))
    return {family: str(root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory):
    """An adapter that PEFT made for the tied llama, head and embedding included, nothing in it zero."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    peft.get_peft_model(base, config).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def reports(folders):
    """A report of each family, made when it is asked for."""
    return functools.cache(lambda family: verify_model(folders[family], tokens=TOKENS))


@pytest.mark.parametrize("family", FAMILIES)
def test_model_that_transformers_made_passes(reports, family):
    report = reports(family)
    assert report.passed and report.first_departure is None, str(report)
    assert [d.name for d in report.layers] == ["embed_tokens", "layers.0", "layers.1", "norm"]
    assert report.top1_agreement == 1.0 and report.tokens == TOKENS
    assert report.loss == pytest.approx(report.loss_theirs, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_every_parameter_is_compared(reports, folders, family):
    compared = {difference.name for difference in reports(family).gradients}
    assert compared == set(named_parameters(huggingface.load_model(folders[family])))


def test_adapter_that_peft_made_passes_and_only_its_gradients_are_compared(folders, adapter):
    report = verify_model(folders["llama"], adapter=adapter, tokens=TOKENS)
    assert report.passed, str(report)
    linears = [f"layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]
    expected = {f"{name}.lora_{letter}" for name in [*linears, "lm_head"] for letter in "AB"}
    expected |= {f"embed_tokens.lora_embedding_{letter}" for letter in "AB"}
    assert {difference.name for difference in report.gradients} == expected


def perturb(monkeypatch, name, factor):
    """Make our copy of the model wrong in one weight."""
    real = huggingface.load_model

    def load_model(*arguments, **options):
        model = real(*arguments, **options)
        weight = named_parameters(model)[name].get()
        assign(model, {name: np.asarray(weight) * np.float32(factor)}, strict=False)
        return model

    monkeypatch.setattr(huggingface, "load_model", load_model)


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        ("embed_tokens.weight", "embed_tokens"),
        ("layers.1.mlp.up_proj.weight", "layers.1"),
        ("norm.weight", "norm"),
        ("lm_head.weight", "logits"),
    ],
)
def test_wrong_weight_fails_at_the_first_layer_that_departs(folders, monkeypatch, weight, named):
    perturb(monkeypatch, weight, 1.003)
    report = verify_model(folders["qwen3"], tokens=TOKENS, gradients=False)
    assert not report.passed and report.first_departure == named
    assert str(report).endswith(f"FAILED, first at {named}")


def test_wrong_gradient_fails_where_the_forward_pass_agrees(folders, monkeypatch):
    monkeypatch.setattr(losses, "next_token", functools.partial(losses.next_token, label_smoothing=0.01))
    report = verify_model(folders["qwen3"], tokens=61)  # a length that no other test has compiled
    assert all(difference.relative < compare.LAYER_LIMIT for difference in report.layers)
    assert not report.passed and report.first_departure == "loss"
    assert any(difference.relative > compare.GRADIENT_LIMIT for difference in report.gradients)


@pytest.mark.parametrize("difference", [compare._difference, compare._layer_difference])
@pytest.mark.parametrize("ours", [np.array([[1.0, np.nan]]), np.ones((1, 3))], ids=["nan", "shape"])
def test_nan_and_other_shapes_are_the_worst_difference_there_is(difference, ours):
    assert difference("x", ours, np.ones((1, 2))).relative == float("inf")


def test_huge_activations_of_one_token_do_not_hide_a_fault_in_another():
    theirs = np.ones((1, 5, 8))
    theirs[0, 0, 3] = 2e4
    ours = theirs.copy()
    ours[0, 4] *= 1.01
    assert compare._layer_difference("layers.0", ours, theirs).relative == pytest.approx(0.01)


def test_reference_s_loss_is_taken_in_fp64(folders):
    """PyTorch's fp32 cross entropy errs by more than two models differ where the vocabulary is large."""
    ids = np.random.default_rng(0).integers(0, 131, (1, 20), dtype=np.int32)
    found = compare._run_transformers(folders["qwen2"], None, ids, lambda found: found)
    logits = found["logits"][:-1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert found["loss"] == pytest.approx(-logprobs[np.arange(19), ids[0, 1:]].mean(), rel=1e-12)


def test_command_writes_every_documented_number_and_exits_1_on_a_departure(folders, monkeypatch, tmp_path):
    perturb(monkeypatch, "layers.1.mlp.up_proj.weight", 1.003)
    path = tmp_path / "report.json"
    options = ["--no-gradients", "--tokens", TOKENS, "--json", path]
    finished = invoke("verify", folders["qwen3"], *options)
    assert finished.code == 1 and "FAILED, first at layers.1" in finished.out
    report = json.loads(path.read_text())
    assert set(report) == {field.name for field in dataclasses.fields(VerifyReport)}
    assert report["first_departure"] == "layers.1" and report["passed"] is False
    assert report["layers"][1].keys() == {"name", "relative", "max_abs"}
    assert report["limits"]["gradient"] == 1e-4 and "transformers" in report["versions"]


def test_command_exits_0_when_all_agree(folders):
    finished = invoke("verify", folders["qwen3"], "--no-gradients", "--tokens", TOKENS)
    assert finished.code == 0 and finished.out.rstrip().endswith("passed")


def test_prompt_is_prose_in_the_model_s_own_tokens_at_the_asked_length():
    tokenizer = tiny.tiny_tokenizer()
    ids = compare._prompt(tokenizer, len(tokenizer), 5000, seed=0)
    assert ids.shape == (1, 5000) and ids.dtype == np.int32
    assert len(np.unique(ids)) > 50 and " the" in tokenizer.decode(ids[0])
