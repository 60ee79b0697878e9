"""FP8 weights of published folders, as transformers ("fp8") and compressed-tensors ("float-quantized") store them.

    X.weight             float8_e4m3fn [out, in]
    X.weight_scale_inv   [ceil(out / 128), ceil(in / 128)]                                   quant_method "fp8"
    X.weight_scale       [] or [1], [out, 1], or [ceil(out / 128), ceil(in / 128)]           "compressed-tensors"
    X.input_scale        of activations; not read: here they are scaled by what they hold    (static schemes)

Either scale multiplies: W = s Wq, whatever its name says. Which weights are in FP8 is read off the tensors. Only
reading: a model is saved in 16 bits.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.converters.bitsandbytes import QuantizedTensor
from pronghorn.converters.safetensors_files import StoredTensor
from pronghorn.errors import InputError
from pronghorn.quantization import FP8Array, QuantizationConfig
from pronghorn.quantization.fp8 import BLOCK, CODE_DTYPE

_SCALES = {"fp8": ".weight_scale_inv", "compressed-tensors": ".weight_scale"}
_SCALE_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class FP8Tensor(QuantizedTensor):
    """An FP8 weight in a file; stands where a `StoredTensor` of the weight itself would."""

    def read(self) -> Any:
        """The `FP8Array` with numpy leaves; scales in fp32, which holds every one that a file may have."""
        codes, scales = self.parts["codes"].read(), self.parts["scales"].read()
        form: Any = self.form
        return dataclasses.replace(
            form, codes=codes, scales=scales.astype(np.float32).reshape(form.scales.shape)
        )


def is_fp8_config(value: Any) -> bool:
    """Whether config.json's `quantization_config` is one of these."""
    return isinstance(value, dict) and str(value.get("quant_method")) in _SCALES


def quantization_of(value: Mapping[str, Any]) -> QuantizationConfig:
    """What a `quantization_config` says, for a plan: the largest scales that the folder may have.

    Raises:
      InputError: anything but e4m3 weights.
    """
    if value["quant_method"] == "fp8":
        block = value.get("weight_block_size")
        if block is not None and block != [BLOCK, BLOCK]:
            raise InputError(
                f"config.json: quantization_config has blocks of {str(block)[:40]}, and known is {BLOCK} x {BLOCK}."
            )
        skip = value.get("modules_to_not_convert") or value.get("ignored_layers") or ()
        return QuantizationConfig("fp8", skip=_names(skip), fp8_scales="tensor" if block is None else "block")
    groups = value.get("config_groups")
    kinds = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or (weights.get("num_bits"), weights.get("type")) != (8, "float"):
            raise InputError(
                "config.json: quantization_config has weights that are not 8-bit floats; supported of "
                "compressed-tensors is float-quantized FP8."
            )
        kinds.add(str(weights.get("strategy")))
    known: dict[Any, Any] = {"tensor": "tensor", "channel": "row", "block": "block"}
    if not kinds or not kinds <= set(known):
        raise InputError(
            f"config.json: quantization_config has scales a {', '.join(map(str, kinds)) or 'nothing'}; known are "
            f"{', '.join(known)}."
        )
    # Patterns ("re:..") go by names of modules; the tensors say the same.
    skip = tuple(name for name in _names(value.get("ignore") or ()) if not name.startswith("re:"))
    scales: Any = known[kinds.pop()] if len(kinds) == 1 else "row"
    return QuantizationConfig("fp8", skip=skip, fp8_scales=scales)


def join_tensors(stored: Mapping[str, StoredTensor], quant_method: str) -> dict[str, Any]:
    """The tensors of a folder with those of each FP8 weight joined into one `FP8Tensor`.

    Args:
      stored: from `open_weights`.
      quant_method: of config.json's `quantization_config`.

    Raises:
      InputError: naming the file and the weight: scales are missing or do not fit, or it lies outside of the layers.
    """
    suffix = _SCALES[quant_method]
    joined: dict[str, Any] = dict(stored)
    for name, tensor in stored.items():
        if tensor.dtype != CODE_DTYPE or not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        scales = joined.pop(module + suffix, None)
        joined.pop(module + ".input_scale", None)
        joined[name] = _weight(name, tensor, scales)
    left = next((name for name in joined if name.endswith(suffix)), None)
    if left is not None:
        raise InputError(f"{joined[left].file}: has {left} and no FP8 weight beside it; download it again.")
    return joined


def _weight(name: str, codes: StoredTensor, scales: StoredTensor | None) -> FP8Tensor:
    where = f"{codes.file}: {name}"
    if ".layers." not in name or len(codes.shape) != 2:
        raise InputError(
            f"{where} is in FP8, and only matrices inside of layers may be; use the 16-bit model."
        )
    if scales is None or scales.dtype.name not in _SCALE_DTYPES:
        raise InputError(
            f"{where} has no scales in 16 or 32 bits, without which it means nothing; download it again."
        )
    rows, columns = codes.shape
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {blocks: blocks, (rows, 1): (rows,), (rows,): (rows,)}
    shapes |= {(): (), (1,): (), (1, 1): ()}
    if scales.shape not in shapes:
        raise InputError(
            f"{where} has scales {list(scales.shape)}, and known are one, "
            f"one a row, and one a block of {BLOCK} x {BLOCK}."
        )
    form = FP8Array(
        jax.ShapeDtypeStruct(codes.shape, CODE_DTYPE),
        jax.ShapeDtypeStruct(shapes[scales.shape], jnp.float32),
    )
    # The file does not say what the weight was; whoever loads it replaces this by the dtype of the others.
    dtype = np.dtype(jnp.bfloat16)
    return FP8Tensor(dtype, codes.shape, codes.file, form, {"codes": codes, "scales": scales})  # type: ignore[arg-type]


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise InputError("config.json: quantization_config has modules that are no list of names.")
    return tuple(value)
