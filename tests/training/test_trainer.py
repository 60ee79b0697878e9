import contextlib
import dataclasses
import io
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.data import DataConfig, MixtureSource
from pronghorn.errors import InputError, RunError
from pronghorn.lora import merge, split
from pronghorn.models import flat_arrays
from pronghorn.training import TrainConfig, Trainer, losses
from tests.data.tokenizers import tiny_tokenizer
from tests.tolerances import assert_close
from tests.training.small import QUICK_COMPILE, VOCAB, random_documents, small_model, tokenized

DATA = DataConfig(max_length=16, seed=4)


def trainer_for(folder, *, model=None, documents=None, eval_documents=None, data=DATA, **settings):
    settings = {"max_steps": 5, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2} | settings
    return Trainer(
        model or small_model(),
        None,
        tokenized(documents or random_documents(12)),
        TrainConfig(output_dir=str(folder), **settings),
        data=data,
        eval_dataset=None if eval_documents is None else tokenized(eval_documents),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(trainer, result, printed) of five steps with evaluations and checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "five"
    trainer = trainer_for(
        folder,
        eval_documents=random_documents(5, seed=9),
        eval_every=2,
        save_every=2,
        log_every=2,
        tensorboard=True,
    )
    with jax.default_matmul_precision("highest"), contextlib.redirect_stdout(io.StringIO()) as printed:
        result = trainer.train()
    return trainer, result, printed.getvalue()


def test_eight_rows_are_learned_by_heart(tmp_path):
    """From rows through a chat template to a loss near zero, every weight trained."""
    tokenizer = tiny_tokenizer()
    rows = [
        {"messages": [{"role": "user", "content": f"{a} and {b}?"}, {"role": "assistant", "content": answer}]}
        for (a, b), answer in zip(
            [(a, b) for a in ("fox", "dog") for b in ("cat", "hen", "cow", "pig")], "abcdefgh", strict=True
        )
    ]
    wider = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 256}
    model = small_model(rank=None, vocab_size=len(tokenizer), **wider)
    config = TrainConfig(
        learning_rate=1e-2,
        max_steps=120,
        batch_size=2,
        output_dir=str(tmp_path),
        save_every=None,
        schedule="linear",
    )
    result = Trainer(model, tokenizer, rows, config, data=DataConfig(max_length=128)).train()
    assert result.losses[0] > 3.0
    assert result.final_loss < 0.1
    assert len(result.losses) == result.steps == 120


def test_the_report_before_step_one_has_what_a_user_must_know(run):
    trainer, _, printed = run
    before, _, after = printed.partition("step 1/5")
    assert after
    trained = sum(leaf.size for leaf in jax.tree.leaves(split(trainer.model)[1]))
    for text in (
        f"{trained:,} trained",
        f"{trainer.dataset.stats.real_tokens:,} in 12 rows",
        f"{trainer.dataset.stats.trained_tokens:,} in the loss",
        "device memory",
        "host memory",
        "FLOP a full step",
        "train.learning_rate=0.01",
        "train.beta2=0.999",
        "data.loss_on=assistant",
        "made.jsonl:",
    ):
        assert text in before, text
    given, defaults = (
        next(line for line in before.splitlines() if line.startswith(w)) for w in ("given", "defaults")
    )
    assert "train.learning_rate=" in given and "train.beta2=" in defaults


