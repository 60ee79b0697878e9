"""AdamW and Lion with moments in 8 bits, or in pinned host memory, as Optax transformations.

The arithmetic is that of `pallas_kernels.adam_8bit` and `lion_8bit`: a moment is a code a value and an fp32 maximum a
block of 256, in 2.03 bytes a parameter for Adam's two moments and 1.02 for Lion's one, instead of 8 and 4. Leaves of
fewer than 4,096 elements (of one layer, where layers are stacked) keep fp32 moments, as in bitsandbytes.

These transformations gate themselves: their update takes `applied`, and where it is false no bit of the state changes.
So a training step that skips an update need not select between two copies of the moments, which the kernels change in
place. `gradient_scale` is applied as the gradient is read.

Paged: the moments live in pinned host memory. Inside the compiled update each leaf's come to the device, change, and
go back, in the order XLA's scheduler finds, which holds those of a few leaves at a time on the device.

Sources: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, https://arxiv.org/abs/2110.02861; Chen et
al., Symbolic Discovery of Optimization Algorithms, 2023, https://arxiv.org/abs/2302.06675.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.adam_8bit import adam_8bit, zero_moment
from pronghorn.pallas_kernels.blockwise_8bit import Blockwise
from pronghorn.pallas_kernels.lion_8bit import lion_8bit
from pronghorn.training.config import TrainConfig
from pronghorn.training.parameter_names import is_stacked, is_variable

MIN_8BIT_ELEMENTS = 4096
PINNED_HOST = "pinned_host"

Bits = Literal[8, 32]


class SelfGating(optax.GradientTransformationExtraArgs):
    """A transformation whose `update(gradient, state, params, *, applied=True, gradient_scale=1.0)` leaves its state
    as it is, bit for bit, where the bool scalar `applied` is false; the returned update means nothing there."""


class MomentState(NamedTuple):
    """State of `scale_by_moments`.

    Attributes:
      steps: int32 scalar, those that were applied.
      first: of each parameter a `Blockwise`, or an fp32 array where it is small or 32 bits were asked for.
      second: the same; None for Lion, which has one moment.
    """

    steps: jax.Array
    first: Any
    second: Any


def scale_by_adam_8bit(
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, *, bits: Bits = 8, paged: bool = False
) -> SelfGating:
    """Adam's direction, m / (sqrt(v) + eps) with both corrected for their start at zero.

    Example:
      >>> optimizer = optax.chain(scale_by_adam_8bit(), optax.scale_by_learning_rate(1e-4))

    Args:
      beta1, beta2, eps: as in `optax.scale_by_adam`.
      bits: of the moments.
      paged: keep them in pinned host memory; place the state that `init` returns with `to_host_memory`.
    """

    def step(gradient, first, second, count, scale, applied):
        if isinstance(first, Blockwise):
            return adam_8bit(
                *(gradient, first, second, count),
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                gradient_scale=scale,
                applied=applied,
                in_place=not paged,
            )
        g, t = gradient.astype(jnp.float32) * scale, count.astype(jnp.float32)
        m, v = beta1 * first + (1 - beta1) * g, beta2 * second + (1 - beta2) * g * g
        update = (m / (1 - beta1**t)) / (jnp.sqrt(v / (1 - beta2**t)) + eps)
        return update, jnp.where(applied, m, first), jnp.where(applied, v, second)

    return _scale_by_moments(step, bits=bits, paged=paged, two=True)


def scale_by_lion_8bit(
    beta1: float = 0.9, beta2: float = 0.99, *, bits: Bits = 8, paged: bool = False
) -> SelfGating:
    """Lion's direction, sign(b1 m + (1 - b1) g); arguments as in `scale_by_adam_8bit`."""

    def step(gradient, first, second, count, scale, applied):
        del second, count
        if isinstance(first, Blockwise):
            options = {"gradient_scale": scale, "applied": applied, "in_place": not paged}
            return *lion_8bit(gradient, first, beta1=beta1, beta2=beta2, **options), None
        g = gradient.astype(jnp.float32) * scale
        m = beta2 * first + (1 - beta2) * g
        return jnp.sign(beta1 * first + (1 - beta1) * g), jnp.where(applied, m, first), None

    return _scale_by_moments(step, bits=bits, paged=paged, two=False)


