"""The quantised weights of a Hugging Face folder: which there are, what each will be, and what is written of a model.

Reading: tensors that bitsandbytes stored, or that are in FP8, are taken as they are, and a 16-bit folder is quantised
weight by weight as it is loaded. Writing: one such folder holds one kind, so 8-bit weights beside 4-bit ones are
written in 16 bits, with the very values that they had, and so are FP8 and MXFP4 weights.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.converters import bitsandbytes, fp8_checkpoints, mxfp4_checkpoints
from pronghorn.converters.safetensors_files import StoredTensor, open_weights
from pronghorn.errors import InputError
from pronghorn.lora import merged_weight
from pronghorn.lora_sites import sites
from pronghorn.models.decoder import Decoder
from pronghorn.models.parameters import named_parameters
from pronghorn.quantization import (
    FP8Array,
    Int8Array,
    MXFP4Array,
    QuantizationConfig,
    is_quantized,
    quantize,
)
from pronghorn.quantization.quantize_model import QuantizedArray, choose, empty_like, finite_scales
from pronghorn.quantization.rows import join_rows

_NAMED = 5


def stored_quantization(folder: str | Path) -> QuantizationConfig | None:
    """How the model in a folder was quantised, by its config.json, or None."""
    value = _config_value(folder)
    if fp8_checkpoints.is_fp8_config(value):
        return fp8_checkpoints.quantization_of(value)
    if mxfp4_checkpoints.is_mxfp4_config(value):
        return mxfp4_checkpoints.quantization_of(value)
    return bitsandbytes.quantization_of(value) if bitsandbytes.is_quantization_config(value) else None


def planned_quantization(folder: str | Path) -> QuantizationConfig | None:
    """`stored_quantization`, with experts skipped where the folder has them in 16 bits: transformers 5 quantises no
    stacks, and its config.json does not say so. Reads no weight."""
    config = stored_quantization(folder)
    if config is None or config.kind not in ("nf4", "fp4", "int8"):
        return config
    parts = (".absmax", ".SCB")
    if any(".experts." in name and name.endswith(parts) for name in open_weights(Path(folder))):
        return config
    return dataclasses.replace(config, skip=(*config.skip, r".*\.experts"))


def is_known_config(value: Any) -> bool:
    """Whether config.json's `quantization_config` says how weights are stored, and can be read."""
    known = (
        bitsandbytes.is_quantization_config,
        fp8_checkpoints.is_fp8_config,
        mxfp4_checkpoints.is_mxfp4_config,
    )
    return any(is_known(value) for is_known in known)


