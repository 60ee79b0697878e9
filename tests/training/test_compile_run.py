"""Programs compiled from shapes, before there are weights: they are the same, and used for nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pronghorn.data import DataConfig
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig, add_lora, split
from pronghorn.models import Decoder
from pronghorn.pallas_kernels import launch
from pronghorn.training import TrainConfig, Trainer, compile_run
from pronghorn.training.compile_run import program_key
from tests.training.small import random_documents, same_leaves, small_config, small_model, tokenized

LORA = LoRAConfig(rank=3, alpha=6, targets=("q_proj", "down_proj"))


def abstract_model(lora=LORA, *, dtype=jnp.float32, **changes):
    model = Decoder.abstract(small_config(**changes), dtype=dtype)
    return model if lora is None else add_lora(model, lora)


@pytest.fixture
def make(tmp_path):
    """A trainer of two steps with held-out rows."""

    def trainer(model, name="run", **changes):
        settings = {"max_steps": 2, "batch_size": 2, "save_every": None, "learning_rate": 0.05} | changes
        return Trainer(
            model,
            None,
            tokenized(random_documents(8)),
            TrainConfig(output_dir=str(tmp_path / name), **settings),
            data=DataConfig(max_length=16),
            eval_dataset=tokenized(random_documents(3, seed=1)),
        )

    return trainer


@pytest.mark.parametrize("rank", [3, None])
def test_training_is_bit_equal_to_that_of_programs_compiled_with_weights(make, rank, monkeypatch):
    late = make(small_model(rank=rank), "late")
    usual = late.train()
    early = make(abstract_model(None if rank is None else LORA), "early")
    plan = early.compile()
    evaluation = early._evaluation
    early.model = small_model(rank=rank)
    monkeypatch.setattr(compile_run, "compile_step", None)  # nothing is left to compile
    result = early.train()
    assert early._evaluation is evaluation
    assert result.losses == usual.losses and result.evaluations == usual.evaluations
    assert result.planned_device_bytes == usual.planned_device_bytes == plan.peak_device_bytes
    assert same_leaves(split(early.model)[1], split(late.model)[1])


def replaced(trainer, **changes):
    trainer.config = dataclasses.replace(trainer.config, **changes)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "model", small_model(rank=2)),
        lambda t: setattr(t, "model", small_model(rank=3, targets=("q_proj", "up_proj"))),
        lambda t: setattr(t, "model", small_model(rank=3, dtype=jnp.bfloat16)),
        lambda t: setattr(t, "model", small_model(rank=3, rms_norm_eps=1e-3)),  # the same shapes
        lambda t: setattr(t, "model", small_model(rank=3, dropout=0.1)),
        lambda t: setattr(t.model, "adapter", dataclasses.replace(t.model.adapter, alpha=7.0)),
        lambda t: replaced(t, max_grad_norm=0.5),
        lambda t: replaced(t, deterministic=True),
        lambda t: setattr(t, "total_steps", 9),
        lambda t: setattr(t, "data", dataclasses.replace(t.data, packing=False)),
        lambda t: setattr(t, "eval_dataset", None),
    ],
)
def test_programs_are_given_up_for_any_other_model_setting_or_batch(make, change):
    trainer = make(abstract_model())
    trainer.compile()
    trainer.model = small_model()
    assert trainer._compiled.key == program_key(trainer)
    change(trainer)
    trainer._forget_stale_programs()
    assert trainer._compiled is None and trainer._evaluation is None


def test_a_program_is_of_the_context_that_it_was_traced_in(make):
    trainer = make(abstract_model())
    trainer.compile()
    with launch.kernels("pallas"):
        assert trainer._compiled.key != program_key(trainer)
    with jax.default_matmul_precision("bfloat16"):
        assert trainer._compiled.key != program_key(trainer)
    assert trainer._compiled.key == program_key(trainer)


def test_a_model_that_does_not_fit_trains_as_if_nothing_had_been_compiled(make):
    trainer = make(abstract_model(), "early")
    trainer.compile()
    other = {"rms_norm_eps": 0.5}
    trainer.model = small_model(**other)
    usual = make(small_model(**other), "late")
    result, expected = trainer.train(), usual.train()
    assert result.losses == expected.losses and result.evaluations == expected.evaluations
    assert same_leaves(split(trainer.model)[1], split(usual.model)[1])
    assert result.losses != make(small_model(), "other").train().losses


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw_8bit", "ema_decay": 0.9, "gradient_accumulation": 2},
        {"paged_optimizer": True, "memory_policy": "layer_inputs"},
    ],
)
def test_every_kind_of_state_is_compiled_for(make, settings):
    trainer = make(abstract_model(), "early", **settings)
    trainer.compile()
    trainer.model = small_model()
    assert trainer._compiled.key == program_key(trainer)
    late = make(small_model(), "late", **settings)
    assert trainer.train().losses == late.train().losses
    assert same_leaves(split(trainer.model)[1], split(late.model)[1])


def test_a_run_is_resumed_with_programs_compiled_from_shapes(make):
    whole = make(small_model(), "whole", max_steps=4)
    whole.train()
    make(small_model(), "parts", max_steps=4, save_every=2).train(stop_after=2)
    second = make(abstract_model(), "parts", max_steps=4, save_every=2)
    second.compile()
    second.model = small_model()
    assert second.train(resume=True).resumed_from == 2
    assert same_leaves(split(second.model)[1], split(whole.model)[1])


def test_a_model_of_shapes_is_compiled_for_and_not_run(make):
    trainer = make(abstract_model())
    trainer.compile()
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(InputError, match="has shapes and no weights"):
            run()


def test_compiling_early_allocates_nothing(make):
    trainer = make(abstract_model())
    before = {id(array) for array in jax.live_arrays()}
    trainer.compile()
    made = [array for array in jax.live_arrays() if id(array) not in before]
    smallest_weight = min(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(split(trainer.model)[1])
    )
    assert max((array.nbytes for array in made), default=0) <= smallest_weight
