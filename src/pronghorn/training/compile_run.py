"""The compiled step of a run and what it takes of memory, under the memory policy that fits.

Compiled from shapes alone, before weights are on the device, the trials of products that XLA makes meanwhile do not add
to the run's peak. A program made so is only ever used for what it was made for: `program_key` compares.
"""

import dataclasses
from typing import Any

import jax

from pronghorn.compile_cache import keep_programs_in
from pronghorn.errors import InputError
from pronghorn.lora import shallow_copy, split
from pronghorn.pallas_kernels import launch
from pronghorn.training import memory_plan
from pronghorn.training.config import TrainConfig
from pronghorn.training.losses import step_batch
from pronghorn.training.step import CompiledStep, abstract, compile_step

# Settings of jax, or contexts of the same names, that a program is traced under.
_OF_JAX = ("jax_default_matmul_precision", "jax_enable_x64", "jax_default_device")


@dataclasses.dataclass(frozen=True)
class CompiledRun:
    """What a run needs of its compiled step.

    Attributes:
      key: from `program_key`.
      plan: read from the compiled program.
      prepared, compiled: what `memory_plan.prepare_step` and `compile_step` made.
    """

    key: Any
    plan: memory_plan.MemoryPlan
    prepared: memory_plan.PreparedStep
    compiled: CompiledStep


def compile_run(trainer: Any) -> CompiledRun:
    """Compile a trainer's step ahead of time for batches of the first one's shape.

    Args:
      trainer: a `Trainer`; its model has arrays or `jax.ShapeDtypeStruct`s.
    """
    if trainer.config.compile_cache is not None:
        keep_programs_in(trainer.config.compile_cache)
    model, batch = trainer.model, trainer.loader.batch_at(0)
    graph, trainable, frozen = split(model)
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
    return CompiledRun(program_key(trainer), plan, prepared, compiled)


def program_key(trainer: Any) -> tuple[Any, ...]:
    """All that the programs of a trainer depend on; those of equal keys are the same.

    Where a model came from is no part of it, nor is the fingerprint of its weights: an abstract model has none.
    """
    model = shallow_copy(trainer.model)
    model.source = None
    for name in ("adapter", "new_tokens"):
        info = getattr(model, name)
        if info is not None:
            setattr(model, name, dataclasses.replace(info, base_hash=""))
    graph, *parts = split(model)
    leaves, structure = jax.tree.flatten(
        (parts, step_batch(trainer.loader.batch_at(0), trainer.data.packing))
    )
    return (
        graph,
        structure,
        tuple(map(abstract, leaves)),
        trainer.config,
        trainer.total_steps,
        (trainer.data.packing, trainer.data.max_length),
        trainer._evaluates,
        tuple(getattr(jax.config, name) for name in _OF_JAX),
        launch.choices(),
    )


def require_weights(trainable: Any, frozen: Any) -> None:
    """Refuse to run a model of shapes.

    Raises:
      InputError: a leaf is no array.
    """
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((trainable, frozen))):
        raise InputError(
            "model: has shapes and no weights, which can be compiled for and not run; set the trainer's model to one "
            "with weights."
        )
