"""Quantised folders as transformers and bitsandbytes write them, in and out.

A 4-bit weight X is several tensors:

    X                                        uint8 [ceil(n / 2), 1], two codes a byte (or these bytes as another dtype)
    X.absmax                                 fp32 [blocks], or uint8 where scales are nested
    X.quant_map                              fp32 [16]
    X.nested_absmax, X.nested_quant_map      fp32 [ceil(blocks / 256)], fp32 [256]; only nested
    X.quant_state.bitsandbytes__nf4          uint8: JSON with quant_type, blocksize, dtype, shape, nested_offset, ..

and an 8-bit one, of a module M, is `M.weight` int8 [out, in], `M.SCB` fp32 [out] and `M.weight_format` uint8. Which
weights are quantised is read off the tensors; config.json's `quantization_config` is checked against them.

Checked against transformers 5.23 with bitsandbytes 0.50.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pronghorn.converters.safetensors_files import StoredTensor
from pronghorn.errors import InputError
from pronghorn.quantization import Int8Array, NF4Array, QuantizationConfig
from pronghorn.quantization.int8 import empty_like_int8
from pronghorn.quantization.nf4 import BLOCK_SIZES, empty_like_4bit
from pronghorn.quantization.rows import cut_rows, may_cut_nested
from pronghorn.quantization.tables import CODE_TABLES

BitsAndBytesArray = NF4Array | Int8Array
CONFIG_KEY = "quantization_config"
_STATE = ".quant_state.bitsandbytes__"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")
_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A quantised weight in a file; stands where a `StoredTensor` of the weight itself would.

    Attributes:
      dtype, shape: of the weight that it stands for.
      file: of its codes.
      form: its `NF4Array` or `Int8Array` with `jax.ShapeDtypeStruct` leaves.
      parts: {field of `form`: stored tensor}.
      offset: the nested offset of a 4-bit weight.
      cut: (form of the tensor in the file, first row) where this is a few rows of it: one of several linears.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    form: BitsAndBytesArray
    parts: Mapping[str, StoredTensor]
    offset: float | None = None
    cut: tuple[BitsAndBytesArray, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight that it stands for."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> BitsAndBytesArray:
        """The weight with numpy leaves, every bit as stored."""
        form = self.form if self.cut is None else self.cut[0]
        arrays: dict[str, Any] = {field: tensor.read() for field, tensor in self.parts.items()}
        if isinstance(form, NF4Array):
            arrays["codes"] = arrays["codes"].reshape(-1).view(np.uint8)
            if self.offset is not None:
                arrays["nested_offset"] = np.asarray(self.offset, np.float32)
        array = dataclasses.replace(form, **arrays)
        return array if self.cut is None else cut_rows(array, self.cut[1], self.shape[0])

    def rows(self, first: int, count: int) -> "QuantizedTensor":
        """Rows `first .. first + count`, one of the linears that the file holds as one.

        Raises:
          InputError: a block belongs to two of them.
        """
        if not isinstance(self.form, NF4Array | Int8Array):
            raise InputError(
                f"{self.file}: a tensor {list(self.shape)} holds several weights and is quantised as one; "
                "use the 16-bit model."
            )
        shape = (count, *self.shape[1:])
        form: BitsAndBytesArray = empty_like_int8(shape, self.dtype)
        if isinstance(self.form, NF4Array):
            size = self.form.block_size
            if any(edge * shape[1] % size for edge in (first, first + count)):
                raise InputError(
                    f"{self.file}: a tensor {list(self.shape)} that holds several linears is quantised in blocks of "
                    f"{size}, one of which belongs to two of them; use the 16-bit checkpoint."
                )
            nested = may_cut_nested(self.form, first, count)
            form = empty_like_4bit(shape, self.dtype, kind=self.form.kind, nested=nested, block_size=size)
        return dataclasses.replace(self, shape=shape, form=form, cut=(self.form, first))


def is_quantization_config(value: Any) -> bool:
    """Whether config.json's `quantization_config` is one of bitsandbytes."""
    return isinstance(value, dict) and value.get("quant_method", "bitsandbytes") == "bitsandbytes"


def quantization_of(value: Mapping[str, Any]) -> QuantizationConfig:
    """What a `quantization_config` says; the skipped modules may name some that the model lacks."""
    skip = value.get("llm_int8_skip_modules") or ()
    if not isinstance(skip, list | tuple) or not all(isinstance(name, str) for name in skip):
        raise InputError("config.json: quantization_config.llm_int8_skip_modules has to be a list of names.")
    if value.get("load_in_8bit") or value.get("_load_in_8bit"):
        return QuantizationConfig("int8", skip=tuple(skip))
    kind = value.get("bnb_4bit_quant_type", "fp4")
    if kind not in CODE_TABLES:
        raise InputError(
            f"config.json: quantization_config.bnb_4bit_quant_type is {kind!r}; supported are nf4 and fp4."
        )
    nested = bool(value.get("bnb_4bit_use_double_quant", False))
    return QuantizationConfig(kind, nested=nested, skip=tuple(skip))


