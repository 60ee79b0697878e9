"""Which weights of a model are quantised, and how: the one place that knows every kind.

Only the linear layers inside of the decoder's layers are: embeddings, the head, norms and biases stay in 16 bits, as in
QLoRA. This module knows parameters by name and never looks at a model: `models` is to its right.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.errors import InputError
from pronghorn.quantization.fp8 import Activations, FP8Array, Gradients, Scales, empty_like_fp8, quantize_fp8
from pronghorn.quantization.int8 import Int8Array, empty_like_int8, quantize_int8
from pronghorn.quantization.mxfp4 import MXFP4Array, empty_like_mxfp4
from pronghorn.quantization.nf4 import NF4Array, empty_like_4bit, quantize_4bit
from pronghorn.quantization.recipe import KEPT, read_recipe

Kind = Literal["nf4", "fp4", "int8", "fp8", "mxfp4"]
# What a model can be quantised to; MXFP4 is read from folders that have it.
MADE = ("nf4", "fp4", "int8", "fp8")
QuantizedArray = NF4Array | Int8Array | FP8Array | MXFP4Array


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How to quantise a model.

    Attributes:
      kind: "nf4", "fp4" (4 bits and a scale every 64 elements), "int8" (8 bits and a scale a row), or "fp8" (an 8-bit
        float format, multiplied in FP8). "mxfp4" only describes a folder whose experts are stored so.
      nested: keep the scales of 4-bit blocks in 8 bits: 4.13 bits a parameter instead of 4.5.
      skip: modules that stay in 16 bits, by name as in Hugging Face ("model.layers.3.mlp.down_proj"), by the start of a
        name up to a dot, by its end, or by a regular expression for its start: what `llm_int8_skip_modules` means.
      modules: (module, kind) of single modules that are quantised in another way, by their whole name: what a recipe
        of `pronghorn sensitivity` chooses.
      fp8_scales: one scale a "tensor" (the only one that costs no time), a "row", or a "block" of 128 x 128.
      fp8_gradients: what gradients are rounded to in products with an FP8 weight: "e4m3", "e5m2", or "unrounded".
      fp8_activations: the same of activations: "e4m3" or "unrounded".

    Raises:
      InputError: an unknown kind.
    """

    kind: Kind = "nf4"
    nested: bool = True
    skip: tuple[str, ...] = ()
    modules: tuple[tuple[str, Kind], ...] = ()
    fp8_scales: Scales = "tensor"
    fp8_gradients: Gradients = "e4m3"
    fp8_activations: Activations = "e4m3"

    def __post_init__(self) -> None:
        for kind in (self.kind, *(kind for _, kind in self.modules)):
            if kind not in get_args(Kind):
                raise InputError(
                    f"quantization={kind!r} is not known; use one of {', '.join(MADE)}, or a recipe.json."
                )
        for name, value, known in (
            ("fp8_scales", self.fp8_scales, Scales),
            ("fp8_gradients", self.fp8_gradients, Gradients),
            ("fp8_activations", self.fp8_activations, Activations),
        ):
            if value not in get_args(known):
                raise InputError(
                    f"quantization: {name}={value!r} is not known; use one of {', '.join(get_args(known))}."
                )
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"quantization: skip has {pattern!r}, which is no pattern ({error})."
                ) from None

    def skips(self, module: str) -> bool:
        """Whether the module of this Hugging Face name stays in 16 bits; the rule of transformers 5."""
        return any(
            re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(pattern)
            for pattern in self.skip
        )

    def of_module(self, module: str) -> "QuantizationConfig | None":
        """How the module of this Hugging Face name is quantised, without any list; None where it stays in 16 bits."""
        if self.skips(module):
            return None
        kind = dict(self.modules).get(module, self.kind)
        return dataclasses.replace(self, kind=kind, skip=(), modules=())


def read_quantization(value: "str | Path | QuantizationConfig | None") -> QuantizationConfig | None:
    """A `QuantizationConfig` from what users write: one, its kind, the path of a recipe (`.json`), or None.

    Raises:
      InputError: no such kind, or a file that is no recipe.
    """
    if value is None or isinstance(value, QuantizationConfig):
        return value
    if value == "mxfp4":
        raise InputError(
            "quantization='mxfp4' is read from folders that have it, and never made; leave it out, or use nf4."
        )
    if not str(value).endswith(".json"):
        return QuantizationConfig(kind=str(value))  # type: ignore[arg-type]
    recipe = read_recipe(value)
    modules = dict(recipe.get("modules", {}))
    try:
        return QuantizationConfig(
            recipe["kind"],
            nested=recipe.get("nested", True),
            skip=tuple(re.escape(module) for module, kind in modules.items() if kind == KEPT),
            modules=tuple((module, kind) for module, kind in modules.items() if kind != KEPT),
        )
    except InputError as error:
        raise InputError(f"{value}: {error}") from None


def quantize(weight: Any, config: QuantizationConfig) -> QuantizedArray:
    """A quantised copy of a matrix `[out, in]`, or of a stack `[experts, out, in]` of which each is quantised alone, on
    the host (numpy) or its device (jax)."""
    if weight.ndim == 3:
        if isinstance(weight, np.ndarray):
            one = functools.partial(quantize, config=config)
            return jax.tree.map(lambda *leaves: np.stack(leaves), *map(one, weight))
        return _quantize_stack(weight, config)
    if config.kind == "int8":
        return quantize_int8(weight)
    if config.kind == "fp8":
        return quantize_fp8(weight, **_fp8_options(config))
    return quantize_4bit(weight, kind=config.kind, nested=config.nested)


