"""Hugging Face model folders, in and out.

Reading streams one tensor at a time into the decoder. Writing streams one at a time into shards, carries along what
belongs to the model (`config.json`, tokenizer, chat template, generation config), and appears by one rename. Weights
that were not touched keep every bit, and `config.json` keeps every byte unless it would tell something untrue.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from pronghorn.converters import bitsandbytes
from pronghorn.converters.carried_files import carry_files, load_tokenizer, write_manifest, written_by_us
from pronghorn.converters.folder_tensors import cut_tensors, keep_dtypes, match_tensors
from pronghorn.converters.interleaved_tensors import interleaved, part_tensors
from pronghorn.converters.lazy_weights import LazyWeights, cast
from pronghorn.converters.quantized_weights import (
    check_scales,
    is_known_config,
    join_fused,
    join_tensors,
    packed_weights,
    quantized_forms,
    without_dtype,
)
from pronghorn.converters.read_ahead import ReadAhead
from pronghorn.converters.safetensors_files import (
    DEFAULT_SHARD_BYTES,
    TensorSpec,
    open_weights,
    write_weights,
)
from pronghorn.converters.sources import resolve_model_path
from pronghorn.converters.stacked_tensors import stack_tensors, unstack_quantized, unstacked
from pronghorn.converters.text_towers import has_tower, text_config, tower_tensors
from pronghorn.errors import InputError, RunError
from pronghorn.files import new_folder
from pronghorn.lora import merged_config, merged_weight
from pronghorn.lora_sites import sites
from pronghorn.models.config import DecoderConfig
from pronghorn.models.decoder import Decoder, Source
from pronghorn.models.families import WRAPPERS, Family, family_for, family_named
from pronghorn.models.parameters import assign, named_parameters, reading_order
from pronghorn.quantization import QuantizationConfig, read_quantization
from pronghorn.quantization.quantize_model import QuantizedArray, choose, make_abstract

__all__ = ["load", "load_model", "load_tokenizer", "read_config", "resolve_model_path", "save_model"]

DTYPES = ("bfloat16", "float16", "float32")
_MAX_CONFIG_BYTES = 1 << 24


def load(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    quantization: str | QuantizationConfig | None = None,
    dtype: str | None = "bfloat16",
    layers: Literal["unrolled", "scanned"] = "unrolled",
) -> tuple[Decoder, Any]:
    """A model and its tokenizer.

    Args:
      path: a Hugging Face folder, a `.gguf` file, or a hub name (cached, or downloaded).
      adapter: a PEFT folder to load on top.
      quantization: "nf4", "fp4", "int8" or "fp8", the path of a recipe that `pronghorn sensitivity` wrote (or a
        `QuantizationConfig`, which can leave modules out) for the linear weights inside of layers. A folder that
        bitsandbytes quantised is loaded as it is, without this.
      dtype: of weights and activations: "bfloat16", "float16", "float32"; None keeps the checkpoint's.
      layers: "unrolled" (faster steps) or "scanned" (faster compilation).

    Returns:
      (model, tokenizer); the tokenizer is transformers' own, or None where the folder has none.

    Raises:
      InputError: anything missing, damaged, unknown or contradictory, in one sentence.
    """
    quantization = read_quantization(quantization)
    folder = resolve_model_path(path, gguf_dtype=_dtype_name(dtype) or "bfloat16")
    family_for(read_config(folder)[0])  # transformers would warn of a model that is refused anyway
    tokenizer = load_tokenizer(folder)
    if adapter is None:
        return load_model(folder, dtype=dtype, layers=layers, quantization=quantization), tokenizer
    from pronghorn.converters.peft import adapter_tokenizer, load_adapter

    tokenizer = adapter_tokenizer(adapter, tokenizer)
    model = load_model(folder, dtype=dtype, layers=layers, quantization=quantization)
    return load_adapter(model, adapter), tokenizer


def load_model(
    path: str | Path,
    *,
    dtype: str | None = None,
    layers: Literal["unrolled", "scanned"] | None = None,
    quantization: str | QuantizationConfig | None = None,
) -> Decoder:
    """The decoder of a Hugging Face folder (or whatever `resolve_model_path` takes), on the default device.

    Host memory beside the model is the largest tensor, or one stack where layers are scanned, and a GiB that is read
    ahead. Quantised, up to three tensors are on the device in 16 bits.

    Args:
      path: folder, GGUF file or hub name.
      dtype: what every weight is cast to; None keeps each tensor's own, and computes in the commonest.
      layers: "unrolled", the default, or "scanned".
      quantization: as in `load`.

    Raises:
      InputError: naming the file, tensor or key that is wrong.
    """
    return read_weights(open_model(path, dtype=dtype, layers=layers, quantization=quantization))


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A folder whose tensors are matched with an architecture, none of them read.

    Attributes:
      folder: of the weights.
      model: with `jax.ShapeDtypeStruct` leaves, of the shapes, dtypes and quantised forms that `read_weights` gives it.
      table: {our name: stored tensor}.
      dtype: what every weight is cast to, or None.
      forms: {our name: quantised weight with abstract leaves}; ways: how those are quantised that are not stored so.
    """

    folder: Path
    model: Decoder
    table: Mapping[str, Any]
    dtype: str | None
    forms: dict[str, QuantizedArray]
    ways: Mapping[str, QuantizationConfig]