def _scale_by_moments(step: Callable[..., Any], *, bits: Bits, paged: bool, two: bool) -> SelfGating:
    def init(params: Any) -> MomentState:
        leaves, structure = jax.tree.flatten(params)
        large = [size >= MIN_8BIT_ELEMENTS for size in layer_sizes(params)]

        def moments(signed: bool) -> Any:
            return jax.tree.unflatten(
                structure,
                [
                    zero_moment(leaf.shape, signed=signed)
                    if bits == 8 and is_large
                    else jnp.zeros(leaf.shape, jnp.float32)
                    for leaf, is_large in zip(leaves, large, strict=True)
                ],
            )

        return MomentState(jnp.zeros((), jnp.int32), moments(True), moments(False) if two else None)

    def update(gradients, state, params=None, *, applied=True, gradient_scale=1.0, **extra):
        del params, extra
        leaves, structure = jax.tree.flatten(gradients)
        moments = [
            jax.tree.leaves(tree, is_leaf=_is_moment) for tree in (state.first, state.second)[: 1 + two]
        ]
        large = [paged and size >= MIN_8BIT_ELEMENTS for size in layer_sizes(gradients)]
        # Of a step that is not applied the count of before would make the corrections of step 0 infinite.
        count = state.steps + 1
        updates: list[Any] = []
        new_moments: list[Any] = []
        for index, gradient in enumerate(leaves):
            old = [moment[index] for moment in moments]
            if large[index]:
                old = jax.device_put(old, jax.memory.Space.Device)
            direction, *new = step(gradient, *old, *[None] * (2 - len(old)), count, gradient_scale, applied)
            new = new[: 1 + two]
            new_moments.append(jax.device_put(new, jax.memory.Space.Host) if large[index] else new)
            updates.append(direction)
        first, *second = [jax.tree.unflatten(structure, column) for column in zip(*new_moments, strict=True)]
        new_state = MomentState(jnp.where(applied, count, state.steps), first, second[0] if two else None)
        return jax.tree.unflatten(structure, updates), new_state

    return SelfGating(init, update)


def gated_chain(first: SelfGating, *rest: optax.GradientTransformation) -> SelfGating:
    """`optax.chain` of a self-gating transformation and others that hold no state but scalars (schedules, decay)."""
    chain = optax.chain(first, *rest)

    def update(gradients, state, params=None, *, applied=True, **extra):
        updates, new = chain.update(gradients, state, params, applied=applied, **extra)
        scalars = [
            jax.tree.map(lambda n, o: jnp.where(applied, n, o), *pair)
            for pair in zip(new[1:], state[1:], strict=True)
        ]
        return updates, (new[0], *scalars)

    return SelfGating(chain.init, update)


def layer_sizes(tree: Any) -> list[int]:
    """Elements of each leaf, of one layer of it where layers are stacked."""
    leaves = jax.tree.leaves(tree, is_leaf=is_variable)
    return [math.prod(leaf.shape[1:] if is_stacked(leaf) else leaf.shape) for leaf in leaves]


def pages(config: TrainConfig) -> bool:
    """Whether moments are in host memory: asked for, and the host's memory is not the device's."""
    return config.paged_optimizer and launch.on_gpu()


def host_sharding(device: Any = None) -> jax.sharding.SingleDeviceSharding:
    """Pinned memory of the device's host."""
    if device is None:
        wanted = launch.target()
        device = jax.local_devices()[0] if wanted is None else wanted.device
    return jax.sharding.SingleDeviceSharding(device, memory_kind=PINNED_HOST)


def to_host_memory(opt_state: Any) -> Any:
    """A paged optimizer's state with the moments of its large leaves in pinned host memory.

    Takes arrays, which are moved one after the other, or `jax.ShapeDtypeStruct`s, which get the sharding.
    """
    sharding = host_sharding()

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    def place_moments(tree: Any) -> Any:
        if tree is None:
            return None
        leaves, structure = jax.tree.flatten(tree, is_leaf=_is_moment)
        sizes = layer_sizes(jax.tree.map(_codes, tree, is_leaf=_is_moment))
        placed = [
            jax.tree.map(place, leaf) if size >= MIN_8BIT_ELEMENTS else leaf
            for leaf, size in zip(leaves, sizes, strict=True)
        ]
        return jax.tree.unflatten(structure, placed)

    def is_state(node: Any) -> bool:
        return isinstance(node, MomentState)

    return jax.tree.map(
        lambda node: (
            MomentState(node.steps, place_moments(node.first), place_moments(node.second))
            if is_state(node)
            else node
        ),
        opt_state,
        is_leaf=is_state,
    )


def _is_moment(node: Any) -> bool:
    return isinstance(node, Blockwise)


def _codes(leaf: Any) -> Any:
    return leaf.codes if isinstance(leaf, Blockwise) else leaf
