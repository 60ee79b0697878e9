"""A small run in which dropout, schedule, moments and data position all matter, for the tests of resuming."""

import dataclasses

import numpy as np

from pronghorn.data import DataConfig
from pronghorn.models import flat_arrays
from pronghorn.training import TrainConfig, Trainer
from tests.training.small import random_documents, small_model, tokenized

CONFIG = TrainConfig(
    learning_rate=1e-2,
    warmup_steps=2,
    max_steps=7,
    batch_size=2,
    gradient_accumulation=2,
    save_every=2,
    seed=3,
)


def make_trainer(folder, *, model=None, eval_dataset=None, **changes):
    """Dropout, warm-up and several epochs, so that rng, schedule, moments and data position all matter."""
    config = dataclasses.replace(CONFIG, output_dir=str(folder), **changes)
    data = DataConfig(max_length=16, seed=5)
    return Trainer(
        small_model(dropout=0.3) if model is None else model,
        None,
        tokenized(random_documents(9)),
        config,
        data=data,
        eval_dataset=eval_dataset,
    )


def outcome(trainer, result):
    weights = {name: np.array(value) for name, value in flat_arrays(trainer.model).items()}
    if trainer.model.adapter is not None:
        weights = {name: value for name, value in weights.items() if "lora" in name}
    return result.losses, result.grad_norms, weights


def assert_same_run(resumed, uninterrupted, *, since):
    losses, grad_norms, weights = resumed
    assert losses == uninterrupted[0][since:]
    assert grad_norms == uninterrupted[1][since:]
    for name, value in uninterrupted[2].items():
        assert np.array_equal(weights[name], value), name