@functools.partial(jax.jit, static_argnums=1)
def _quantize_stack(weight: jax.Array, config: QuantizationConfig) -> QuantizedArray:
    # One after the other: what a quantiser holds of a matrix is several times as large as the matrix.
    quantized: QuantizedArray = jax.lax.map(functools.partial(quantize, config=config), weight)
    return quantized


def empty_like(shape: tuple[int, ...], dtype: Any, config: QuantizationConfig) -> QuantizedArray:
    """What `quantize` returns for a matrix (or a stack) of this shape, with `jax.ShapeDtypeStruct` leaves."""
    if config.kind == "mxfp4":
        return empty_like_mxfp4(shape, dtype)
    if len(shape) == 3:
        return stacked(empty_like(shape[1:], dtype, config), shape[0])
    if config.kind == "int8":
        return empty_like_int8(shape, dtype)
    if config.kind == "fp8":
        return empty_like_fp8(shape, dtype, **_fp8_options(config))
    return empty_like_4bit(shape, dtype, kind=config.kind, nested=config.nested)


def _fp8_options(config: QuantizationConfig) -> dict[str, Any]:
    return {
        "scales": config.fp8_scales,
        "gradients": config.fp8_gradients,
        "activations": config.fp8_activations,
    }


def is_quantized(value: Any) -> bool:
    """Whether a parameter's value is a quantised weight."""
    return hasattr(value, "dequantize")


def choose(
    parameters: Mapping[str, Any],
    modules: Mapping[str, str],
    config: QuantizationConfig,
    *,
    strict: bool = True,
) -> dict[str, QuantizationConfig]:
    """{our name: how} of the weights to quantise: the matrices inside of layers, and the experts' stacks of them.

    Args:
      parameters: of the model, from `named_parameters`.
      modules: {our parameter name: Hugging Face tensor name} of the whole model.
      strict: refuse to skip what the model lacks. Published lists name such things.

    Raises:
      InputError: nothing is left to quantise, or something is skipped that no module is called.
    """
    candidates = {
        ours: theirs.removesuffix(".weight")
        for ours, theirs in modules.items()
        if ours.startswith("layers.") and ours.endswith(".weight") and _is_matrix_or_stack(parameters[ours])
    }
    others = [theirs.removesuffix(".weight") for theirs in modules.values()]
    unknown = [module for module, _ in config.modules if module not in candidates.values()]
    if strict and unknown:
        raise InputError(
            f"quantization: {unknown[0]!r} is no linear module inside of a layer of this model; take the recipe that "
            "was made for it."
        )
    for pattern in config.skip:
        one = QuantizationConfig(config.kind, config.nested, (pattern,))
        if strict and pattern != "lm_head" and not any(one.skips(module) for module in others):
            raise InputError(f"quantization: skip names {pattern!r}, and the model has no such module.")
    found = {ours: config.of_module(module) for ours, module in candidates.items()}
    chosen = {ours: how for ours, how in found.items() if how is not None}
    chosen = {ours: how for ours, how in chosen.items() if _can_take(parameters[ours], how.kind)}
    if not chosen:
        raise InputError("quantization: skip leaves nothing to quantise; leave the quantization out instead.")
    return chosen


def _is_matrix_or_stack(parameter: Any) -> bool:
    """Whether a weight is a linear layer's, or those of all experts; a router's `[experts, d]` is not."""
    axes = parameter.logical_axes
    return (len(axes) == 2 and "experts" not in axes) or (len(axes) == 3 and axes[0] == "experts")


def _can_take(parameter: Any, kind: str) -> bool:
    """Experts are never multiplied in FP8, so they stay in 16 bits then; and MXFP4 is theirs alone."""
    return kind != "fp8" if len(parameter.shape) == 3 else kind != "mxfp4"


def make_abstract(parameters: Mapping[str, Any], arrays: Mapping[str, QuantizedArray]) -> None:
    """Give variables of an abstract model quantised leaves, a leading axis on each where layers are stacked.

    Args:
      parameters: of the model, from `named_parameters`.
      arrays: {name: what `empty_like` returns} of the weights that are to be quantised.

    Raises:
      InputError: layers of one stack that are to be stored in different ways.
    """
    stacks: dict[int, list[tuple[str, Any]]] = {}
    for name, parameter in parameters.items():
        stacks.setdefault(id(parameter.variable), []).append((name, parameter))
    for group in stacks.values():
        forms = [arrays.get(name) for name, _ in group]
        if all(form is None for form in forms):
            continue
        (first_name, first), form = group[0], forms[0]
        if form is None or any(other != form for other in forms):
            raise InputError(
                f"{first_name} and the other layers of its stack are not quantised alike, which one stack cannot hold; "
                'load the model with layers="unrolled".'
            )
        if first.repeat is not None:
            form = stacked(form, len(group))
        first.variable.set_value(form)


def stacked(form: QuantizedArray, count: int) -> QuantizedArray:
    """`count` weights of an abstract form in one, on a new first axis."""
    result: QuantizedArray = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), form
    )
    return result


def finite_scales(values: Iterable[Any]) -> jax.Array:
    """Whether every scale of the quantised weights is finite: none is where a weight is NaN, infinite or too large."""
    flags = []
    for value in values:
        if isinstance(value, Int8Array | FP8Array):
            flags.append(jnp.all(jnp.isfinite(value.scales)))
        elif isinstance(value, MXFP4Array):
            flags.append(value.finite())
        elif isinstance(value, NF4Array):
            # The mean of the scales is not finite if one of them is not.
            flags.append(jnp.all(jnp.isfinite(value.nested_offset if value.nested else value.absmax)))
    return jnp.stack(flags) if flags else jnp.ones((1,), bool)