def config_json(quantization: QuantizationConfig, dtype: str, skip: list[str] | None) -> dict[str, Any]:
    """The `quantization_config` that transformers writes for such a model, key by key."""
    eight = quantization.kind == "int8"
    return {
        "_load_in_4bit": not eight,
        "_load_in_8bit": eight,
        "bnb_4bit_compute_dtype": "float32" if eight else dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if eight else quantization.kind,
        "bnb_4bit_use_double_quant": quantization.nested and not eight,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "quant_method": "bitsandbytes",
    }


def join_tensors(
    folder: Path, stored: Mapping[str, StoredTensor], quantization: QuantizationConfig | None
) -> dict[str, Any]:
    """The tensors of a folder with those of each quantised weight joined into one `QuantizedTensor`.

    Args:
      stored: from `open_weights`.
      quantization: what config.json says, or None.

    Raises:
      InputError: naming the file and the weight: a part is missing or does not fit, a quant_state that cannot be read,
        a block size or table that is not known, or a weight that config.json says was left as it is.
    """
    joined: dict[str, Any] = dict(stored)
    for name in stored:
        weight, found, kind = name.partition(_STATE)
        if found:
            if weight not in stored:
                raise InputError(f"{stored[name].file}: has {name} and no {weight}; download it again.")
            fields = {suffix: joined.pop(weight + suffix, None) for suffix in (*_PARTS, _STATE + kind)}
            joined[weight] = _four_bit(weight, kind, stored[weight], fields)
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            weight = f"{module}.weight"
            form = joined.pop(f"{module}.weight_format", None)
            joined.pop(name)
            joined[weight] = _eight_bit(weight, stored.get(weight), stored[name], form)
    for name, tensor in joined.items():
        part = next((suffix for suffix in _PARTS if name.endswith(f".weight{suffix}")), None)
        if part is not None:
            raise InputError(
                f"{tensor.file}: {name.removesuffix(part)} has no quant_state, without which its codes mean nothing; "
                "download it again."
            )
        if isinstance(tensor, QuantizedTensor):
            if quantization is None:
                raise InputError(
                    f"{tensor.file}: {name} is quantised, and config.json has no {CONFIG_KEY} of bitsandbytes; "
                    "download both again."
                )
            if quantization.skips(name.removesuffix(".weight")):
                raise InputError(
                    f"{tensor.file}: {name} is quantised, and llm_int8_skip_modules of config.json says that it was "
                    "not; the two belong to different models."
                )
    return joined


def file_tensors(name: str, array: BitsAndBytesArray) -> dict[str, np.ndarray]:
    """{tensor name: array} of one quantised weight, as the file has them; not a stack."""
    if isinstance(array, Int8Array):
        return {
            name: np.asarray(array.codes),
            name.removesuffix(".weight") + ".SCB": np.asarray(array.scales),
            f"{name}_format": np.asarray(0, np.uint8),
        }
    state: dict[str, Any] = {
        "quant_type": array.kind,
        "blocksize": array.block_size,
        "dtype": array.dtype_name,
        "shape": list(array.matrix_shape),
    }
    tensors = {
        name: np.asarray(array.codes)[:, None],
        f"{name}.absmax": np.asarray(array.absmax),
        f"{name}.quant_map": CODE_TABLES[array.kind],
    }
    if array.nested:
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": float(array.nested_offset),
        }
        tensors |= {
            f"{name}.nested_absmax": np.asarray(array.nested_absmax),
            f"{name}.nested_quant_map": np.asarray(array.nested_table),
        }
    text = json.dumps(state).encode("utf-8")
    return tensors | {f"{name}{_STATE}{array.kind}": np.frombuffer(text, np.uint8)}


def describe(arrays: Mapping[str, BitsAndBytesArray], others: list[str], dtype: str) -> dict[str, Any]:
    """The `quantization_config` of a model.

    Args:
      arrays: {tensor name: quantised weight}, at least one.
      others: names of the linear weights inside of layers that are not quantised.
      dtype: the model's, such as "bfloat16".

    Raises:
      InputError: weights of several kinds, which one such file cannot describe.
    """
    # Every tensor says by itself whether its scales are nested; the configuration is for what is quantised anew.
    nested = any(getattr(array, "nested", False) for array in arrays.values())
    forms = {
        QuantizationConfig("int8", nested=False)
        if isinstance(array, Int8Array)
        else QuantizationConfig(array.kind, nested=nested)  # type: ignore[arg-type]
        for array in arrays.values()
    }
    if len(forms) > 1:
        raise InputError(
            "the model has weights quantised in several ways, and a bitsandbytes folder holds one; save it in 16 bits "
            "with save_merged."
        )
    # Given a list, transformers no longer skips the head by itself.
    skip = ["lm_head", *(name.removesuffix(".weight") for name in others)] if others else None
    return config_json(forms.pop(), dtype, skip)


