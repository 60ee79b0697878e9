"""Muon for the matrices inside of layers, Adam for everything else, as one Optax transformation.

Muon replaces the momentum of a matrix by the nearest orthogonal matrix, found by Newton-Schulz steps, times
0.2 sqrt(max(out, in)), so that an update is about as large as AdamW's and learning rate and decay keep their meaning.
Embedding, head, norms and biases are not what it is for: a row of an embedding is a vector of its own, and takes Adam.
Nor are adapters: the product B A is the matrix, its factors are not, so they are refused.

Momentum 0.95, Nesterov, five steps: those of Optax, whose `scale_by_muon` does the work.

Sources: Jordan et al., Muon, 2024, https://kellerjordan.github.io/posts/muon; Liu et al., Muon is Scalable for LLM
Training, 2025, section 2.2, https://arxiv.org/abs/2502.16982.
"""

import math
from typing import Any

import jax
import optax
from optax import contrib

from pronghorn.errors import InputError
from pronghorn.training.parameter_names import is_stacked, is_variable, layer_names

_RMS = 0.2


def scale_matrices_by_muon(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Directions of both, to be scaled by minus one learning rate.

    Args:
      beta1, beta2, eps: Adam's.
    """

    def inner(tree: Any) -> tuple[optax.GradientTransformation, list[str], Any]:
        names, labels, dimensions = _roles(tree)
        muon = optax.chain(
            contrib.scale_by_muon(weight_dimension_numbers=lambda _: dimensions), _scale_by_shape(dimensions)
        )
        transforms = {"muon": muon, "adam": optax.scale_by_adam(beta1, beta2, eps)}
        return optax.partition(transforms, labels), names, jax.tree.structure(tree)

    def init(params: Any) -> Any:
        transformation, names, _ = inner(params)
        zeros = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), jax.tree.leaves(params))
        return transformation.init(dict(zip(names, zeros, strict=True)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        transformation, names, structure = inner(updates)
        named = dict(zip(names, jax.tree.leaves(updates), strict=True))
        directions, state = transformation.update(named, state)
        return jax.tree.unflatten(structure, [directions[name] for name in names]), state

    return optax.GradientTransformation(init, update)


def _roles(tree: Any) -> tuple[list[str], dict[str, str], dict[str, Any]]:
    """Names of the leaves, who updates each, and of Muon's the axes of the matrix.

    Raises:
      InputError: an adapter.
    """
    names, labels, dimensions = [], {}, {}
    leaves = jax.tree.leaves(tree, is_leaf=is_variable)
    for leaf, held in zip(leaves, layer_names(tree), strict=True):
        name, layer = held[0]
        if "lora_" in name:
            raise InputError(
                f"train.optimizer: muon is for full fine-tuning, and {name} is a factor of an adapter, no matrix that "
                "may be made orthogonal by itself; use adamw, or lora: null."
            )
        stacked = int(is_stacked(leaf))
        matrix = layer is not None and len(leaf.shape) - stacked == 2
        names.append(name)
        labels[name] = "muon" if matrix else "adam"
        dimensions[name] = (
            contrib.MuonDimensionNumbers(reduction_axis=stacked + 1, output_axis=stacked)
            if matrix
            else optax.MaskedNode()
        )
    return names, labels, dimensions


def _scale_by_shape(dimensions: dict[str, Any]) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def scaled(update: Any, axes: Any) -> Any:
            if isinstance(axes, optax.MaskedNode):
                return update
            largest = max(update.shape[axes.reduction_axis], update.shape[axes.output_axis])
            return update * (_RMS * math.sqrt(largest))

        return {name: scaled(update, dimensions[name]) for name, update in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