def open_model(
    path: str | Path,
    *,
    dtype: str | None = None,
    layers: Literal["unrolled", "scanned"] | None = None,
    quantization: str | QuantizationConfig | None = None,
) -> OpenedModel:
    """What `load_model` reads, by the headers of its files: enough to compile for, and nothing on the device.

    Arguments and errors are those of `load_model`, but for weights that turn out not to be finite.
    """
    dtype = _dtype_name(dtype)
    quantization = read_quantization(quantization)
    folder = resolve_model_path(path, gguf_dtype=dtype or "bfloat16")
    hf_config, text = read_config(folder)
    family = family_for(hf_config)
    config = family.config_from_hf(hf_config)
    joined = join_tensors(folder, open_weights(folder))
    tower = tower_tensors(joined)
    left_out = family.left_out(hf_config)
    tower = {name: tensor for name, tensor in tower.items() if not name.startswith(left_out)}
    stored = _our_tensors(folder, tower, family, config)
    names = family.tensor_names(config)
    sizes: Counter[str] = Counter()
    for theirs in names.values():
        if theirs in stored and not without_dtype(stored[theirs]):
            sizes[stored[theirs].dtype.name] += stored[theirs].nbytes
    commonest = next((name for name, _ in sizes.most_common() if name in DTYPES), "float32")
    model = Decoder.abstract(config, dtype=dtype or commonest, layers=layers or "unrolled")
    table = match_tensors(folder, model, names, stored)
    for name, tensor in table.items():
        if tensor.dtype.name not in DTYPES and not (dtype and tensor.dtype.name == "float64"):
            raise InputError(
                f"{tensor.file}: {name} has dtype {tensor.dtype.name}, and weights are read in {', '.join(DTYPES)}; "
                "use a checkpoint that is not quantised, or give a dtype."
            )
    if dtype is None and len(sizes) > 1:
        keep_dtypes(folder, model, table)
    ways: dict[str, QuantizationConfig] = {}
    if quantization is not None and not any(
        isinstance(t, bitsandbytes.QuantizedTensor) for t in table.values()
    ):
        ways = choose(named_parameters(model), names, quantization)
    forms = quantized_forms(folder, table, quantization, ways, dtype, commonest)
    make_abstract(named_parameters(model), forms)
    model.source = Source(path=str(folder), hf_config=text, dtype=commonest, wrapped=has_tower(joined))
    return OpenedModel(folder, model, table, dtype, forms, ways)


def read_weights(opened: OpenedModel) -> Decoder:
    """`opened.model`, whose leaves are arrays on the default device from now on.

    Raises:
      InputError: naming the file or tensor that is wrong.
    """
    model, table = opened.model, opened.table
    as_stored = frozenset(
        name for name, parameter in named_parameters(model).items() if parameter.keeps_dtype
    )
    with ReadAhead(table, (name for name in reading_order(model) if name in table)) as files:
        assign(model, LazyWeights(files, table, opened.dtype, opened.forms, opened.ways, as_stored))
    check_scales(opened.folder, model, opened.forms)
    return model


def _our_tensors(
    folder: str | Path, stored: Mapping[str, Any], family: Family, config: DecoderConfig
) -> dict[str, Any]:
    """The tensors of a folder by the names in `tensor_names`: what holds several of ours cut, experts stacked."""
    found = cut_tensors(stored, family.fused_tensors(config))
    found = stack_tensors(folder, found, family.stacked_tensors(config))
    return part_tensors(folder, found, family.interleaved_tensors(config))


