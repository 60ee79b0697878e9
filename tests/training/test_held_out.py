import json
import math

import pytest

from pronghorn.errors import InputError
from pronghorn.training import TrainConfig
from pronghorn.training.held_out import HeldOutHistory
from tests.training.resumable import make_trainer
from tests.training.small import random_documents, tokenized


def test_patience_counts_evaluations_without_a_new_best():
    history = HeldOutHistory(patience=2, delta=0.1)
    assert [history.see(step, loss) for step, loss in ((1, 3.0), (2, 2.95), (3, 2.8), (4, math.nan))] == [
        True,
        False,
        True,
        False,
    ]
    assert (history.best_step, history.best_loss, history.stale, history.exhausted) == (3, 2.8, 1, False)
    resumed = HeldOutHistory(patience=2, delta=0.1)
    resumed.restore(json.loads(json.dumps(history.metadata())))
    assert resumed == history and not resumed.see(5, 2.75) and resumed.exhausted


def evaluated(folder, **changes):
    """A run whose held-out loss gets worse from some step on, since its held-out rows are of other tokens."""
    settings = {"learning_rate": 0.3, "warmup_steps": 0, "eval_every": 1, "save_every": None} | changes
    return make_trainer(folder, eval_dataset=tokenized(random_documents(6, seed=8)), **settings)


def test_a_run_stops_early_and_ends_with_its_best_weights(tmp_path):
    trainer = evaluated(tmp_path, early_stopping=2, best_at_end=True)
    result = trainer.train()
    losses = {evaluation.step: evaluation.loss for evaluation in result.evaluations}
    best = min(losses, key=losses.get)
    assert result.stopped_early and not result.interrupted
    assert (result.best_step, result.steps) == (best, best + 2) and result.steps < 7
    assert trainer.evaluate().loss == losses[best] < losses[result.steps]
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert f"step_{best:08d}" in kept


def test_best_checkpoints_need_evaluations():
    with pytest.raises(InputError, match=r"train\.early_stopping: 3 .* train\.eval_every"):
        TrainConfig(early_stopping=3)
    with pytest.raises(InputError, match=r"train\.keep_every.*save_every"):
        TrainConfig(keep_every=3, save_every=None)
    with pytest.raises(InputError, match="held-out rows, and there are none"):
        make_trainer("unused", keep_best=True, eval_every=2)
