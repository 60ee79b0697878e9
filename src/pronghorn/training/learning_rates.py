"""Which share of the scheduled learning rate each parameter has.

LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354): the factor B learns `lora_plus_ratio` times as fast as A.
Embedding and head have a peak of their own. Layers may learn the slower the nearer they are to the embedding (Howard
and Ruder 2018, discriminative fine-tuning): layer i of N has decay^(N - 1 - i), the embedding decay^N. And any pattern
over names may have a ratio. A ratio scales the decoupled weight decay too, as a learning rate does.
"""

import fnmatch
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pronghorn.errors import InputError
from pronghorn.training.config import TrainConfig
from pronghorn.training.parameter_names import layer_names

_EMBEDDINGS = ("embed_tokens", "lm_head")


def has_ratios(config: TrainConfig) -> bool:
    """Whether not all parameters have the same learning rate."""
    return bool(
        config.learning_rate_ratios
        or config.lora_plus_ratio != 1
        or config.embedding_learning_rate is not None
        or config.layer_decay != 1
    )


def scale_by_ratios(config: TrainConfig) -> optax.GradientTransformation:
    """Multiply each leaf's update by its ratio; without a state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda u, r: u * r, updates, learning_rate_ratios(config, updates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def learning_rate_ratios(config: TrainConfig, trainable: Any) -> Any:
    """In the structure of `trainable` fp32 ratios: a scalar, or `[layers, 1, ...]` for a stack of layers.

    Raises:
      InputError: a pattern that no parameter matches, or adapters' ratios without adapters.
    """
    named = layer_names(trainable)
    unused = {pattern for pattern, _ in config.learning_rate_ratios}
    depth = 1 + max((layer for names in named for _, layer in names if layer is not None), default=-1)

    def ratio(name: str, layer: int | None) -> float:
        value = 1.0
        for pattern, factor in config.learning_rate_ratios:
            if fnmatch.fnmatchcase(name, pattern):
                unused.discard(pattern)
                value *= factor
        if name.endswith(("lora_B", "lora_embedding_B")):
            value *= config.lora_plus_ratio
        if (
            any(part in name.split(".") for part in _EMBEDDINGS)
            and config.embedding_learning_rate is not None
        ):
            value *= config.embedding_learning_rate / config.learning_rate
        if layer is not None:
            value *= config.layer_decay ** (depth - 1 - layer)
        elif "embed_tokens" in name.split("."):
            value *= config.layer_decay**depth
        return value

    leaves, structure = jax.tree.flatten(trainable)
    ratios = []
    for leaf, names in zip(leaves, named, strict=True):
        values = [ratio(name, layer) for name, layer in names]
        if len(set(values)) == 1:
            ratios.append(jnp.float32(values[0]))
        else:
            ratios.append(
                jnp.asarray(np.reshape(np.asarray(values, np.float32), (-1, *[1] * (leaf.ndim - 1))))
            )
    if unused:
        raise InputError(
            f"train.learning_rate_ratios: no trained parameter matches {sorted(unused)[0]!r}; names are such as "
            f"{named[0][0][0]!r} and {named[math.ceil(len(named) / 2)][0][0] if len(named) > 1 else named[0][0][0]!r}."
        )
    all_names = [name for names in named for name, _ in names]
    if config.lora_plus_ratio != 1 and not any(name.endswith("_B") for name in all_names):
        raise InputError("train.lora_plus_ratio: no adapter is trained; leave it out of full fine-tuning.")
    if config.embedding_learning_rate is not None and not any(
        part in name.split(".") for name in all_names for part in _EMBEDDINGS
    ):
        raise InputError(
            "train.embedding_learning_rate: neither embedding nor head is trained; add them to lora.targets, or leave "
            "it out."
        )
    return jax.tree.unflatten(structure, ratios)