def original_weights(folder: str | Path) -> Callable[[str], np.ndarray]:
    """A function from a linear layer's name ("layers.0.mlp.up_proj") to its weight in the folder, read when asked for.

    For `lora.init=loftq`, whose base was quantised after it was read.

    Raises:
      InputError: from the function, where the folder is quantised itself.
    """

    def read(name: str) -> np.ndarray:
        hf_config, _ = read_config(folder)
        family = family_for(hf_config)
        config = family.config_from_hf(hf_config)
        stored = _our_tensors(folder, open_weights(Path(folder)), family, config)
        theirs = family.tensor_names(config)[f"{name}.weight"]
        if theirs not in stored or stored[theirs].dtype.name not in DTYPES:
            raise InputError(
                f"lora.init=loftq: {folder} has no {theirs} in 16 or 32 bits, since it is quantised itself; give the "
                "folder that it was made from, and quantization."
            )
        return np.asarray(stored[theirs].read())

    return read


def read_config(folder: str | Path) -> tuple[dict[str, Any], str]:
    """`config.json` as a dict, and its text; without the quantization_config of bitsandbytes or FP8, and of a model
    that also sees images that of its text tower.

    Raises:
      InputError: it is missing, too large, or no JSON object.
    """
    path = Path(folder) / "config.json"
    if (Path(folder) / "adapter_config.json").is_file() and not path.is_file():
        raise InputError(f"{folder}: is an adapter; give its base model, and this folder as the adapter.")
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise InputError(f"{path}: over 16 MiB is no model configuration; check the folder.")
        # Bytes, since text mode would turn \r\n into \n and the file is to be written back as it was.
        text = path.read_bytes().decode("utf-8")
    except OSError:
        raise InputError(f"{path}: no such file; give the folder of a Hugging Face model.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; download it again.") from None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON ({str(error)[:100]}); download it again.") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: is no JSON object; download it again.")
    if is_known_config(config.get(bitsandbytes.CONFIG_KEY)):
        # How weights are stored is no part of the architecture; `quantized_weights` has it.
        del config[bitsandbytes.CONFIG_KEY]
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    if config.get("model_type") in WRAPPERS:
        config = text_config(config)
        family = family_for(config)
        config["architectures"] = family.config_to_hf(family.config_from_hf(config))["architectures"]
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return config, text


