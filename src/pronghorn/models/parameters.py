"""Single-layer names for the parameters of a decoder, whichever way its layers are laid out.

Names are those of Hugging Face without the leading "model.": `layers.3.self_attn.q_proj.weight`. A parameter of a
scanned decoder is one slice of a stack; the stack itself is never copied to read or name a slice.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pronghorn.errors import InputError
from pronghorn.models.decoder import Decoder
from pronghorn.models.layers import WideConstant


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of one layer.

    Attributes:
      variable: the NNX variable that holds it.
      repeat: its index on the variable's leading axis, or None where the variable is not stacked.
    """

    variable: nnx.Variable
    repeat: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.variable.get_value().shape)
        return shape if self.repeat is None else shape[1:]

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.variable.get_value().dtype)

    @property
    def keeps_dtype(self) -> bool:
        """Whether a cast of the model leaves it as it is."""
        return isinstance(self.variable, WideConstant)

    @property
    def logical_axes(self) -> tuple[str, ...]:
        axes = self.variable.logical_axes
        return axes if self.repeat is None else axes[1:]

    def get(self) -> Any:
        """The array, or the quantised weight; a slice where it is stacked."""
        value = self.variable.get_value()
        return value if self.repeat is None else jax.tree.map(lambda leaf: leaf[self.repeat], value)


def named_parameters(model: Decoder) -> dict[str, Parameter]:
    """Every parameter by name: embedding, layers in order, norm, extras, head; adapters (`...lora_A`) beside their
    weights."""
    named = {name: Parameter(v) for name, v in _variables(model.embed_tokens, "embed_tokens")}
    for segment in model.segments:
        period = [list(_variables(layer, "")) for layer in segment.layers]
        for repeat in range(segment.repeats):
            for position, variables in enumerate(period):
                index = segment.start + repeat * len(period) + position
                for name, variable in variables:
                    named[f"layers.{index}.{name}"] = Parameter(variable, repeat if segment.stacked else None)
    named |= {name: Parameter(v) for name, v in _variables(model.norm, "norm")}
    if model.extras is not None:
        named |= {name: Parameter(v) for name, v in _variables(model.extras, "")}
    if model.lm_head is not None:
        named |= {name: Parameter(v) for name, v in _variables(model.lm_head, "lm_head")}
    return named


def flat_arrays(model: Decoder) -> dict[str, Any]:
    """`{name: array}` of every parameter. Slices of stacks are copies: to save memory read one at a time."""
    return {name: parameter.get() for name, parameter in named_parameters(model).items()}


def assign(model: Decoder, mapping: Mapping[str, Any], *, strict: bool = True) -> None:
    """Set parameters in place, cast to the dtype of the model, on the device or sharding of the leaf they replace.

    Args:
      model: a decoder, or `Decoder.abstract`, whose leaves become arrays.
      mapping: arrays of numpy or jax by single-layer name. It may read lazily: each name is read once, and a stack is
        filled on the host and moved at once, so no more than one leaf is held beside the model.
      strict: every parameter of the model has to be given. Otherwise those not given keep their values.

    Raises:
      InputError: a name that the model does not have, a missing one, or a shape that differs.
    """
    parameters = named_parameters(model)
    unknown = [name for name in mapping if name not in parameters]
    if unknown:
        raise InputError(
            f"The model has no parameter {_list(unknown)}; the weights belong to another architecture or adapter."
        )
    missing = [name for name in parameters if name not in mapping]
    if strict and missing:
        raise InputError(
            f"The weights lack {_list(missing)}; they are incomplete or of another architecture."
        )
    for group in _by_leaf(parameters):
        given = [(name, parameter) for name, parameter in group if name in mapping]
        if given:
            _set_leaf(given, mapping)


def reading_order(model: Decoder) -> list[str]:
    """The names of all parameters in the order that `assign` reads them."""
    return [name for group in _by_leaf(named_parameters(model)) for name, _ in group]


def _by_leaf(parameters: Mapping[str, Parameter]) -> list[list[tuple[str, Parameter]]]:
    """Single-layer parameters, those of one variable together; the largest first where some are quantised.

    What quantising leaves free is then never a little larger than what is asked for next. jax's allocator gives a piece
    of memory away whole unless it is twice as large as what was asked for: in the order of layers, o_proj's 16-bit
    copy (33.6 MB) became the place of gate_proj's codes (29.4 MB), and so on, 474 MB in an NF4 Llama-3.1-8B.
    """
    leaves: dict[int, list[tuple[str, Parameter]]] = {}
    for name, parameter in parameters.items():
        leaves.setdefault(id(parameter.variable), []).append((name, parameter))
    groups = list(leaves.values())
    if any(hasattr(group[0][1].variable.get_value(), "dequantize") for group in groups):
        groups.sort(key=lambda group: -sum(math.prod(parameter.shape) for _, parameter in group))
    return groups


def _variables(module: nnx.Module, prefix: str) -> Iterator[tuple[str, nnx.Variable]]:
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable):
            yield ".".join([*([prefix] if prefix else []), *map(str, path)]), node


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _set_leaf(group: list[tuple[str, Parameter]], mapping: Mapping[str, Any]) -> None:
    """All the given slices of one variable (or its only value)."""
    variable = group[0][1].variable
    current = variable.get_value()
    if hasattr(current, "dequantize"):
        _set_quantized_leaf(group, mapping)
        return
    abstract = isinstance(current, jax.ShapeDtypeStruct)
    sharding = getattr(current, "sharding", None)
    dtype = jnp.dtype(current.dtype)
    if group[0][1].repeat is None:
        [(name, parameter)] = group
        value = _checked(mapping[name], name, parameter)
        value = value.astype(dtype) if isinstance(value, jax.Array) else np.asarray(value, dtype)
        variable.set_value(jax.device_put(value, sharding))
        return
    complete = len(group) == current.shape[0]
    if abstract and not complete:
        given = {parameter.repeat for _, parameter in group}
        lacking = [r for r in range(current.shape[0]) if r not in given]
        raise InputError(
            f"{group[0][0]} is one slice of a stack of which the slices {lacking} are not given; give every layer."
        )
    stack = np.empty(current.shape, dtype) if complete else np.array(current)
    for name, parameter in group:
        stack[parameter.repeat] = np.asarray(_checked(mapping[name], name, parameter)).astype(dtype)
    variable.set_value(jax.device_put(stack, sharding))


def _set_quantized_leaf(group: list[tuple[str, Parameter]], mapping: Mapping[str, Any]) -> None:
    variable = group[0][1].variable
    current = variable.get_value()
    # The values are small: all of a stack are held while it is put together, on the host.
    values = [_checked(mapping[name], name, parameter) for name, parameter in group]
    structure: Any = jax.tree.structure(current)
    if any(jax.tree.structure(value) != structure for value in values):
        raise InputError(f"{group[0][0]} is quantised in another way in the weights than in the model.")
    if group[0][1].repeat is None:
        variable.set_value(jax.device_put(values[0]))
        return
    if len(group) != current.shape[0]:
        raise InputError(f"{group[0][0]} is one slice of a quantised stack; give every layer.")
    stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *values)
    variable.set_value(jax.device_put(stacked))


def _checked(value: Any, name: str, parameter: Parameter) -> Any:
    if tuple(value.shape) != parameter.shape:
        raise InputError(
            f"{name} has shape {list(value.shape)} in the weights and {list(parameter.shape)} in the model; the "
            "config.json does not belong to these weights."
        )
    return value
