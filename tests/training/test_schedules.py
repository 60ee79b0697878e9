import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.training import TrainConfig, make_schedule


def transformers_schedule(optimizer, schedule, warmup, steps):
    import transformers.optimization as reference

    if schedule == "wsd":
        return reference.get_wsd_schedule(
            optimizer,
            num_warmup_steps=warmup,
            num_decay_steps=3,
            num_training_steps=steps,
            decay_type="linear",
            min_lr_ratio=0.0 if warmup else 0.2,  # theirs warms up from it, ours from 0
        )
    if schedule == "polynomial":
        return reference.get_polynomial_decay_schedule_with_warmup(
            optimizer, warmup, steps, lr_end=0.2 * 2e-3, power=3.0
        )
    if schedule == "inverse_sqrt":
        return reference.get_inverse_sqrt_schedule(optimizer, warmup)
    name = {"constant": "constant_with_warmup", "cosine with minimum": "cosine_with_min_lr"}.get(
        schedule, schedule
    )
    options = {"min_lr_rate": 0.2} if name == "cosine_with_min_lr" else None
    return reference.get_scheduler(
        name,
        optimizer=optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=options,
    )


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    "schedule",
    ["cosine", "cosine with minimum", "linear", "constant", "wsd", "polynomial", "inverse_sqrt"],
)
def test_schedule_is_that_of_transformers(schedule, warmup):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    reference = transformers_schedule(optimizer, schedule, warmup, 11)
    lowest = {"cosine with minimum": 0.2, "polynomial": 0.2, "wsd": 0.0 if warmup else 0.2}.get(schedule, 0.0)
    ours = make_schedule(
        TrainConfig(
            learning_rate=2e-3,
            schedule=schedule.split()[0],
            warmup_steps=warmup,
            schedule_power=3.0,
            decay_fraction=3 / 11,
            min_learning_rate_ratio=lowest,
        ),
        11,
    )
    for count in range(12):
        np.testing.assert_allclose(float(ours(count)), reference.get_last_lr()[0], rtol=1e-5, atol=1e-10)
        optimizer.step()
        reference.step()


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(InputError, match=r"warmup_steps.*10"):
        TrainConfig(max_steps=10, warmup_steps=10)
    with pytest.raises(InputError, match="the run has 4 steps"):
        TrainConfig(epochs=2, warmup_steps=5).total_steps(2)


def test_epochs_round_up_to_whole_steps():
    assert TrainConfig(epochs=1.5).total_steps(7) == 11
    assert TrainConfig(epochs=3.0).total_steps(7) == 21
    assert TrainConfig(max_steps=5, epochs=9.0).total_steps(7) == 5