def save_model(
    model: Decoder,
    out_dir: str | Path,
    *,
    tokenizer_from: Any = None,
    dtype: str | None = None,
    quantization: str | QuantizationConfig | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a folder that transformers, vLLM and `load` read. It appears whole, or not at all.

    Quantised weights are written as bitsandbytes writes them, every bit as it is.

    Args:
      model: without an adapter (`save_adapter` and `save_merged` are for those).
      out_dir: must not exist, or be empty, or hold nothing but what an earlier save wrote (which is then replaced).
      tokenizer_from: a folder, or a transformers tokenizer; by default the folder that the model was loaded from.
      dtype: cast every weight; None writes each as it is.
      quantization: quantise the linear weights inside of layers, as in `load`; these are held on the host meanwhile.
      max_shard_bytes: largest file of weights.
      overwrite: replace `out_dir` whatever it holds.

    Raises:
      InputError: the folder is taken, the model has an adapter, or there is nothing to take the tokenizer from.
      RunError: the disk is full or cannot be written.
    """
    if model.adapter is not None:
        raise InputError(
            f"{out_dir}: the model has an adapter, which a model folder cannot hold; "
            "use save_adapter, or save_merged to merge it in."
        )
    out_dir = Path(out_dir)
    with new_folder(out_dir, replace=overwrite or written_by_us(out_dir)) as folder:
        write_model(
            folder,
            model,
            tokenizer_from=tokenizer_from,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            quantization=read_quantization(quantization),
            keep_quantized=True,
        )
        write_manifest(folder, "model")
    return out_dir


def write_model(
    folder: Path,
    model: Decoder,
    *,
    tokenizer_from: Any = None,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    quantization: QuantizationConfig | None = None,
    keep_quantized: bool = False,
) -> None:
    """Fill an existing folder with the model, adapters merged in one weight at a time.

    Args:
      quantization: quantise what the model has in 16 bits.
      keep_quantized: write quantised weights as they are; otherwise they are dequantised.
    """
    target = _dtype_name(dtype)
    config = merged_config(model)
    family = family_named(config.family)
    parameters, places = named_parameters(model), sites(model)
    ours = {theirs: name for name, theirs in family.tensor_names(config).items()}

    def value_of(name: str) -> Any:
        site = places.get(name.removesuffix(".weight"))
        return parameters[name].get() if site is None or name.endswith(".bias") else merged_weight(site)

    def spec_of(name: str) -> TensorSpec:
        # An untied head has no parameter of its own yet; it starts from the embedding.
        parameter = parameters.get(name) or parameters["embed_tokens.weight"]
        dtype = parameter.dtype if target is None or parameter.keeps_dtype else target
        return TensorSpec(np.dtype(dtype), parameter.shape)

    def fetch(tensor_name: str) -> np.ndarray:
        name = ours[tensor_name]
        array = np.asarray(value_of(name))
        uncast = target is None or (name in parameters and parameters[name].keeps_dtype)
        return array if uncast else cast(array, np.dtype(target), tensor_name)

    # What the family stores as one tensor is put together again.
    fused, layouts = family.fused_tensors(config), family.interleaved_tensors(config)
    parts = {part: name for name, pieces in fused.items() for part, _ in pieces}
    parts |= {part: name for name, layout in layouts.items() for part in layout.parts}

    def file_spec(name: str) -> TensorSpec:
        if name not in fused:
            return spec_of(ours[name])
        specs = [spec_of(ours[part]) for part, _ in fused[name]]
        return TensorSpec(specs[0].dtype, (sum(spec.shape[0] for spec in specs), *specs[0].shape[1:]))

    def fetch_file(name: str) -> np.ndarray:
        return np.concatenate([fetch(part) for part, _ in fused[name]]) if name in fused else fetch(name)

    stacks = family.stacked_tensors(config)
    file_spec, fetch_file = unstacked(stacks, file_spec, fetch_file)  # type: ignore[assignment]
    file_spec, fetch_file = interleaved(layouts, file_spec, fetch_file)  # type: ignore[assignment]
    text = _config_text(model, config, target or jnp.dtype(model.dtype).name)
    # No file holds a part of an interleaved tensor in bitsandbytes' form.
    whole_names = {part for layout in layouts.values() for part in layout.parts}
    named = {name: theirs for theirs, name in ours.items() if theirs not in whole_names}
    joined = join_fused(packed_weights(model, named, quantization, keep_quantized), fused)
    if joined:
        others = dict.fromkeys(
            file_name
            for theirs, name in ours.items()
            if (file_name := parts.get(theirs, theirs)) not in joined
            and name.startswith("layers.")
            and name.endswith(".weight")
            and len(parameters[name].shape) == 2
        )
        described = bitsandbytes.describe(joined, list(others), target or jnp.dtype(model.dtype).name)
        edited = json.loads(text) | {bitsandbytes.CONFIG_KEY: described}
        text = json.dumps(edited, indent=2, ensure_ascii=False) + "\n"
    small = {
        name: array
        for theirs, weight in unstack_quantized(joined, stacks).items()
        for name, array in bitsandbytes.file_tensors(theirs, weight).items()
    }
    carry_files(folder, model.source, tokenizer_from)
    (folder / "config.json").write_bytes(text.encode("utf-8"))
    whole = dict.fromkeys(file for name in ours if (file := parts.get(name, name)) not in joined)
    names = [name for file in whole for name in stacks.get(file, (file,))]
    specs = {name: file_spec(name) for name in names}
    specs |= {name: TensorSpec(array.dtype, array.shape) for name, array in small.items()}
    write_weights(
        folder,
        specs,
        lambda name: small[name] if name in small else fetch_file(name),
        max_shard_bytes=max_shard_bytes,
    )


def _dtype_name(dtype: Any) -> str | None:
    if dtype is None:
        return None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise InputError(f"dtype={name!r} is not supported; use one of {', '.join(DTYPES)}.")
    return name


def _config_text(model: Decoder, config: DecoderConfig, dtype: str) -> str:
    """The text of config.json: the original bytes, or the original with the untrue keys corrected."""
    if model.source is None:
        hf = family_named(config.family).config_to_hf(config) | {"dtype": dtype}
        return json.dumps(hf, indent=2, ensure_ascii=False) + "\n"
    hf = json.loads(model.source.hf_config)
    family = family_for(hf)
    edited = dict(hf)
    before = family.config_from_hf(hf)
    if before != config:
        # Only the keys that the change touches; everything else in the file stays.
        old, new = family.config_to_hf(before), family.config_to_hf(config)
        edited |= {key: value for key, value in new.items() if key not in old or old[key] != value}
        if before.rope != config.rope:
            edited.pop("rope_parameters", None)
    dtype_key = "torch_dtype" if "torch_dtype" in hf and "dtype" not in hf else "dtype"
    if hf.get(dtype_key, model.source.dtype) != dtype:
        edited[dtype_key] = dtype
    if edited == hf:
        return model.source.hf_config
    if family.config_from_hf(edited) != config:
        raise RunError(
            "config.json: the model's architecture cannot be written as Hugging Face keys; report this."
        )
    return json.dumps(edited, indent=2, ensure_ascii=False) + "\n"
