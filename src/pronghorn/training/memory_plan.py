"""Device and host memory of a run, read from the compiled step before anything is allocated.

  device peak = arguments + outputs - aliased + temporaries + program code

Arguments are the frozen weights, the state and the batch; the state is donated, so its outputs alias its arguments.
XLA's temporaries are one allocation, made when the step starts, so the sum is the peak and not an upper bound.
Evaluation runs beside the resident state: its own temporaries count where they are larger.
"""

import dataclasses
import resource
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig, add_lora, split
from pronghorn.models.config import DecoderConfig
from pronghorn.models.decoder import Decoder, LayerLayout
from pronghorn.models.families import family_named
from pronghorn.models.memory_policies import POLICIES
from pronghorn.models.parameters import named_parameters
from pronghorn.pallas_kernels import launch
from pronghorn.quantization.quantize_model import QuantizationConfig, choose, empty_like, make_abstract
from pronghorn.training.checkpoints import state_bytes
from pronghorn.training.config import MEMORY_POLICIES, TrainConfig
from pronghorn.training.flat_tree import is_flat
from pronghorn.training.flops import count_flops, has_shape
from pronghorn.training.losses import evaluation_sums, step_batch
from pronghorn.training.optimizers import make_optimizer, treats_all_alike
from pronghorn.training.optimizers_8bit import pages, to_host_memory
from pronghorn.training.policy_choice import (
    PolicyCost,
    cost_lines,
    device_kind,
    device_limit,
    estimate_policies,
    first_that_fits,
    pinned_limit,
)
from pronghorn.training.schedules import make_schedule
from pronghorn.training.step import (
    StepFunction,
    TrainState,
    abstract,
    can_be_flat,
    compile_step,
    compute_dtypes,
    init_state,
    make_train_step,
)

Built = TypeVar("Built")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes, unless said otherwise.

    Attributes:
      peak_device_bytes: the most the device holds during a step or an evaluation.
      peak_host_bytes: this process at its largest so far, and on top of it pinned memory and the larger of a
        checkpoint's copy of the state and the largest weight on its way to the device. Where the device is the CPU,
        device memory is in it too.
      arguments, outputs, aliased, temporaries, program: the terms of the device peak.
      evaluation_temporaries: the evaluation's own, 0 when there is none.
      pinned_host: host memory that the program itself uses (policies that offload, paged_optimizer).
      checkpoint: size of a checkpoint on disk and as a copy on the host.
      flops_per_step: of a full batch without padding, whose rows are one document each.
      tokens_per_step: positions of a batch, padding included.
      trained_parameters, frozen_parameters: elements.
      memory_policy: that of the step.
      compile_seconds: what reading these numbers took; the training run pays it too.
      policies: what each memory policy costs, the fastest first.
    """

    peak_device_bytes: int
    peak_host_bytes: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    program: int
    evaluation_temporaries: int
    pinned_host: int
    checkpoint: int
    flops_per_step: float
    tokens_per_step: int
    trained_parameters: int
    frozen_parameters: int
    memory_policy: str
    compile_seconds: float
    policies: tuple[PolicyCost, ...] = ()

    def __str__(self) -> str:
        return "\n".join(
            (
                f"parameters     {self.trained_parameters:,} trained, {self.frozen_parameters:,} frozen",
                *self.memory_lines(),
                f"step           {self.tokens_per_step:,} positions, {self.flops_per_step:.3g} FLOP, memory policy "
                f"{self.memory_policy}, compiled in {self.compile_seconds:.1f} s",
            )
        )

    def memory_lines(self) -> list[str]:
        """Device and host memory, a line each, and the memory policies where one was chosen."""
        rest = self.outputs - self.aliased + self.program
        return [
            f"device memory  {show_bytes(self.peak_device_bytes)} peak: weights, state and batch "
            f"{show_bytes(self.arguments)}, temporaries {show_bytes(self.temporaries)}, other {show_bytes(rest)}",
            f"host memory    {show_bytes(self.peak_host_bytes)} peak: pinned {show_bytes(self.pinned_host)}, a "
            f"checkpoint's copy {show_bytes(self.checkpoint)}, the process",
            *(cost_lines(self.policies, self.memory_policy) if self.policies else ()),
        ]


def show_bytes(count: int) -> str:
    """Such as "1.23 GiB" or "45.6 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def plan_memory(
    config: DecoderConfig,
    lora_config: LoRAConfig | None,
    train_config: TrainConfig,
    dtype: Any = jnp.bfloat16,
    *,
    max_length: int,
    layers: LayerLayout = "unrolled",
    packing: bool = True,
    quantization: QuantizationConfig | None = None,
    evaluate: bool = False,
    memory_limit: int | None = None,
) -> MemoryPlan:
    """Compile the training step on shapes alone, for the default device, and read its memory.

    Args:
      config: the architecture.
      lora_config: the adapters, or None for full fine-tuning.
      train_config: batch, accumulation, memory policy, optimizer.
      dtype: of the weights and products.
      max_length: tokens in a row.
      layers: "unrolled" or "scanned".
      packing: whether a row holds several documents.
      quantization: of the frozen linear weights, or None.
      evaluate: whether the run has held-out rows.
      memory_limit: bytes of device memory for memory_policy "auto"; None asks the device.
    """
    model = Decoder.abstract(config, dtype=dtype, layers=layers)
    if quantization is not None:
        refuse_full_fine_tuning(lora_config is not None)
        parameters = named_parameters(model)
        names = family_named(config.family).tensor_names(config)
        chosen = choose(parameters, names, quantization, strict=False)
        make_abstract(
            parameters, {name: empty_like(parameters[name].shape, dtype, how) for name, how in chosen.items()}
        )
    if lora_config is not None:
        model = add_lora(model, lora_config)
    graph, trainable, frozen = split(model)
    total_steps = train_config.max_steps or 1000 + train_config.warmup_steps
    shape = (train_config.gradient_accumulation, train_config.batch_size, max_length)
    batch = abstract_batch(shape, packing)
    evaluation = None
    if evaluate:
        rows = train_config.eval_batch_size or train_config.batch_size
        evaluation = compile_evaluation(
            graph, trainable, frozen, abstract_batch((1, rows, max_length), packing)
        )

    def build(train_config: TrainConfig) -> tuple[MemoryPlan, None]:
        prepared = prepare_step(graph, trainable, train_config, total_steps, dtype=dtype)
        compiled = compile_step(
            prepared.step,
            prepared.state,
            frozen,
            batch,
            deterministic=train_config.deterministic,
            memory_policy=train_config.memory_policy,
        )
        plan = plan_from_compiled(
            config,
            compiled.executable,
            prepared.state,
            trainable,
            frozen,
            shape,
            memory_policy=train_config.memory_policy,
            compile_seconds=compiled.seconds,
            evaluation=evaluation,
        )
        return plan, None

    return build_with_policy(
        config, train_config, build, trainable, frozen, shape, dtype=dtype, memory_limit=memory_limit
    )[0]


