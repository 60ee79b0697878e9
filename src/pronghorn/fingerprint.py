"""Fingerprints of base models: an adapter remembers which weights it was trained on.

A fingerprint has three parts, because one base is met in several forms. Quantised, its linears have other values and
its embeddings and norms the same; as a bf16 copy of an fp32 checkpoint, every value is rounded. So linears are hashed
apart, and sampled values are rounded to bfloat16 first.
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.models.decoder import Decoder
from pronghorn.models.parameters import named_parameters

_GRID = 16  # sampled entries an axis: 256 of a matrix, 16 of a vector
_UNKNOWN = ("quantized", "abstract")


def base_hash(model: Decoder) -> str:
    """`v1-structure-common-linear`, the last three 16 hex digits each; adapters in the model do not count.

    structure: names and shapes of the parameters and the architecture. common: sampled values of embeddings and
    norms. linear: sampled values of everything else, or "quantized" where any of it is quantised. A model without
    values (`Decoder.abstract`) has "abstract" for the last two. A model that was given new tokens has the fingerprint
    it had before.
    """
    if model.new_tokens is not None:
        return model.new_tokens.base_hash
    structure: list[Any] = [_departures(model.config)]
    samples: dict[str, Any] = {}
    quantized = abstract = False
    for name, parameter in sorted(named_parameters(model).items()):
        if ".lora_" in name or (name.startswith("lm_head.") and model.config.tie_word_embeddings):
            continue
        structure.append([name, list(parameter.shape)])
        value = parameter.variable.get_value()
        if hasattr(value, "dequantize"):
            quantized = True
        elif isinstance(value, jax.ShapeDtypeStruct):
            abstract = True
        else:
            samples[name] = _sample(parameter.get())
    hashes = {"common": hashlib.sha256(), "linear": hashlib.sha256()}
    for name, sample in jax.device_get(samples).items():
        part = "common" if name.startswith("embed_tokens.") or "norm." in name else "linear"
        hashes[part].update(name.encode() + np.asarray(sample).tobytes())
    common, linear = (hash_.hexdigest()[:16] for hash_ in hashes.values())
    if quantized:
        linear = "quantized"
    if abstract:
        common = linear = "abstract"
    return f"v1-{hashlib.sha256(json.dumps(structure).encode()).hexdigest()[:16]}-{common}-{linear}"


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints can be of one base model: equal in every part that both know."""
    parts = list(zip(one.split("-"), other.split("-"), strict=False))
    known = [(a, b) for a, b in parts if a not in _UNKNOWN and b not in _UNKNOWN]
    return len(parts) == 4 and all(a == b for a, b in known)


def _departures(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, so that a field added later changes no old fingerprint."""
    result = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            result[field.name] = _departures(value) if dataclasses.is_dataclass(value) else value
    return dict(sorted(result.items()))


@jax.jit
def _sample(value: jax.Array) -> jax.Array:
    for axis, size in enumerate(value.shape):
        grid = np.unique(np.linspace(0, size - 1, _GRID).astype(int))
        value = jnp.take(value, grid, axis=axis)
    return value.astype(jnp.bfloat16)