def test_metrics_are_written_for_every_step(run):
    trainer, result, _ = run
    records = [json.loads(line) for line in Path(result.output_dir, "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    assert [record["loss"] for record in steps] == result.losses
    assert [record["grad_norm"] for record in steps] == result.grad_norms
    assert steps[0]["learning_rate"] == pytest.approx(1e-2) and steps[-1]["learning_rate"] < 2e-3
    for number, record in enumerate(steps):
        batch = trainer.loader.batch_at(number)
        assert record["real_tokens"] == int((batch["segment_ids"] > 0).sum())
        targets = losses.shifted_labels(batch["labels"].reshape(4, -1), batch["segment_ids"].reshape(4, -1))
        assert record["token_count"] == int((targets >= 0).sum())
        assert record["tokens_per_second"] > 0 and record["skipped"] == 0


def test_evaluations_come_when_asked_and_at_the_end_and_are_weighted_by_token(run):
    trainer, result, _ = run
    assert [evaluation.step for evaluation in result.evaluations] == [2, 4, 5]
    documents = [trainer.eval_dataset.document(i)[0] for i in range(5)]
    padded = np.array([np.pad(ids, (0, 16 - len(ids))) for ids in documents])
    graph, *leaves = split(trainer.model)
    predict = jax.jit(lambda leaves, ids: merge(graph, *leaves)(ids), compiler_options=QUICK_COMPILE)
    logits = jax.nn.log_softmax(
        predict(leaves, padded)
    )  # causal: padding at the end changes nothing before it
    total = -sum(
        float(logits[row, t, ids[t + 1]]) for row, ids in enumerate(documents) for t in range(len(ids) - 1)
    )
    count = sum(len(ids) - 1 for ids in documents)
    assert result.evaluations[-1].token_count == count
    assert_close(np.float32(result.evaluations[-1].loss), np.float32(total / count))
    assert trainer.evaluate().loss == pytest.approx(result.evaluations[-1].loss, rel=1e-6)


def test_the_result_says_what_the_run_did(run):
    _, result, _ = run
    assert (result.steps, result.interrupted, result.skipped, result.resumed_from) == (5, False, 0, 0)
    assert result.grad_norm_min == min(result.grad_norms) > 0
    assert result.final_loss == result.losses[-1]
    assert result.tokens_per_second > 0 and result.compile_seconds > 0
    assert result.peak_device_bytes >= result.planned_device_bytes > 0
    json.dumps(dataclasses.asdict(result))


def test_the_folder_has_the_whole_configuration(run):
    trainer, result, _ = run
    config = json.loads(Path(result.output_dir, "config.json").read_text())
    assert config["train"] == json.loads(json.dumps(dataclasses.asdict(trainer.config)))
    assert config["data"]["max_length"] == 16
    assert config["model"]["vocab_size"] == VOCAB
    assert config["versions"]["jax"] == jax.__version__
    assert config["settings that must match"]["data"] == trainer.dataset.fingerprint
    assert list((trainer_folder := __import__("pathlib").Path(result.output_dir)).glob("tensorboard/events*"))
    assert sorted(p.name for p in (trainer_folder / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000005",
    ]


def test_the_model_holds_the_trained_adapter_and_the_old_base(tmp_path):
    model = small_model()
    before = jax.tree.map(np.array, flat_arrays(model))
    kept = jax.tree.leaves(split(model)[1])[0]
    trainer_for(tmp_path, model=model, save_every=None, max_steps=2).train()
    for name, value in flat_arrays(model).items():
        changed = not np.array_equal(np.asarray(value), before[name])
        assert changed == ("lora" in name), name
    assert not kept.is_deleted()  # another reference to the adapter's arrays outlives the run


def test_full_fine_tuning_keeps_the_dtype_of_the_model(tmp_path):
    model = small_model(rank=None, dtype=jnp.bfloat16)
    before = jax.tree.map(np.array, flat_arrays(model))
    trainer_for(tmp_path, model=model, save_every=None, max_steps=2).train()
    after = flat_arrays(model)
    assert {value.dtype for value in after.values()} == {jnp.dtype(jnp.bfloat16)}
    assert all(not np.array_equal(np.asarray(after[name]), before[name]) for name in after if "proj" in name)


def test_an_earlier_run_is_not_overwritten_unasked(run, tmp_path):
    trainer, _, _ = run
    with pytest.raises(InputError, match=r"holds an earlier run.*overwrite"):
        trainer.train()
    with pytest.raises(InputError, match="no complete checkpoint"):
        trainer_for(tmp_path / "none").train(resume=True)


def test_overwriting_leaves_nothing_of_the_earlier_run_to_resume(tmp_path):
    stale = tmp_path / "checkpoints" / "step_00000900"
    stale.mkdir(parents=True)
    trainer_for(tmp_path, overwrite=True, max_steps=5).train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]


def test_a_fraction_of_the_rows_is_held_out():
    rows = [{"prompt": f"{number} is", "completion": str(number)} for number in range(8)]
    tokenizer = tiny_tokenizer()
    model = small_model(vocab_size=len(tokenizer))
    trainer = Trainer(model, tokenizer, rows, data=DataConfig(max_length=32, eval_fraction=0.25))
    assert (len(trainer.dataset), len(trainer.eval_dataset)) == (6, 2)
    assert not set(trainer.dataset.origins) & set(trainer.eval_dataset.origins)


def test_a_run_whose_batches_are_poison_stops_and_leaves_the_weights(tmp_path, monkeypatch):
    model = small_model()
    trainer = trainer_for(
        tmp_path, model=model, max_steps=9, max_skipped_streak=2, log_every=1, save_every=None
    )
    batch_at = trainer.loader.batch_at

    def poisoned(step):
        batch = batch_at(step)
        if step >= 3:
            batch["input_ids"][0, 0, 0] = VOCAB
        return batch

    monkeypatch.setattr(trainer.loader, "batch_at", poisoned)
    with pytest.raises(RunError, match=r"steps 4 to 5 .*not finite.*made\.jsonl:"):
        trainer.train()
    assert all(np.isfinite(np.asarray(value)).all() for value in flat_arrays(model).values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in lines[:5]] == [False, False, False, True, True]


def test_tokens_that_the_model_lacks_and_masks_without_loss_are_refused():
    with pytest.raises(InputError, match=f"token id {VOCAB}"):
        Trainer(small_model(), None, tokenized([[1, VOCAB, 2]]))
    with pytest.raises(InputError, match="nothing would be learned"):
        Trainer(small_model(), None, tokenized([[1, 2], [3]], untrained=2))
    with pytest.raises(InputError, match="tokenizer"):
        Trainer(small_model(), None, [{"text": "hello"}])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tmp_path, monkeypatch, capsys, number):
    trainer = trainer_for(tmp_path, save_every=None)
    iterate = trainer.loader.iterate

    def signalling(*steps):
        for count, batch in enumerate(iterate(*steps)):
            if count == 2:
                os.kill(os.getpid(), number)
            yield batch

    before = signal.getsignal(number)
    monkeypatch.setattr(trainer.loader, "iterate", signalling)
    result = trainer.train()
    assert (result.interrupted, result.steps) == (True, 2)
    assert signal.getsignal(number) is before
    assert (tmp_path / "checkpoints" / "step_00000002" / "manifest.json").is_file()
    assert "train.resume=true" in capsys.readouterr().out


def test_a_signal_before_the_first_step_saves_nothing(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    iterate = trainer.loader.iterate

    def signalling(*steps):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from iterate(*steps)

    monkeypatch.setattr(trainer.loader, "iterate", signalling)
    result = trainer.train()
    assert (result.interrupted, result.steps, result.losses) == (True, 0, [])
    assert not (tmp_path / "checkpoints").exists()


def test_mixture_of_weighted_rows_trains_and_evaluates_without_weights(tmp_path):
    for name in ("a", "b"):
        rows = [{"text": f"{name} " * (i + 2), "weight": 1 + i % 2} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = [MixtureSource(str(tmp_path / f"{name}.jsonl"), 1.0) for name in ("a", "b")]
    data = DataConfig(mixture=mixture, max_length=16, eval_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    model = small_model(vocab_size=len(tiny_tokenizer()))
    config = TrainConfig(max_steps=2, batch_size=2, output_dir=str(tmp_path / "run"), save_every=None)
    trainer = Trainer(model, tiny_tokenizer(), None, config, data=data)
    assert "weights" in trainer.loader.batch_at(0)
    result = trainer.train()
    assert len(result.losses) == 2 and result.evaluations[-1].token_count > 0
    assert "weights" not in trainer._eval_loader.batch_at(0)
