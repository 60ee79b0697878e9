"""Experts in MXFP4 as gpt-oss's folders have them (`quant_method` "mxfp4"); the format is in `quantization.mxfp4`.

    X_blocks    uint8 [experts, out, in / 32, 16]      two codes a byte
    X_scales    uint8 [experts, out, in / 32]

X is `mlp.experts.gate_up_proj` or `down_proj`, whose rows lie as its bias does: gate and up in turn. A 16-bit folder
has `[experts, in, out]` instead, so what stands here for X is already in our orientation. Only reading: a model is
saved in 16 bits, with the very values that these stand for.

Checked against transformers 5.17.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pronghorn.converters.bitsandbytes import QuantizedTensor
from pronghorn.converters.safetensors_files import StoredTensor
from pronghorn.errors import InputError
from pronghorn.quantization import QuantizationConfig
from pronghorn.quantization.mxfp4 import BLOCK, empty_like_mxfp4

_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclasses.dataclass(frozen=True)
class MXFP4Tensor(QuantizedTensor):
    """Experts' weights in a file; stands where a `StoredTensor` of them would.

    Attributes:
      turn: (first, step) of the rows that these are of those in the file.
    """

    turn: tuple[int, int] = (0, 1)

    def read(self) -> Any:
        """The `MXFP4Array` with numpy leaves, every bit as stored."""
        first, step = self.turn
        form: Any = self.form
        codes, scales = (self.parts[name].read()[:, first::step] for name in ("codes", "scales"))
        return dataclasses.replace(
            form,
            codes=np.ascontiguousarray(codes).reshape(form.codes.shape),
            scales=np.ascontiguousarray(scales),
        )

    def every(self, first: int, step: int) -> "MXFP4Tensor":
        """The rows first, first + step, .. of every expert."""
        experts, rows, columns = self.shape
        shape = (experts, rows // step, columns)
        form: Any = empty_like_mxfp4(shape, self.dtype)
        return dataclasses.replace(self, shape=shape, form=form, turn=(first, step))


def is_mxfp4_config(value: Any) -> bool:
    """Whether config.json's `quantization_config` says that experts are in MXFP4."""
    return isinstance(value, dict) and value.get("quant_method") == "mxfp4"


def quantization_of(value: Mapping[str, Any]) -> QuantizationConfig:
    """What a `quantization_config` says, for a plan: which weights are meant is read off the tensors."""
    return QuantizationConfig("mxfp4")


def join_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The tensors of a folder with blocks and scales of each weight joined into one `MXFP4Tensor`.

    Raises:
      InputError: naming the file and the weight: one of the two is missing, or their shapes do not fit.
    """
    joined: dict[str, Any] = dict(stored)
    for name, blocks in stored.items():
        if name.endswith(_SCALES) and f"{name.removesuffix(_SCALES)}{_BLOCKS}" not in stored:
            raise InputError(f"{blocks.file}: has {name} and no blocks beside it; download it again.")
        if not name.endswith(_BLOCKS):
            continue
        weight = name.removesuffix(_BLOCKS)
        del joined[name]
        scales = joined.pop(weight + _SCALES, None)
        if scales is None:
            raise InputError(f"{blocks.file}: has {name} and no scales beside it; download it again.")
        known = blocks.dtype == np.uint8 and len(blocks.shape) == 4 and blocks.shape[-1] == BLOCK // 2
        if not known or (scales.dtype, scales.shape) != (np.dtype(np.uint8), blocks.shape[:-1]):
            raise InputError(
                f"{blocks.file}: {weight} has blocks {blocks.dtype.name}{list(blocks.shape)} and scales "
                f"{scales.dtype.name}{list(scales.shape)}, where uint8 [experts, out, in / {BLOCK}, {BLOCK // 2}] and "
                f"[experts, out, in / {BLOCK}] are known; download it again."
            )
        shape = (*blocks.shape[:2], blocks.shape[2] * BLOCK)
        # The file does not say what the weight was; whoever loads it replaces this by the dtype of the others.
        dtype = np.dtype(jnp.bfloat16)
        form: Any = empty_like_mxfp4(shape, dtype)
        joined[weight] = MXFP4Tensor(dtype, shape, blocks.file, form, {"codes": blocks, "scales": scales})
    return joined
