"""Training: losses, the compiled step, optimisers, schedules, checkpoints, the loop."""

from pronghorn.training import losses
from pronghorn.training.config import TrainConfig
from pronghorn.training.memory_plan import MemoryPlan, plan_memory, plan_policies
from pronghorn.training.optimizers import make_optimizer
from pronghorn.training.result import Evaluation, TrainResult
from pronghorn.training.schedules import make_schedule
from pronghorn.training.step import TrainState, init_state, make_train_step
from pronghorn.training.trainer import Trainer

__all__ = [
    "Evaluation",
    "MemoryPlan",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "Trainer",
    "init_state",
    "losses",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "plan_memory",
    "plan_policies",
]
