"""The optimizers of `TrainConfig.optimizer` as Optax transformations: AdamW here, the others from files of their own.

AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"):

  m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
  w <- w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)

the same update as `torch.optim.AdamW`. Moments are fp32 whatever the parameters are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from pronghorn.errors import InputError
from pronghorn.training.config import TrainConfig
from pronghorn.training.flat_tree import is_flat
from pronghorn.training.learning_rates import has_ratios, scale_by_ratios
from pronghorn.training.muon import scale_matrices_by_muon
from pronghorn.training.optimizers_8bit import (
    MIN_8BIT_ELEMENTS,
    gated_chain,
    layer_sizes,
    pages,
    scale_by_adam_8bit,
    scale_by_lion_8bit,
)
from pronghorn.training.parameter_names import is_stacked, is_variable
from pronghorn.training.schedules import make_schedule

__all__ = ["decay_mask", "init_optimizer", "is_stacked", "is_variable", "make_optimizer", "treats_all_alike"]

_NEVER_DECAYED = ("norm", "bias", "sinks")


def make_optimizer(config: TrainConfig, total_steps: int | None = None) -> optax.GradientTransformation:
    """The optimizer and schedule of `config`. Clipping is the step's business: it needs the norm before clipping.

    Args:
      config: optimizer, learning rate and its ratios, schedule, betas, eps, weight decay.
      total_steps: updates of the whole run, where the schedule ends; None takes `config.max_steps`.

    Raises:
      InputError: neither says how long the run is.
    """
    total_steps = config.max_steps if total_steps is None else total_steps
    if total_steps is None:
        raise InputError("train.max_steps: missing; the schedule needs to know where the run ends.")
    rest = []
    if config.weight_decay:
        rest.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    if has_ratios(config):
        rest.append(scale_by_ratios(config))
    rest.append(optax.scale_by_learning_rate(make_schedule(config, total_steps)))
    betas = (config.beta1, config.beta2)
    if config.optimizer == "muon":
        return optax.chain(scale_matrices_by_muon(*betas, config.eps), *rest)
    if config.optimizer == "adamw" and not pages(config):
        return optax.chain(optax.scale_by_adam(*betas, config.eps), *rest)
    bits: Any = 8 if config.optimizer.endswith("_8bit") else 32
    if config.optimizer.startswith("lion"):
        return gated_chain(scale_by_lion_8bit(*betas, bits=bits, paged=pages(config)), *rest)
    return gated_chain(scale_by_adam_8bit(*betas, config.eps, bits=bits, paged=pages(config)), *rest)


def init_optimizer(optimizer: optax.GradientTransformation, trainable: Any) -> Any:
    """The optimizer's start state with fp32 (or 8-bit) moments, for parameters of any floating dtype."""
    return optimizer.init(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), trainable))


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
    if config.optimizer == "muon" or has_ratios(config) or pages(config):
        return False
    if config.optimizer.endswith("_8bit") and min(layer_sizes(trainable)) < MIN_8BIT_ELEMENTS:
        return False  # small leaves keep their moments in 32 bits
    return not config.weight_decay or all(jax.tree.leaves(decay_mask(trainable)))
