"""What a run shows and keeps while it goes: incidents, trackers, answers, forgetting, and the report of its folder."""

import json
import sys
import types

import pytest

from pronghorn.cli import main
from pronghorn.data import DataConfig
from pronghorn.errors import InputError
from pronghorn.evaluation.run_report import write_run_report
from pronghorn.training import TrainConfig, Trainer
from pronghorn.training.incidents import Incidents
from pronghorn.training.trackers import Trackers
from tests.data.tokenizers import tiny_tokenizer
from tests.training.small import small_model


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(step, loss, *, norm=1.0, tokens=9):
    return {"step": step, "loss": loss, "grad_norm": norm, "token_count": tokens}


def test_a_loss_spike_and_a_nan_name_the_batch_and_its_rows(tmp_path):
    said = []
    incidents = Incidents(tmp_path / "i.jsonl", 6.0, lambda step: [f"a.jsonl:{step}"], said.append)
    for step in range(1, 31):
        incidents.see(record(step, 2.0 + 0.05 * (-1) ** step), applied=True)
    assert incidents.count == 0 and not (tmp_path / "i.jsonl").exists()
    incidents.see(record(31, 9.0), applied=True)
    incidents.see(record(32, float("nan"), norm=float("inf")), applied=False)
    incidents.see(record(33, 0.0, tokens=0), applied=False)  # a batch without a trained token is no incident
    incidents.close()
    spike, nan = lines(tmp_path / "i.jsonl")
    assert (spike["kind"], spike["step"], spike["batch"], spike["rows"]) == (
        "loss spike",
        31,
        30,
        ["a.jsonl:31"],
    )
    assert (nan["kind"], nan["loss"], nan["rows"]) == ("not finite", None, ["a.jsonl:32"])
    assert "its rows are a.jsonl:31" in said[0] and "the update was left out" in said[1]


def test_a_resumed_run_drops_incidents_it_will_meet_again(tmp_path):
    path = tmp_path / "i.jsonl"
    path.write_text('{"step": 3}\n{"step": 9}\n')
    Incidents(path, None, lambda step: [], print, keep_through=5).close()
    assert lines(path) == [{"step": 3}]


def fake_tracker(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    for key, value in functions.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_trackers_get_every_number_and_none_can_stop_a_run(tmp_path, monkeypatch):
    written, said = [], []

    class WandBRun:
        def log(self, numbers, step):
            written.append(("wandb", numbers, step))

        def finish(self):
            written.append("finished")

    fake_tracker(monkeypatch, "wandb", init=lambda **options: written.append(options) or WandBRun())

    def fail(numbers, step):
        raise OSError("no network")

    fake_tracker(monkeypatch, "trackio", init=lambda **options: None, log=fail, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    names = ("tensorboard", "wandb", "mlflow", "trackio")
    trackers = Trackers(names, tmp_path / "mine", {"train.seed": 0}, say=said.append)
    for step in (1, 2):
        trackers.write({"step": step, "loss": 1.5, "rows": ["x"], "fine": True}, "train")
    trackers.close()
    assert written[0]["name"] == "mine" and written[0]["config"] == {"train.seed": 0}
    assert written[1:] == [("wandb", {"train/loss": 1.5}, 1), ("wandb", {"train/loss": 1.5}, 2), "finished"]
    assert (
        len(said) == 2 and "mlflow is not installed" in said[0] and "trackio failed (no network)" in said[1]
    )
    [events] = (tmp_path / "mine" / "tensorboard").glob("events*")
    assert b"train/loss" in events.read_bytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, trainer, result) of a run with answers, general text, noise and a tokenizer."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": f"{animal} is", "completion": "lazy"} for animal in ("fox", "dog", "hen", "cow", "pig")
    ]
    asked = []

    def sampler(model):
        asked.append(model.adapter.rank)
        return [f"answer {len(asked)}"]

    config = TrainConfig(
        learning_rate=0.05,
        max_steps=4,
        batch_size=2,
        save_every=None,
        sample_every=2,
        sample_prompts=("what is <b>fox</b>?",),
        neftune_alpha=5.0,
        output_dir=str(folder),
    )
    model = small_model(vocab_size=len(tokenizer))
    trainer = Trainer(model, tokenizer, rows, config, data=DataConfig(max_length=64), sampler=sampler)
    return folder, trainer, trainer.train()


def test_answers_are_kept_before_while_and_after(run):
    folder, _, _ = run
    assert [(s["step"], s["text"]) for s in lines(folder / "samples.jsonl")] == [
        (0, "answer 1"),
        (2, "answer 2"),
        (4, "answer 3"),
    ]


def test_what_was_forgotten_of_a_general_text_is_told_after_every_run(run):
    folder, trainer, result = run
    assert result.general_loss_before > 3 and result.general_loss_after != result.general_loss_before
    measured = [r for r in lines(folder / "metrics.jsonl") if "general_loss" in r]
    assert [r["step"] for r in measured] == [0, 4]
    assert (
        measured[1]["general_loss"] == result.general_loss_after and measured[0]["general_token_count"] > 100
    )
    assert trainer.config.general_text == "shipped"


def test_a_run_folder_has_hashes_of_base_data_and_template(run):
    folder, trainer, _ = run
    hashes = json.loads((folder / "config.json").read_text())["hashes"]
    assert hashes["data"] == trainer.dataset.fingerprint and hashes["base"].startswith("v1-")
    assert len(hashes["chat template"]) == 64


def test_a_report_is_one_file_with_curves_answers_and_every_setting(run, capsys):
    folder, _, _ = run
    (folder / "incidents.jsonl").write_text(
        json.dumps(record(3, None) | {"kind": "not finite", "rows": ["r.jsonl:7"]})
    )
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    for text in ("<svg", "general text", "answer 3", "r.jsonl:7", "neftune_alpha", "chat template", "jax"):
        assert text in page, text
    assert "what is &lt;b&gt;fox" in page and "<b>fox" not in page and "<script" not in page
    assert str(folder / "report.html") in capsys.readouterr().out


def test_a_report_of_a_run_that_was_killed_early_and_of_no_run(run, tmp_path):
    folder, _, _ = run
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null, "grad_norm": 1.0}\n{"step": 2, "lo')
    assert write_run_report(tmp_path, tmp_path / "x.html").read_text().count("<svg") >= 1
    with pytest.raises(InputError, match="holds no run"):
        write_run_report(tmp_path / "none")


def test_a_general_text_of_ones_own_is_read_and_a_missing_one_refused(tmp_path):
    from pronghorn.data.general_text import general_text_rows

    (tmp_path / "text.txt").write_text("one\ntwo\n\nthree\n")
    assert general_text_rows(tmp_path / "text.txt") == [{"text": "one\ntwo"}, {"text": "three"}]
    with pytest.raises(InputError, match=r"train\.general_text: .*none\.txt cannot be read"):
        general_text_rows(tmp_path / "none.txt")
