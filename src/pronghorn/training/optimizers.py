"""AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization") as an Optax transformation.

  m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
  w <- w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)

the same update as `torch.optim.AdamW`. Moments are fp32 whatever the parameters are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pronghorn.errors import InputError
from pronghorn.training.config import TrainConfig
from pronghorn.training.flat_tree import is_flat
from pronghorn.training.schedules import make_schedule

_NEVER_DECAYED = ("norm", "bias", "sinks")


def make_optimizer(config: TrainConfig, total_steps: int | None = None) -> optax.GradientTransformation:
    """AdamW with the schedule of `config`. Clipping is the step's business: it needs the norm before clipping.

    Args:
      config: learning rate, schedule, betas, eps, weight decay.
      total_steps: updates of the whole run, where the schedule ends; None takes `config.max_steps`.

    Raises:
      InputError: neither says how long the run is.
    """
    total_steps = config.max_steps if total_steps is None else total_steps
    if total_steps is None:
        raise InputError("train.max_steps: missing; the schedule needs to know where the run ends.")
    transforms = [optax.scale_by_adam(config.beta1, config.beta2, config.eps)]
    if config.weight_decay:
        transforms.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    transforms.append(optax.scale_by_learning_rate(make_schedule(config, total_steps)))
    return optax.chain(*transforms)


def init_optimizer(optimizer: optax.GradientTransformation, trainable: Any) -> Any:
    """The optimizer's start state with fp32 moments, for parameters of any floating dtype."""
    return optimizer.init(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable))


def decay_mask(trainable: Any) -> Any:
    """True for matrices, false for norms, biases and every other vector, in the structure of `trainable`.

    A stacked leaf's leading `layers` axis does not make a matrix of a vector. A flat tree is one answer for all.
    """
    if is_flat(trainable):
        return jax.tree.map(lambda _: True, trainable)

    def decayed(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".").lower()
        dimensions = len(leaf.shape) - is_stacked(leaf)
        mask = dimensions >= 2 and not any(part in name for part in _NEVER_DECAYED)
        return jax.tree.map(lambda _: mask, leaf)

    return jax.tree_util.tree_map_with_path(decayed, trainable, is_leaf=is_variable)


def treats_all_alike(config: TrainConfig, trainable: Any) -> bool:
    """Whether this configuration's optimizer does the same to every element of `trainable`."""
    return not config.weight_decay or all(jax.tree.leaves(decay_mask(trainable)))


def is_variable(leaf: Any) -> bool:
    """Whether a node of a parameter tree is an NNX variable, which carries the names of its axes."""
    return isinstance(leaf, nnx.Variable)


def is_stacked(leaf: Any) -> bool:
    """Whether a leaf holds the weights of several layers, `[layers, ...]`."""
    axes: tuple[str, ...] = leaf.get_metadata().get("logical_axes", ()) if is_variable(leaf) else ()
    return axes[:1] == ("layers",)
