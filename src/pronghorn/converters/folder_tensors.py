"""A folder's tensors beside the architecture of its config.json: every one has a place, a shape and a dtype."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.converters import bitsandbytes
from pronghorn.converters.safetensors_files import StoredTensor
from pronghorn.errors import InputError
from pronghorn.models.decoder import Decoder
from pronghorn.models.parameters import named_parameters

_NAMED = 5


def cut_tensors(
    stored: Mapping[str, Any], fused: Mapping[str, tuple[tuple[str, int], ...]]
) -> dict[str, Any]:
    """The tensors of a folder, each one that holds several cut into these: rows lie one after the other in the file.

    Raises:
      InputError: a tensor does not have the rows of its parts, or is quantised in blocks that two of them share.
    """
    cut = dict(stored)
    for name, parts in fused.items():
        if name not in cut:
            continue
        tensor = cut.pop(name)
        if tensor.shape[:1] != (sum(rows for _, rows in parts),):
            raise InputError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)} and config.json asks for "
                f"{sum(rows for _, rows in parts)} rows; config.json belongs to another model."
            )
        if isinstance(tensor, bitsandbytes.QuantizedTensor):
            first = 0
            for part, rows in parts:
                cut[part] = tensor.rows(first, rows)
                first += rows
            continue
        offset = tensor.offset
        for part, rows in parts:
            cut[part] = dataclasses.replace(tensor, shape=(rows, *tensor.shape[1:]), offset=offset)
            offset += cut[part].nbytes
    return cut


def match_tensors(
    folder: Path, model: Decoder, names: Mapping[str, str], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """{our name: stored tensor}, after every name and shape has been compared with the architecture."""
    config = model.config
    shapes = {name: parameter.shape for name, parameter in named_parameters(model).items()}
    missing = [theirs for theirs in names.values() if theirs not in stored]
    expected = set(names.values())
    extra = [name for name in stored if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        _check_tied_copy(folder, stored["lm_head.weight"], stored.get(names["embed_tokens.weight"]))
        extra.remove("lm_head.weight")
    if missing:
        raise InputError(
            f"{folder}: the weights lack {_listed(missing)}, which config.json asks for; "
            "the download is incomplete or config.json belongs to another model."
        )
    if extra:
        raise InputError(
            f"{folder}: the weights have {_listed(extra)}, which config.json does not describe; "
            "config.json belongs to another model."
        )
    rows = stored[names["embed_tokens.weight"]].shape[:1]
    if rows != (config.vocab_size,) and len(stored[names["embed_tokens.weight"]].shape) == 2:
        raise InputError(
            f"{folder}: the embedding has {rows[0]} rows and config.json says vocab_size {config.vocab_size}; "
            f"set vocab_size to {rows[0]} if the weights are right."
        )
    for name, theirs in names.items():
        if stored[theirs].shape != shapes[name]:
            raise InputError(
                f"{stored[theirs].file}: {theirs} has shape {list(stored[theirs].shape)} and config.json asks for "
                f"{list(shapes[name])}; config.json belongs to another model."
            )
    return {name: stored[theirs] for name, theirs in names.items()}


def _check_tied_copy(folder: Path, head: StoredTensor, embedding: StoredTensor | None) -> None:
    """A tied checkpoint may hold the head a second time, as long as it is the same."""
    same = embedding is not None and (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if not same or head.read().tobytes() != embedding.read().tobytes():  # type: ignore[union-attr]
        raise InputError(
            f"{folder}: config.json says that lm_head.weight is the embedding, and the file has another one; "
            'set "tie_word_embeddings": false in config.json if the file is right.'
        )


def keep_dtypes(folder: Path, model: Decoder, table: Mapping[str, StoredTensor]) -> None:
    """Give the abstract leaves of `model` the dtypes of their tensors, where a checkpoint mixes them."""
    seen: dict[int, tuple[str, np.dtype]] = {}
    for name, parameter in named_parameters(model).items():
        dtype = table[name].dtype
        first, first_dtype = seen.setdefault(id(parameter.variable), (name, dtype))
        if dtype != first_dtype:
            raise InputError(
                f"{folder}: {first} is {first_dtype.name} and {name} is {dtype.name}, which one stack cannot hold; "
                'give a dtype, or layers="unrolled".'
            )
        leaf = parameter.variable.get_value()
        parameter.variable.set_value(jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
