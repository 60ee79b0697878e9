"""The compiled step of a run and what it takes of memory, under the memory policy that fits."""

from typing import Any

from pronghorn.training import memory_plan
from pronghorn.training.config import TrainConfig
from pronghorn.training.losses import step_batch
from pronghorn.training.step import compile_step


def compile_run(
    trainer: Any, graph: Any, trainable: Any, frozen: Any
) -> tuple[memory_plan.MemoryPlan, Any, Any]:
    """Compile a trainer's step ahead of time for batches of the first one's shape.

    Args:
      trainer: a `Trainer`.
      graph, trainable, frozen: its model, as `lora.split` cuts it.

    Returns:
      The plan read from the compiled program, what `memory_plan.prepare_step` made, and what `compile_step` made.
    """
    model, batch = trainer.model, trainer.loader.batch_at(0)
    shape = batch["input_ids"].shape
    evaluation = trainer._compiled_evaluation(trainable, frozen)

    def build(config: TrainConfig) -> tuple[memory_plan.MemoryPlan, Any]:
        prepared = memory_plan.prepare_step(graph, trainable, config, trainer.total_steps, dtype=model.dtype)
        compiled = compile_step(
            prepared.step,
            prepared.state,
            frozen,
            step_batch(batch, trainer.data.packing),
            deterministic=config.deterministic,
            memory_policy=config.memory_policy,
        )
        plan = memory_plan.plan_from_compiled(
            model.config,
            compiled.executable,
            prepared.state,
            trainable,
            frozen,
            shape,
            memory_policy=config.memory_policy,
            compile_seconds=compiled.seconds,
            evaluation=evaluation,
        )
        return plan, (prepared, compiled)

    plan, (prepared, compiled) = memory_plan.build_with_policy(
        model.config, trainer.config, build, trainable, frozen, shape, dtype=model.dtype
    )
    return plan, prepared, compiled
