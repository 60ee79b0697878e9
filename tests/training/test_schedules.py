import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.training import TrainConfig, make_schedule


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedule_is_that_of_transformers(schedule, warmup):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=11)
    ours = make_schedule(TrainConfig(learning_rate=2e-3, schedule=schedule, warmup_steps=warmup), 11)
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