def _four_bit(
    weight: str, kind: str, codes: StoredTensor, fields: Mapping[str, StoredTensor | None]
) -> QuantizedTensor:
    where = f"{codes.file}: {weight}"
    state = _state(where, fields[_STATE + kind])
    if state.get("quant_type") != kind or kind not in CODE_TABLES:
        raise InputError(f"{where} is of quant_type {kind!r}; supported are {', '.join(CODE_TABLES)}.")
    if state["blocksize"] not in BLOCK_SIZES:
        raise InputError(
            f"{where} has blocks of {str(state['blocksize'])[:20]} elements, and known are "
            f"{', '.join(map(str, BLOCK_SIZES))}; quantise the model again."
        )
    if state["dtype"] not in _DTYPES:
        raise InputError(f"{where} has dtype {str(state['dtype'])[:20]!r}; known are {', '.join(_DTYPES)}.")
    shape = state["shape"]
    counts = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    if not counts or len(shape) != 2:
        raise InputError(f"{where} has a quant_state whose shape is no matrix's; download it again.")
    nested = any(fields[part] is not None for part in (".nested_absmax", ".nested_quant_map"))
    nested = nested or any(key in state for key in _NESTED_KEYS)
    if nested and (state.get("nested_blocksize", 256), state.get("nested_dtype", "float32")) != (
        256,
        "float32",
    ):
        raise InputError(
            f"{where} has nested scales in blocks or a dtype not known; quantise the model again."
        )
    offset = state.get("nested_offset")
    if nested and (isinstance(offset, bool) or not isinstance(offset, int | float)):
        raise InputError(f"{where} has a quant_state without nested_offset; download it again.")
    form = empty_like_4bit(
        tuple(shape), _DTYPES[state["dtype"]], kind=kind, nested=nested, block_size=state["blocksize"]
    )
    parts = {"codes": codes, "absmax": fields[".absmax"]}
    if nested:
        parts |= {"nested_absmax": fields[".nested_absmax"], "nested_table": fields[".nested_quant_map"]}
    for field, tensor in parts.items():
        part = {"nested_table": "nested_quant_map"}.get(field, field)
        if tensor is None:
            raise InputError(f"{where} lacks its {part}; the download is incomplete.")
        expected = getattr(form, field)
        same = (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
        if field == "codes":  # any dtype may hold the bytes
            same = tensor.nbytes == expected.shape[0]
        if not same:
            raise InputError(
                f"{where} has {part} {tensor.dtype.name}{list(tensor.shape)} where its shape {shape} asks for "
                f"{expected.dtype.name}{list(expected.shape)}; download it again."
            )
    table = fields[".quant_map"]
    if table is None or table.shape != (16,) or not np.allclose(table.read(), CODE_TABLES[kind], atol=1e-6):
        raise InputError(f"{where} lacks the quant_map of {kind}, or has another; quantise the model again.")
    return QuantizedTensor(
        _DTYPES[state["dtype"]],
        tuple(shape),
        codes.file,
        form,
        {field: tensor for field, tensor in parts.items() if tensor is not None},
        float(offset) if nested and offset is not None else None,
    )


def _state(where: str, stored: StoredTensor | None) -> dict[str, Any]:
    """The JSON of a quant_state."""
    try:
        state = json.loads(b"" if stored is None else stored.read().tobytes().decode("utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{where} has a quant_state that is not valid JSON; download it again.") from None
    missing = [
        key
        for key in ("quant_type", "blocksize", "dtype", "shape")
        if not isinstance(state, dict) or key not in state
    ]
    if missing:
        raise InputError(f"{where} has a quant_state without {', '.join(missing)}; download it again.")
    return state


def _eight_bit(
    weight: str, codes: StoredTensor | None, scales: StoredTensor, layout: StoredTensor | None
) -> QuantizedTensor:
    where = f"{scales.file}: {weight}"
    if codes is None or codes.dtype != np.int8 or len(codes.shape) != 2:
        raise InputError(f"{where} has 8-bit scales and is no int8 matrix; download it again.")
    if (scales.shape, scales.dtype) != (codes.shape[:1], np.dtype(np.float32)):
        raise InputError(
            f"{where} has SCB {scales.dtype.name}{list(scales.shape)} where one fp32 a row is asked for."
        )
    if layout is not None and layout.read().reshape(-1).tolist() != [0]:
        raise InputError(
            f"{where} is stored in a layout of old GPUs; save it again with a newer bitsandbytes."
        )
    # The file does not say what the weight was; LLM.int8 goes by fp16.
    form = empty_like_int8(codes.shape, np.float16)
    return QuantizedTensor(
        np.dtype(np.float16), codes.shape, codes.file, form, {"codes": codes, "scales": scales}
    )
