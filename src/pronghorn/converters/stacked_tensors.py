"""Weights of experts: one tensor each in a file, one stack of ours."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pronghorn.converters.bitsandbytes import BitsAndBytesArray, QuantizedTensor
from pronghorn.converters.safetensors_files import StoredTensor, TensorSpec
from pronghorn.errors import InputError
from pronghorn.quantization.quantize_model import stacked


@dataclasses.dataclass(frozen=True)
class StackedTensor(TensorSpec):
    """Tensors of files as one on a new first axis: nothing is read before `read`."""

    parts: tuple[StoredTensor, ...]

    @property
    def file(self) -> Path:
        """The file of the first."""
        return self.parts[0].file

    def read(self) -> np.ndarray:
        """All of them, stacked; every bit as stored."""
        stack = np.empty(self.shape, self.dtype)
        for place, part in enumerate(self.parts):
            stack[place] = part.read()
        return stack


@dataclasses.dataclass(frozen=True)
class StackedQuantizedTensor(QuantizedTensor):
    """Quantised weights of files as one on a new first axis of every leaf: nothing is read before `read`."""

    stack: tuple[QuantizedTensor, ...] = ()

    def read(self) -> Any:
        """All of them with numpy leaves, every bit as stored."""
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(tensor.read() for tensor in self.stack))


def stack_tensors(
    folder: str | Path, stored: Mapping[str, Any], stacks: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """The tensors of a folder, those that are parts of a stack as one. Experts may also lie in the file as transformers
    holds them, `experts.gate_up_proj` `[experts, 2 width, d]` and `experts.down_proj`; they are written one by one.

    Args:
      stored: the folder's, by name.
      stacks: {name of the stack: its parts in order}, `Family.stacked_tensors`.

    Raises:
      InputError: a part is missing, or of another shape or dtype than the first or quantised in another way.
    """
    found = _one_by_one(stored, stacks)
    for name, names in stacks.items():
        missing = [part for part in names if part not in found]
        if missing:
            raise InputError(
                f"{folder}: the weights lack {missing[0]}, which config.json asks for; the download is incomplete or "
                "config.json belongs to another model."
            )
        parts = tuple(found.pop(part) for part in names)
        first = parts[0]
        for part_name, part in zip(names, parts, strict=True):
            if getattr(part, "form", None) != getattr(first, "form", None):
                raise InputError(
                    f"{part.file}: {part_name} is not quantised as {names[0]} is; experts of a layer have to be alike."
                )
            if (part.shape, part.dtype) != (first.shape, first.dtype):
                raise InputError(
                    f"{part.file}: {part_name} is {part.dtype.name}{list(part.shape)} and {names[0]} "
                    f"{first.dtype.name}{list(first.shape)}; experts of one layer have to be alike."
                )
        shape = (len(parts), *first.shape)
        if isinstance(first, QuantizedTensor):
            form = stacked(first.form, len(parts))
            found[name] = StackedQuantizedTensor(first.dtype, shape, first.file, form, {}, stack=parts)  # type: ignore[arg-type]
        else:
            found[name] = StackedTensor(first.dtype, shape, parts)
    return found


def _one_by_one(stored: Mapping[str, Any], stacks: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The same, with every expert's part of what holds all of them by the name that it has by itself: each is one
    piece of the file."""
    found, joined = dict(stored), set()
    for name, parts in stacks.items():
        holder, _, leaf = name.removesuffix("_proj.weight").rpartition(".")
        place, halves = {"gate": (0, 2), "up": (1, 2)}.get(leaf, (0, 1))
        whole_name = f"{holder}.{'gate_up_proj' if halves == 2 else f'{leaf}_proj'}"
        whole = stored.get(whole_name)
        if not isinstance(whole, StoredTensor) or len(whole.shape) != 3 or whole.shape[0] != len(parts):
            continue
        joined.add(whole_name)
        shape, each = (whole.shape[1] // halves, whole.shape[2]), whole.nbytes // (len(parts) * halves)
        for expert, part in enumerate(parts):
            offset = whole.offset + (expert * halves + place) * each
            found[part] = dataclasses.replace(whole, shape=shape, offset=offset)
    return {name: tensor for name, tensor in found.items() if name not in joined}


def unstack_quantized(
    weights: Mapping[str, BitsAndBytesArray], stacks: Mapping[str, tuple[str, ...]]
) -> dict[str, BitsAndBytesArray]:
    """The quantised weights of a file, given those of ours: experts one by one."""
    found: dict[str, BitsAndBytesArray] = {}
    for name, weight in weights.items():
        if name not in stacks:
            found[name] = weight
            continue
        for expert, part in enumerate(stacks[name]):
            found[part] = jax.tree.map(lambda leaf, expert=expert: leaf[expert], weight)
    return found


def unstacked(
    stacks: Mapping[str, tuple[str, ...]],
    spec: Callable[[str], TensorSpec],
    fetch: Callable[[str], np.ndarray],
) -> tuple[Callable[[str], TensorSpec], Callable[[str], np.ndarray]]:
    """(spec, fetch) of the tensors of a file, given those of ours: the inverse of `stack_tensors`.

    A file lists the experts of a layer one after the other, so its three stacks are held until the next layer's.
    """
    places = {part: (name, i) for name, parts in stacks.items() for i, part in enumerate(parts)}
    whole = functools.lru_cache(maxsize=3)(fetch)

    def part_spec(name: str) -> TensorSpec:
        if name not in places:
            return spec(name)
        stack = spec(places[name][0])
        return TensorSpec(stack.dtype, stack.shape[1:])

    def part_fetch(name: str) -> np.ndarray:
        if name not in places:
            return fetch(name)
        stack, i = places[name]
        return whole(stack)[i]

    return part_spec, part_fetch
