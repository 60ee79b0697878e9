import dataclasses

import pytest

from pronghorn.errors import InputError
from pronghorn.training import TrainConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("epochs", -1.0),
        ("batch_size", 0),
        ("gradient_accumulation", 1.5),
        ("beta2", 1.0),
        ("max_grad_norm", 0.0),
        ("schedule", "step"),
        ("memory_policy", "none"),
        ("label_smoothing", 1.0),
        ("save_every", 0),
        ("seed", -1),
        ("output_dir", ""),
        ("optimizer", "sgd"),
        ("min_learning_rate_ratio", 1.5),
        ("decay_fraction", 0.0),
        ("lora_plus_ratio", 0.0),
        ("embedding_learning_rate", 0.0),
        ("layer_decay", 1.1),
        ("learning_rate_ratios", (("*", -1.0),)),
        ("max_grad_value", 0.0),
        ("ema_decay", 1.0),
        ("save_ema", True),
        ("initial_loss_scale", 0.0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"train.{field}"):
        TrainConfig(**{field: value})


def test_every_setting_has_a_documented_meaning():
    for field in dataclasses.fields(TrainConfig):
        described = f" {field.name}" in TrainConfig.__doc__
        assert described, field.name


def test_memory_policies_are_those_of_the_decoder():
    from pronghorn.models import MEMORY_POLICIES
    from pronghorn.training import config

    assert set(config.MEMORY_POLICIES) == set(MEMORY_POLICIES)
