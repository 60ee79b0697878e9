"""Tensors of a file that hold several of ours element by element (`models.tensor_names.InterleavedTensor`)."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pronghorn.converters.mxfp4_checkpoints import MXFP4Tensor
from pronghorn.converters.safetensors_files import StoredTensor, TensorSpec
from pronghorn.errors import InputError
from pronghorn.models.tensor_names import InterleavedTensor


@dataclasses.dataclass(frozen=True)
class InterleavedPart(TensorSpec):
    """One of the tensors that a stored one holds: nothing is read before `read`."""

    whole: StoredTensor
    layout: InterleavedTensor
    place: int

    @property
    def file(self) -> Path:
        """Of the stored tensor."""
        return self.whole.file

    def read(self) -> np.ndarray:
        """This part in our orientation; every bit as stored."""
        return np.ascontiguousarray(self.layout.cut(self.whole.read(), self.place))


def part_tensors(
    folder: str | Path, stored: Mapping[str, Any], layouts: Mapping[str, InterleavedTensor]
) -> dict[str, Any]:
    """The tensors of a folder, those that hold several of ours as these.

    Args:
      stored: the folder's, by name.
      layouts: `Family.interleaved_tensors`.

    Raises:
      InputError: a tensor is missing, quantised in a way that cannot be cut, or of a shape that has no such parts.
    """
    found = dict(stored)
    for name, layout in layouts.items():
        if name not in found:
            raise InputError(
                f"{folder}: the weights lack {name}, which config.json asks for; the download is incomplete or "
                "config.json belongs to another model."
            )
        whole = found.pop(name)
        count = len(layout.parts)
        if isinstance(whole, MXFP4Tensor):
            if whole.shape[1] % count:
                raise InputError(
                    f"{whole.file}: {name} has {whole.shape[1]} rows an expert, which are no {count} tensors; "
                    "config.json belongs to another model."
                )
            found |= {part: whole.every(place, count) for place, part in enumerate(layout.parts)}
            continue
        if not isinstance(whole, StoredTensor):
            raise InputError(
                f"{whole.file}: {name} is quantised, and is read in 16 or 32 bits only; give the folder that it was "
                "made from."
            )
        if not layout.holds(whole.shape):
            raise InputError(
                f"{whole.file}: {name} has shape {list(whole.shape)}, which does not hold {count} tensors of experts; "
                "config.json belongs to another model."
            )
        shape = layout.part_shape(whole.shape)
        found |= {
            part: InterleavedPart(whole.dtype, shape, whole, layout, place)
            for place, part in enumerate(layout.parts)
        }
    return found


def interleaved(
    layouts: Mapping[str, InterleavedTensor],
    spec: Callable[[str], TensorSpec],
    fetch: Callable[[str], np.ndarray],
) -> tuple[Callable[[str], TensorSpec], Callable[[str], np.ndarray]]:
    """(spec, fetch) of the tensors of a file, given those of ours: the inverse of `part_tensors`."""

    def whole_spec(name: str) -> TensorSpec:
        if name not in layouts:
            return spec(name)
        part = spec(layouts[name].parts[0])
        return TensorSpec(part.dtype, layouts[name].file_shape(part.shape))

    def whole_fetch(name: str) -> np.ndarray:
        if name not in layouts:
            return fetch(name)
        return layouts[name].join([fetch(part) for part in layouts[name].parts])

    return whole_spec, whole_fetch