def build_with_policy(
    config: DecoderConfig,
    train_config: TrainConfig,
    build: Callable[[TrainConfig], tuple[MemoryPlan, Built]],
    trainable: Any,
    frozen: Any,
    shape: tuple[int, int, int],
    *,
    dtype: Any,
    memory_limit: int | None = None,
) -> tuple[MemoryPlan, Built]:
    """What `build` returns for the memory policy asked for, or, with "auto", for the first that fits the device.

    Args:
      build: compiles the step of a configuration whose policy is no longer "auto".
      shape: (micro-batches, rows, tokens) of a batch.
      dtype: of activations.
      memory_limit: bytes; None asks the device.
    """
    if train_config.memory_policy != "auto":
        return build(train_config)
    micro_batches, rows, length = shape
    costs = estimate_policies(
        config,
        micro_batches=micro_batches,
        rows=rows,
        length=length,
        itemsize=jnp.dtype(dtype).itemsize,
        device_kind=device_kind(),
    )
    found, costs = first_that_fits(
        costs,
        lambda policy: build(dataclasses.replace(train_config, memory_policy=policy)),  # type: ignore[arg-type]
        lambda built: (built[0].peak_device_bytes, built[0].pinned_host),
        resident_bytes=sum(state_bytes(leaf) for leaf in jax.tree.leaves((trainable, frozen))),
        limit=memory_limit or device_limit(),
        host_limit=pinned_limit(),
    )
    return dataclasses.replace(found[0], policies=tuple(costs)), found[1]


def refuse_full_fine_tuning(adapted: bool) -> None:
    """A quantised model is trained through adapters alone.

    Raises:
      InputError: there are none.
    """
    if not adapted:
        raise InputError(
            "quantization: quantised weights cannot be trained; give lora, or leave the quantization out."
        )


def plan_policies(*arguments: Any, **options: Any) -> dict[str, MemoryPlan]:
    """`plan_memory` for every memory policy, compiled one after another; the arguments are its own.

    A policy that this device cannot compile (offloading needs a pinned host memory space) is left out.
    """
    config, lora_config, train_config, *rest = arguments
    plans = {}
    for policy in MEMORY_POLICIES:
        changed = dataclasses.replace(train_config, memory_policy=policy)
        try:
            plans[policy] = plan_memory(config, lora_config, changed, *rest, **options)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError):
            if not POLICIES[policy].offloaded:
                raise
    return plans