def join_tensors(folder: Path, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The tensors of a folder, those of each quantised weight joined into one.

    Raises:
      InputError: naming the file and the weight whose parts are missing or do not fit.
    """
    value = _config_value(folder)
    if fp8_checkpoints.is_fp8_config(value):
        fp8_checkpoints.quantization_of(value)
        return fp8_checkpoints.join_tensors(stored, value["quant_method"])
    if mxfp4_checkpoints.is_mxfp4_config(value):
        return mxfp4_checkpoints.join_tensors(stored)
    return bitsandbytes.join_tensors(folder, stored, stored_quantization(folder))


def _config_value(folder: str | Path) -> Any:
    path = Path(folder) / "config.json"
    return json.loads(path.read_bytes().decode("utf-8")).get(bitsandbytes.CONFIG_KEY)


def without_dtype(tensor: Any) -> bool:
    """Whether a tensor is a quantised weight whose file does not say what it was."""
    kinds = Int8Array | FP8Array | MXFP4Array
    return isinstance(tensor, bitsandbytes.QuantizedTensor) and isinstance(tensor.form, kinds)


def quantized_forms(
    folder: Path,
    table: Mapping[str, Any],
    quantization: QuantizationConfig | None,
    ways: Mapping[str, QuantizationConfig],
    dtype: str | None,
    commonest: str,
) -> dict[str, QuantizedArray]:
    """{our name: what its weight will be, with abstract leaves} of the weights that are or will be quantised.

    Args:
      table: {our name: stored tensor}.
      quantization: asked for, or None; `ways`: what it means for each weight.
      dtype: asked for, or None; `commonest`: of the folder.

    Raises:
      InputError: the folder is quantised in another way already.
    """
    forms: dict[str, QuantizedArray] = {}
    for name, tensor in table.items():
        if isinstance(tensor, bitsandbytes.QuantizedTensor):
            chosen = dtype or (commonest if without_dtype(tensor) else tensor.dtype.name)
            forms[name] = dataclasses.replace(tensor.form, dtype_name=chosen)
    if quantization is None:
        return forms
    kinds = {getattr(form, "kind", "int8") for form in forms.values()}
    if forms and (kinds != {quantization.kind} or quantization.modules):
        raise InputError(
            f"{folder}: is quantised as {', '.join(sorted(kinds))} already; leave quantization={quantization.kind!r} "
            "out, or give the 16-bit model."
        )
    if forms:
        return forms
    return {
        name: empty_like(table[name].shape, dtype or table[name].dtype, how) for name, how in ways.items()
    }


def check_scales(folder: Path, model: Decoder, forms: dict[str, QuantizedArray]) -> None:
    """Refuse weights that are NaN, infinite, or too large for the kind: their scales show it."""
    if not forms:
        return
    parameters = named_parameters(model)
    named = {id(parameters[name].variable): name for name in forms}
    fine = np.asarray(finite_scales(parameters[name].variable.get_value() for name in named.values()))
    broken = [name for name, ok in zip(named.values(), fine, strict=True) if not ok]
    if broken:
        listed = ", ".join(broken[:_NAMED]) + (" and others" if len(broken) > _NAMED else "")
        raise InputError(
            f"{folder}: {listed} has values that are not finite, or too large to be quantised; "
            "download the weights again, or load them without quantization."
        )


def packed_weights(
    model: Decoder,
    names: Mapping[str, str],
    quantization: QuantizationConfig | None,
    keep_quantized: bool,
) -> dict[str, bitsandbytes.BitsAndBytesArray]:
    """{tensor name: quantised weight with numpy leaves} of what is to be written so.

    Args:
      names: {our name: tensor name} of the whole model.
      quantization: quantise what the model has in 16 bits.
      keep_quantized: write quantised weights as they are; otherwise they are dequantised.

    Raises:
      InputError: FP8 is asked for.
    """
    parameters, places = named_parameters(model), sites(model)
    ways = choose(parameters, names, quantization) if quantization is not None else {}
    if any(way.kind == "fp8" for way in ways.values()):
        raise InputError(
            "quantization='fp8' is for loading: no folder is written in FP8; leave it out, and load the folder with it."
        )
    kinds = {name: way.kind for name, way in ways.items()}
    for name in names:
        value = parameters[name].variable.get_value() if keep_quantized and name in parameters else None
        if is_quantized(value):
            kinds[name] = getattr(value, "kind", "int8")
    kinds = {name: kind for name, kind in kinds.items() if kind not in ("fp8", "mxfp4")}
    if set(kinds.values()) - {"int8"}:
        kinds = {name: kind for name, kind in kinds.items() if kind != "int8"}
    packed: dict[str, Any] = {}
    for name in kinds:
        value = parameters[name].get()
        if not keep_quantized or not is_quantized(value):
            value = quantize(jnp.asarray(merged_weight(places[name.removesuffix(".weight")])), ways[name])
        packed[names[name]] = jax.tree.map(np.asarray, value)
    return packed


def join_fused(packed: Mapping[str, Any], fused: Mapping[str, tuple[tuple[str, int], ...]]) -> dict[str, Any]:
    """The quantised weights of a file, those that it holds as one put together.

    Left out, to be written in 16 bits with the values that they had, are those that are not all quantised in one way.
    """
    joined = dict(packed)
    for name, pieces in fused.items():
        parts = [joined.pop(part, None) for part, _ in pieces]
        whole = None if any(part is None for part in parts) else join_rows(parts)
        if whole is not None:
            joined[name] = whole
    return joined
