"""One training step as one compiled program.

Micro-batches are scanned inside. With S_k the loss sum, n_k the token count and G_k the gradient sum of micro-batch k:

  n = sum n_k        loss = sum S_k / n        g = sum G_k / n        g <- g min(1, max_norm / |g|)

one division, at the end. The global norm is reported before clipping. Where the loss or the norm is not finite the
update is skipped on the device: weights, moments and schedule stay, and `skipped` counts it. With float16 the loss is
scaled (loss_scale.py), and a step whose gradient overflows is counted apart.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pronghorn.pallas_kernels import launch
from pronghorn.training.config import TrainConfig
from pronghorn.training.flat_tree import FlatLayout, as_tree, is_flat
from pronghorn.training.loss_scale import LossScale
from pronghorn.training.losses import LossFunction, next_token
from pronghorn.training.optimizers import init_optimizer, is_stacked, is_variable
from pronghorn.training.optimizers_8bit import PINNED_HOST, SelfGating, to_host_memory
from pronghorn.training.schedules import LearningRate

# A leaf over this size fills the device by itself, and a second copy of its gradient would be felt.
MOST_FLAT_ELEMENTS = 1 << 22

Metrics = dict[str, jax.Array]
StepFunction = Callable[["TrainState", Any, Any], tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes, and all that a checkpoint holds.

    Attributes:
      step: int32, steps done, skipped ones included. It is the data position too: the next batch is `batch_at(step)`.
      trainable: the parameters that the optimizer updates (fp32 adapters; fp32 masters or the weights themselves), a
        tree, or a `FlatTree` of one.
      opt_state: Optax's state; moments in fp32, or in 8 bits.
      rng: uint32 key data; a step's dropout key is `fold_in(rng, step)`, so it never changes.
      skipped: int32, steps whose update was skipped.
      loss_scale: where the model is in float16, else None.
      ema: average of the trainable parameters, in their structure and dtypes, or None.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    rng: jax.Array
    skipped: jax.Array
    loss_scale: LossScale | None = None
    ema: Any = None


def init_state(
    trainable: Any,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    master_weights: bool = True,
    flat: bool = False,
    loss_scale: float | None = None,
    ema: bool = False,
    paged: bool = False,
) -> TrainState:
    """The state before step 1.

    Args:
      trainable: from `split`.
      optimizer: from `make_optimizer`, or any Optax transformation without a clipping of its own.
      seed: of the dropout stream.
      master_weights: hold 16-bit parameters as fp32; pass `compute_dtypes(trainable)` to `make_train_step` then.
      flat: hold all parameters as one fp32 vector, for optimizers that treat every element alike: much faster where
        there are many small leaves. See `can_be_flat`.
      loss_scale: the first one; None scales no loss.
      ema: keep an average of the parameters; `TrainConfig.ema_decay` says which.
      paged: put the moments into pinned host memory.
    """
    if flat:
        trainable = FlatLayout.of(trainable).flatten(trainable)
    if master_weights:
        trainable = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.float32), trainable)
    opt_state = init_optimizer(optimizer, trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=to_host_memory(opt_state) if paged else opt_state,
        rng=jax.random.key_data(jax.random.key(seed)),
        skipped=jnp.zeros((), jnp.int32),
        loss_scale=None if loss_scale is None else LossScale.start(loss_scale),
        ema=jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trainable) if ema else None,
    )


def compute_dtypes(trainable: Any) -> Any:
    """The dtype of each leaf, in the structure of `trainable`: what fp32 masters are cast to once a step."""
    return jax.tree.map(lambda leaf: jnp.dtype(leaf.dtype), trainable)


def make_train_step(
    graph: Any,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    *,
    schedule: LearningRate | None = None,
    dtypes: Any = None,
    loss_fn: LossFunction | None = None,
    dropout: bool = True,
) -> StepFunction:
    """`step(state, frozen, batch) -> (state, metrics)`, pure: jit it with `donate_argnums=0`.

    Args:
      graph: the static part that `split` returned.
      optimizer: an Optax transformation without clipping.
      config: `max_grad_norm`, `max_grad_value`, `label_smoothing`, `ema_decay`, `memory_policy` ("auto" is
        `choose_plan`'s business, and "keep" here), `mlp_tile_tokens`, `head_tile_rows`, `neftune_alpha`.
      schedule: only to report `learning_rate`; the optimizer applies its own.
      dtypes: from `compute_dtypes`, when the state holds fp32 masters of 16-bit weights.
      loss_fn: `(trainable, frozen, micro_batch, dropout_key) -> (loss sum, {"token_count": ...})`; default next token.
        What it names `.._sum` beside is reported a token, as `..`.
      dropout: give the loss a dropout key.

    Returns:
      The step. `batch` is a pytree of `[micro, batch, seq]` arrays. `metrics`: `loss`, `grad_norm` (before clipping),
      `learning_rate`, fp32, and `balance_loss` of a mixture that adds it; `token_count` of this step, `skipped` so
      far, int32; `applied`, bool; `leaf_grad_norms`, fp32 `[leaves]`, one entry for each layer of a stacked leaf (see
      `guards.leaf_names`). With a loss scale also `loss_scale`, fp32, `overflow` of this step, bool, and `overflowed`
      so far, int32.
    """
    summed_loss = loss_fn or next_token(
        graph,
        label_smoothing=config.label_smoothing,
        memory_policy="keep" if config.memory_policy == "auto" else config.memory_policy,
        mlp_tile_tokens=config.mlp_tile_tokens,
        head_tile_rows=config.head_tile_rows,
        neftune_alpha=config.neftune_alpha,
        router_aux_loss_coef=config.router_aux_loss_coef,
        reduction="sum",
    )

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        parameters = as_tree(state.trainable)
        if dtypes is not None:
            parameters = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), parameters, dtypes)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step) if dropout else None
        loss_scale = None if state.loss_scale is None else state.loss_scale.scale
        loss_sum, count, terms, gradient = _sum_over_micro_batches(
            summed_loss, parameters, frozen, batch, key, loss_scale
        )

        if is_flat(state.trainable):
            gradient = state.trainable.layout.flatten(gradient)
        tokens = jnp.maximum(count, 1).astype(jnp.float32)
        loss = loss_sum / tokens
        # What a gradient is divided by: tokens, and the scale of the loss.
        scale = 1.0 / (tokens if loss_scale is None else tokens * loss_scale)
        squares = leaf_square_sums(gradient)
        grad_norm = jnp.sqrt(jnp.sum(squares)) * scale
        applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (count > 0)
        leaf_grad_norms = jnp.sqrt(squares) * scale

        clipped_norm = grad_norm
        if config.max_grad_value is not None:
            limit = config.max_grad_value
            gradient = jax.tree.map(
                lambda leaf: jnp.clip(leaf.astype(jnp.float32) * scale, -limit, limit), gradient
            )
            clipped_norm, scale = jnp.sqrt(jnp.sum(leaf_square_sums(gradient))), jnp.float32(1.0)
        if config.max_grad_norm is not None:
            scale *= jnp.minimum(1.0, config.max_grad_norm / jnp.maximum(clipped_norm, 1e-30))
        if isinstance(optimizer, SelfGating):
            updates, opt_state = optimizer.update(
                gradient, state.opt_state, state.trainable, applied=applied, gradient_scale=scale
            )
        else:
            gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * scale, gradient)
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)

        # A select, not a branch: it fuses into the update, and the state is donated either way.
        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)

        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "token_count": count,
            "applied": applied,
            "skipped": state.skipped + ~applied,
            "leaf_grad_norms": leaf_grad_norms,
            **{name.removesuffix("_sum"): total / tokens for name, total in terms.items()},
        }
        updates_made = state.step - state.skipped
        new_scale = None
        if state.loss_scale is not None:
            updates_made -= state.loss_scale.overflowed
            overflow = state.loss_scale.overflows(loss, grad_norm)
            new_scale = state.loss_scale.after(overflow, applied)
            metrics |= {"overflow": overflow, "overflowed": new_scale.overflowed, "loss_scale": loss_scale}
            metrics["skipped"] -= overflow
        if schedule is not None:
            metrics["learning_rate"] = schedule(updates_made)
        trainable = keep(trainable, state.trainable)
        ema = state.ema
        if config.ema_decay is not None and ema is not None:
            decay = jnp.where(applied, config.ema_decay, 1.0)
            ema = jax.tree.map(
                lambda average, new: (decay * average + (1 - decay) * new).astype(average.dtype),
                ema,
                trainable,
            )
        new_state = TrainState(
            step=state.step + 1,
            trainable=trainable,
            opt_state=opt_state if isinstance(optimizer, SelfGating) else keep(opt_state, state.opt_state),
            rng=state.rng,
            skipped=metrics["skipped"],
            loss_scale=new_scale,
            ema=ema,
        )
        return new_state, metrics

    return step


def _sum_over_micro_batches(
    loss_fn: LossFunction, parameters: Any, frozen: Any, batch: Any, key: Any, loss_scale: jax.Array | None
):
    """Loss sum (fp32), token count (int32), sums of the loss's terms and gradient sum over the leading axis of `batch`;
    the gradient is of the loss times `loss_scale`.

    More than one micro-batch adds gradients up in fp32; a single one keeps the parameters' dtype and has no scan.
    """

    def scaled_loss(*arguments: Any):
        loss_sum, aux = loss_fn(*arguments)
        scaled = loss_sum if loss_scale is None else loss_sum * loss_scale
        return scaled, (loss_sum, aux)

    value_and_grad = jax.value_and_grad(scaled_loss, has_aux=True)
    micro_batches = jax.tree.leaves(batch)[0].shape[0]

    def one(index: Any, micro_batch: Any):
        micro_key = None if key is None else jax.random.fold_in(key, index)
        (_, (loss_sum, aux)), gradient = value_and_grad(parameters, frozen, micro_batch, micro_key)
        terms = {name: aux[name] for name in aux if name.endswith("_sum") and name != "loss_sum"}
        return loss_sum.astype(jnp.float32), aux["token_count"].astype(jnp.int32), terms, gradient

    if micro_batches == 1:
        return one(0, jax.tree.map(lambda x: x[0], batch))

    def body(total: Any, indexed: Any):
        loss_sum, count, terms, gradient = one(*indexed)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (loss_sum, count, gradient)), terms

    zeros = (
        jnp.zeros((), jnp.float32),
        jnp.zeros((), jnp.int32),
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), parameters),
    )
    (loss_sum, count, gradient), terms = jax.lax.scan(body, zeros, (jnp.arange(micro_batches), batch))
    return loss_sum, count, jax.tree.map(lambda stacked: jnp.sum(stacked, axis=0), terms), gradient


def can_be_flat(trainable: Any) -> bool:
    """Whether parameters may be held as one vector: small fp32 leaves, none of them a stack of layers."""
    return all(
        jnp.dtype(leaf.dtype) == jnp.float32 and not is_stacked(leaf) and leaf.size <= MOST_FLAT_ELEMENTS
        for leaf in jax.tree.leaves(trainable, is_leaf=is_variable)
    )


def leaf_square_sums(tree: Any) -> jax.Array:
    """Sum of squares of each leaf in fp32, one entry for each layer of a stacked leaf: `[leaves]`."""
    if is_flat(tree):
        return tree.layout.square_sums(tree.vector)
    sums = []
    for leaf in jax.tree.leaves(tree, is_leaf=is_variable):
        array = leaf[...] if is_variable(leaf) else leaf
        axes = tuple(range(1, array.ndim)) if is_stacked(leaf) else None
        sums.append(jnp.atleast_1d(jnp.sum(jnp.square(array.astype(jnp.float32)), axis=axes)))
    return jnp.concatenate(sums)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step compiled ahead of time, called on flat lists of arrays.

    Flat lists because a tree of NNX variables is flattened in Python, which at several hundred leaves costs more per
    step than the dispatch itself.
    """

    executable: Any
    state_structure: Any
    seconds: float

    def __call__(self, state_leaves: list[Any], frozen_leaves: list[Any], batch: Any):
        """(state leaves, which are donated; frozen leaves; batch) -> (state leaves, metrics)."""
        return self.executable(state_leaves, frozen_leaves, batch)

    def state(self, state_leaves: list[Any]) -> TrainState:
        """The state that the leaves are of."""
        return jax.tree.unflatten(self.state_structure, state_leaves)


def compile_step(
    step: StepFunction,
    state: Any,
    frozen: Any,
    batch: Any,
    *,
    deterministic: bool = False,
    memory_policy: str = "keep",
    compiler_options: dict[str, str | bool] | None = None,
) -> CompiledStep:
    """Lower and compile `step` for arrays, or `jax.ShapeDtypeStruct`s, of these shapes; nothing is run.

    `memory_policy` is the one that the step was made with: XLA schedules transfers to the host by options.
    `compiler_options` are XLA's, by name, in addition to those that pronghorn sets, or in their place.
    """
    state_leaves, state_structure = jax.tree.flatten(state)
    frozen_leaves, frozen_structure = jax.tree.flatten(frozen)

    def flat_step(state_leaves: list[Any], frozen_leaves: list[Any], batch: Any):
        new_state, metrics = step(
            jax.tree.unflatten(state_structure, state_leaves),
            jax.tree.unflatten(frozen_structure, frozen_leaves),
            batch,
        )
        return jax.tree.leaves(new_state), metrics

    start = time.perf_counter()
    lowered = jax.jit(flat_step, donate_argnums=0).lower(
        *jax.tree.map(abstract, (state_leaves, frozen_leaves, batch))
    )
    executable = lowered.compile(
        compiler_options={
            **(_compiler_options(deterministic, memory_policy, flat=_holds_flat(state)) or {}),
            **(compiler_options or {}),
        }
    )
    return CompiledStep(executable, state_structure, time.perf_counter() - start)


def _holds_flat(state: Any) -> bool:
    return any(map(is_flat, jax.tree.leaves(state, is_leaf=is_flat)))


# What XLA puts into graphs of launches by default.
GRAPH_COMMANDS = ("FUSION", "CUBLAS", "CUBLASLT", "CUSTOM_CALL", "CUDNN", "DYNAMIC_SLICE_FUSION")


def _compiler_options(
    deterministic: bool, memory_policy: str = "keep", *, flat: bool = False
) -> dict[str, str | bool] | None:
    """XLA's options for a step; their names are the same in jax 0.10 to 0.12."""
    if not launch.on_gpu():
        return None
    # Products go to cuBLAS, which adds the adapters' rank-r products in its epilogue; XLA's own Triton products would
    # leave the sums to passes of their own (8B, 4,096 tokens on an H200: 279 -> 274 ms) and compile for longer.
    # Nor are products that share an input merged: XLA would copy their weights side by side first, 48 MB a layer for
    # q, k and v of the same model, and could add nothing in the merged product's epilogue.
    options: dict[str, str | bool] = {
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_dot_merger_threshold_mb": "0",
    }
    if flat:
        # A product of a slice would read it out of the one vector that all adapters lie in, and is then none of those
        # that XLA tries cuBLAS's algorithms for; sliced first, in few passes over 5 MB, all are. Where layers are
        # stacked the slices are of weights, and nothing is flat.
        options["xla_gpu_enable_dynamic_slice_fusion"] = False
        if not memory_policy.startswith("offload"):
            # The head's loop over tiles, and the choice in front of it, as parts of one graph of launches: the host
            # would wait for the device, to read which it is, and start a graph a tile (0.2 to 0.4 ms a step).
            options["xla_gpu_enable_command_buffer"] = ",".join((*GRAPH_COMMANDS, "CONDITIONAL", "WHILE"))
    if memory_policy.startswith("offload"):
        # By default two transfers are on their way at a time, and the device waits for one before it starts a third.
        options["xla_gpu_experimental_parallel_async_compute_limit"] = "16"
    if deterministic:
        options["xla_gpu_deterministic_ops"] = True
    return options


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The leaf's shape and dtype, and where it lives if that is not the default device's own memory."""
    sharding = getattr(leaf, "sharding", None)
    if getattr(sharding, "memory_kind", None) != PINNED_HOST:
        wanted = launch.target()
        sharding = None if wanted is None else jax.sharding.SingleDeviceSharding(wanted.device)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