def plan_from_compiled(
    config: DecoderConfig,
    executable: Any,
    state: TrainState,
    trainable: Any,
    frozen: Any,
    shape: tuple[int, int, int],
    *,
    memory_policy: str,
    compile_seconds: float,
    evaluation: Any = None,
) -> MemoryPlan:
    """The plan of a step that is compiled already; trees hold arrays or `jax.ShapeDtypeStruct`s.

    Args:
      shape: (micro-batches, rows, tokens) of a batch.
      evaluation: the compiled evaluation, or None.
    """
    memory = executable.memory_analysis()
    step_peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    evaluation_temporaries = 0
    if evaluation is not None:
        evaluation_memory = evaluation.memory_analysis()
        evaluation_temporaries = (
            evaluation_memory.temp_size_in_bytes
            + evaluation_memory.generated_code_size_in_bytes
            + _cast_bytes(state.trainable, trainable)
        )
    peak_device = max(step_peak, memory.argument_size_in_bytes + evaluation_temporaries)
    pinned = (
        memory.host_argument_size_in_bytes
        + memory.host_output_size_in_bytes
        - memory.host_alias_size_in_bytes
        + memory.host_temp_size_in_bytes
    )
    checkpoint = state_bytes(state)
    # Weights are read one array at a time; a checkpoint is copied whole.
    staged = max(checkpoint, *(state_bytes(leaf) for leaf in jax.tree.leaves((trainable, frozen))))
    on_cpu = not launch.on_gpu()
    micro, rows, tokens = shape
    positions = np.broadcast_to(np.arange(tokens), shape)
    flops = count_flops(config, trainable, frozen)
    return MemoryPlan(
        peak_device_bytes=peak_device,
        peak_host_bytes=_process_peak() + pinned + staged + (peak_device if on_cpu else 0),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        program=memory.generated_code_size_in_bytes,
        evaluation_temporaries=evaluation_temporaries,
        pinned_host=pinned,
        checkpoint=checkpoint,
        flops_per_step=flops.of_batch(positions, np.ones(shape, bool)),
        tokens_per_step=micro * rows * tokens,
        trained_parameters=count_parameters(trainable),
        frozen_parameters=count_parameters(frozen),
        memory_policy=memory_policy,
        compile_seconds=compile_seconds,
    )


@dataclasses.dataclass(frozen=True)
class PreparedStep:
    """What a run with some configuration compiles: the step, its optimizer, its start state as shapes."""

    step: StepFunction
    optimizer: optax.GradientTransformation
    state: TrainState


def prepare_step(
    graph: Any, trainable: Any, train_config: TrainConfig, total_steps: int, *, dtype: Any = jnp.bfloat16
) -> PreparedStep:
    """The step of a split model, the same for the plan and for the run; `trainable` holds arrays or shapes, `dtype` is
    the model's."""
    optimizer = make_optimizer(train_config, total_steps)
    step = make_train_step(
        graph,
        optimizer,
        train_config,
        schedule=make_schedule(train_config, total_steps),
        dtypes=compute_dtypes(trainable),
    )
    state = jax.eval_shape(
        lambda leaves: start_state(leaves, optimizer, train_config, dtype=dtype, place=False), trainable
    )
    if pages(train_config):
        state = dataclasses.replace(state, opt_state=to_host_memory(state.opt_state))
    return PreparedStep(step, optimizer, state)


def start_state(
    trainable: Any,
    optimizer: optax.GradientTransformation,
    train_config: TrainConfig,
    *,
    dtype: Any = jnp.bfloat16,
    place: bool = True,
) -> TrainState:
    """The state before step 1, as a run with this configuration makes it of a model in `dtype`; `place` moves paged
    moments to the host's memory."""
    return init_state(
        trainable,
        optimizer,
        seed=train_config.seed,
        master_weights=train_config.master_weights,
        flat=can_be_flat(trainable) and treats_all_alike(train_config, trainable),
        loss_scale=train_config.initial_loss_scale if jnp.dtype(dtype) == jnp.float16 else None,
        ema=train_config.ema_decay is not None,
        paged=place and pages(train_config),
    )


def abstract_batch(shape: tuple[int, ...], packing: bool) -> dict[str, Any]:
    """The shapes of what a step takes of a batch; see `losses.step_batch`."""
    names = ("input_ids", "labels", "segment_ids", "positions")
    return step_batch({name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}, packing)


def compile_evaluation(graph: Any, trainable: Any, frozen: Any, batch: Any) -> Any:
    """The compiled forward pass of `[1, rows, tokens]` batches: (trainable, frozen, batch) -> (loss sum, count)."""
    sums = evaluation_sums(graph)

    def evaluate(trainable: Any, frozen: Any, batch: Any):
        return sums(trainable, frozen, jax.tree.map(lambda x: x[0], batch))

    return jax.jit(evaluate).lower(*jax.tree.map(abstract, (trainable, frozen, batch))).compile()


def count_parameters(tree: Any) -> int:
    """Elements of all leaves; a quantised weight counts as the matrix it stands for."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree, is_leaf=has_shape))


def _cast_bytes(masters: Any, trainable: Any) -> int:
    """Bytes of the 16-bit weights that evaluation makes from fp32 masters."""
    if is_flat(masters):
        return 0  # fp32 leaves, cut from the vector
    pairs = zip(jax.tree.leaves(masters), jax.tree.leaves(trainable), strict=True)
    return sum(state_bytes(leaf) for master, leaf in pairs if master.dtype != leaf.dtype)


def _process_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
