"""PEFT adapter folders, in and out (https://github.com/huggingface/peft, checked against 0.21).

`adapter_model.safetensors` holds `base_model.model.<module>.lora_A.weight` `[r, in]` and `lora_B.weight` `[out, r]`; an
embedding's are `lora_embedding_A` `[r, vocab]` and `lora_embedding_B` `[d, r]`, without `.weight`. The scale is not
stored: it follows from `r`, `lora_alpha`, `use_rslora` and the two patterns of `adapter_config.json`. The trained rows
of new tokens are `...embed_tokens.token_adapter.trainable_tokens_delta` `[n, d]`: the rows themselves, whatever the
name says. DoRA's lengths of rows are `lora_magnitude_vector` `[out]`. What LoRA is not (biases, whole modules, starts
that changed the base) is refused in words. Linears that transformers has as one and we have as several are in
`peft_sites.py`.

Beside PEFT's two files stands `pronghorn.json`: rank, alpha, targets, the fingerprint of the base model, a hash of the
chat template and of the weights, so that an adapter cannot quietly meet another model.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.converters.carried_files import (
    MANIFEST,
    chat_template_hash,
    load_tokenizer,
    same_tokenizer,
    source_tokenizer,
    write_manifest,
    written_by_us,
)
from pronghorn.converters.peft_config import (
    CONFIG_NAME,
    config_of,
    expected_modules,
    listed,
    new_token_range,
    pattern_keys,
    pattern_value,
    read_config,
    targets_of,
)
from pronghorn.converters.peft_sites import (
    FusedSite,
    ParameterSite,
    alpha_of,
    cut_factors,
    factors_at,
    join_experts,
    joins_experts,
    module_names,
    parameter_paths,
    peft_sites,
)
from pronghorn.converters.safetensors_files import (
    StoredTensor,
    TensorSpec,
    inside_folder,
    read_header,
    write_file,
)
from pronghorn.converters.text_towers import tower_name
from pronghorn.errors import InputError
from pronghorn.files import new_folder
from pronghorn.fingerprint import base_hash, same_base
from pronghorn.lora import EMBEDDING, HEAD, AdapterInfo, adapter_scale, attach
from pronghorn.lora_sites import Factors, Site, sites
from pronghorn.models.config import DecoderConfig
from pronghorn.models.decoder import Decoder
from pronghorn.new_tokens import with_tokens

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_SUFFIXES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
    ".token_adapter.base_layer.weight": "base",
    ".base_layer.weight": "base",
    ".weight": "base",
}


def save_adapter(
    model: Decoder, out_dir: str | Path, *, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Write the model's adapter as a folder that PEFT loads. It appears whole, or not at all.

    Args:
      model: with an adapter.
      out_dir: must not exist, or be empty, or hold nothing but what an earlier save wrote (which is then replaced).
      tokenizer: the one used in training. It is written beside the adapter where it is not the base model's own
        (another chat template, added tokens), so that the adapter is never used with a template it has not seen.
      overwrite: replace `out_dir` whatever it holds.

    Raises:
      InputError: there is no adapter, or the folder is taken.
      RunError: the disk is full or cannot be written.
    """
    out_dir, info = Path(out_dir), model.adapter
    info = None if info is None else as_plain_lora(model, info)
    joined = info is not None and joins_experts(model, info)
    places = peft_sites(model, joined_experts=joined)
    found = {name: (site, factors_at(site)) for name, site in places.items()}
    adapted = {name: (site, factors) for name, (site, factors) in found.items() if factors is not None}
    if info is None or not adapted:
        raise InputError(f"{out_dir}: the model has no adapter to save; use add_lora first, or save_model.")
    modules = module_names(model, joined_experts=joined)
    paths = modules | parameter_paths({name: site for name, (site, _) in adapted.items()}, modules, adapted)
    arrays: dict[str, tuple[TensorSpec, Any]] = {}
    for name, (site, factors) in adapted.items():
        embedding = name == EMBEDDING
        a, b = site.to_file(factors.a, factors.b) if isinstance(site, FusedSite) else (factors.a, factors.b)
        for letter, array in (("A", a), ("B", b)):
            suffix = f".lora_embedding_{letter}" if embedding else f".lora_{letter}.weight"
            spec = TensorSpec(np.dtype(array.dtype), tuple(array.shape))
            arrays[PREFIX + paths[name] + suffix] = (spec, array)
        if factors.magnitude is not None:
            spec = TensorSpec(np.dtype(np.float32), tuple(factors.magnitude.shape))
            arrays[PREFIX + modules[name] + ".lora_magnitude_vector"] = (spec, factors.magnitude)
    for name, site in sites(model).items():
        tied_copy = name == HEAD and model.config.tie_word_embeddings
        if site.new_rows is not None and not tied_copy:
            rows = site.new_rows.get_value()
            spec = TensorSpec(np.dtype(rows.dtype), tuple(rows.shape))
            arrays[PREFIX + modules[name] + ".token_adapter.trainable_tokens_delta"] = (spec, rows)
    own_tokenizer = tokenizer is not None and not same_tokenizer(tokenizer, source_tokenizer(model.source))
    with new_folder(out_dir, replace=overwrite or written_by_us(out_dir)) as folder:
        write_file(
            folder / WEIGHTS_NAME,
            {name: spec for name, (spec, _) in arrays.items()},
            lambda name: np.asarray(arrays[name][1]),
        )
        config = (
            json.dumps(config_of(model, info, adapted, modules, places), indent=2, ensure_ascii=False) + "\n"
        )
        (folder / CONFIG_NAME).write_text(config, encoding="utf-8")
        if own_tokenizer:
            tokenizer.save_pretrained(str(folder))
        write_manifest(
            folder,
            "adapter",
            rank=info.rank,
            alpha=info.alpha,
            use_rslora=info.use_rslora,
            use_dora=info.use_dora,
            init=info.init,
            dropout=info.dropout,
            targets=list(info.targets),
            layers=None if info.layers is None else list(info.layers),
            base_hash=info.base_hash,
            template_hash=chat_template_hash(
                tokenizer if tokenizer is not None else source_tokenizer(model.source)
            ),
            sha256=_sha256(folder / WEIGHTS_NAME),
        )
    return out_dir


def load_adapter(model: Decoder, path: str | Path, *, check_base: bool = True) -> Decoder:
    """A new model with the adapter of a PEFT folder; it shares the base weights' arrays with `model`.

    Args:
      model: the base model, without an adapter; one of shapes alone is compared by names and shapes.
      path: the folder.
      check_base: refuse an adapter that pronghorn trained on other base weights; an adapter made elsewhere does not
        say what it was trained on, beyond names and shapes.

    Raises:
      InputError: the folder is damaged, holds what LoRA is not, or belongs to another model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds {CONFIG_NAME}.")
    if model.adapter is not None:
        raise InputError(f"{folder}: the model has an adapter already; merge it with merge_lora first.")
    config = read_config(folder)
    manifest = read_manifest(folder)
    tensors = _read_tensors(folder, manifest)
    joined = bool(config["target_parameters"])
    places = peft_sites(model, joined_experts=joined)
    modules = module_names(model, joined_experts=joined)
    expected = expected_modules(folder, config, modules, places)
    keys = pattern_keys(folder, config, modules, places)
    paths = {name: path for name, path in modules.items() if not isinstance(places[name], ParameterSite)}
    paths |= parameter_paths(places, modules, expected)
    found = _group(folder, tensors, {tower_name(path): name for name, path in paths.items()})
    _check_base_copies(folder, places, found, new_token_range(folder, config, modules)[:2])
    rows = {name: parts["rows"] for name, parts in found.items() if "rows" in parts}
    found = {name: parts for name, parts in found.items() if "a" in parts or "b" in parts}
    if expected != set(found):
        wrong = sorted(expected ^ set(found))
        raise InputError(
            f"{folder}: {CONFIG_NAME} and {WEIGHTS_NAME} disagree about {listed(wrong)}; the adapter is incomplete, "
            "was made for another model, or was edited."
        )
    here, there = base_hash(model), str(manifest.get("base_hash") or "")
    if check_base and there and not same_base(here, there):
        raise InputError(
            f"{folder}: was trained on another base model than this one ({there} there, {here} here); "
            "load the base it belongs to."
        )
    model, new_rows = _with_new_tokens(folder, model, config, modules, rows)
    factors: dict[str, Factors] = {}
    alphas: dict[str, float] = {}
    for name, parts in found.items():
        rank = pattern_value(folder, config, "rank_pattern", keys[name], config["r"])
        alpha = pattern_value(folder, config, "alpha_pattern", keys[name], config["lora_alpha"])
        site, scale = places[name], adapter_scale(rank, alpha, config["use_rslora"])
        read = _factors(folder, site, parts, rank, scale, use_dora=config["use_dora"])
        for ours, own in (cut_factors(site, read) if isinstance(site, FusedSite) else {name: read}).items():
            factors[ours] = own
            own_alpha = alpha_of(own, float(alpha), config["use_rslora"])
            if own_alpha != config["lora_alpha"]:
                alphas[ours] = own_alpha
    layers = config["layers_to_transform"]
    return attach(
        model,
        join_experts(folder, places, factors),
        AdapterInfo(
            rank=config["r"],
            alpha=float(config["lora_alpha"]),
            use_rslora=config["use_rslora"],
            dropout=_dropout(config, manifest),
            targets=targets_of(config["target_modules"]) + tuple(config["target_parameters"]),
            layers=None if layers is None else tuple(layers),
            base_hash=here,
            use_dora=config["use_dora"],
            alpha_pattern=tuple(alphas.items()),
        ),
        new_rows,
    )


def _dropout(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> float:
    """That of training: PEFT takes none beside `target_parameters`, so there the manifest has it."""
    own = manifest.get("dropout")
    if config["target_parameters"] and isinstance(own, float) and 0.0 <= own < 1.0:
        return own
    return float(config["lora_dropout"])


def _with_new_tokens(
    folder: Path,
    model: Decoder,
    config: Mapping[str, Any],
    modules: Mapping[str, str],
    stored: Mapping[str, StoredTensor],
) -> tuple[Decoder, dict[str, Any] | None]:
    """The model with the vocabulary that the adapter has trained rows for, and those rows; as it is without any."""
    first, count, names = new_token_range(folder, config, modules)
    tied = model.config.tie_word_embeddings
    if (
        tied and HEAD in stored and EMBEDDING in stored and HEAD not in names
    ):  # PEFT may write the one rows twice
        if stored[HEAD].read().tobytes() != stored[EMBEDDING].read().tobytes():
            raise InputError(
                f"{folder}: has two versions of new tokens that the model ties; merge it with PEFT."
            )
        stored = {EMBEDDING: stored[EMBEDDING]}
    if set(names) != set(stored) or (HEAD in names and tied):
        raise InputError(
            f"{folder}: {CONFIG_NAME} and {WEIGHTS_NAME} disagree about the trained tokens of "
            f"{listed(sorted(set(names) ^ set(stored)) or [HEAD])}; the "
            "adapter was made for another model, or was edited."
        )
    if not names:
        return model, None
    shape = (count, model.config.hidden_size)
    rows = {
        name: _finite_array(folder, f"the rows of new tokens of {name}", stored[name], shape)
        for name in names
    }
    if model.new_tokens is None:
        model = with_tokens(model, first, count)
    elif (model.new_tokens.first, model.new_tokens.count) != (first, count):
        raise InputError(
            f"{folder}: trains tokens {first} to {first + count - 1}, and the model was given others; "
            "load the base anew."
        )
    return model, rows


def adapter_vocab_size(path: str | Path, config: DecoderConfig) -> int:
    """Rows of the embedding once the adapter in a folder is loaded on a model of this architecture."""
    names = module_names(Decoder.abstract(config))
    first, count, _ = new_token_range(Path(path), read_config(Path(path)), names)
    return max(config.vocab_size, first + count)


def adapter_tokenizer(path: str | Path, base: Any) -> Any:
    """The tokenizer to use an adapter with: the one stored beside it, else the base model's.

    Args:
      path: the adapter's folder.
      base: the base model's tokenizer, or None.

    Raises:
      InputError: there is no adapter, or it was trained with another chat template and its tokenizer is not there.
    """
    folder = Path(path)
    read_config(folder)  # before any weight of the base is read
    own = load_tokenizer(folder)
    if own is not None:
        return own
    trained = read_manifest(folder).get("template_hash")
    if trained and trained != chat_template_hash(base):
        raise InputError(
            f"{folder}: was trained with another chat template than the base model's, and the tokenizer that has it is "
            "not in the folder; put it there, or save the adapter again with save_adapter(..., tokenizer=...)."
        )
    return base


def read_manifest(folder: Path) -> dict[str, Any]:
    """`pronghorn.json` of an adapter folder; empty where there is none.

    Raises:
      InputError: it is there and cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: is not valid JSON; copy the adapter again, or remove this file.")
    return manifest


def as_plain_lora(model: Decoder, info: AdapterInfo) -> AdapterInfo:
    """`info` for the factors that `Site.factors` gives: where they hold a start that is part of the base, their rank is
    twice `info.rank`, and alpha grows with it so that the scale stays."""
    started = any(getattr(s.module, "lora_start_A", None) is not None for s in sites(model).values())
    if not started:
        return info
    growth = 2**0.5 if info.use_rslora else 2.0
    return dataclasses.replace(
        info,
        rank=2 * info.rank,
        alpha=growth * info.alpha,
        alpha_pattern=tuple((name, growth * alpha) for name, alpha in info.alpha_pattern),
        init="kaiming",
    )


def _read_tensors(folder: Path, manifest: Mapping[str, Any]) -> dict[str, StoredTensor]:
    if not (folder / WEIGHTS_NAME).exists():
        if (folder / "adapter_model.bin").exists():
            raise InputError(
                f"{folder}: has only pickled weights (adapter_model.bin), which can run code when opened and are never "
                "read here; load the adapter with PEFT where you trust it and save it again."
            )
        raise InputError(f"{folder}: has no {WEIGHTS_NAME}; give the folder of a PEFT adapter.")
    path = inside_folder(folder, WEIGHTS_NAME)
    tensors, _ = read_header(path)
    if manifest.get("sha256") and manifest["sha256"] != _sha256(path):
        raise InputError(
            f"{path}: is not the file that was saved (its hash differs from {MANIFEST}); copy the adapter again, or "
            f"remove {MANIFEST} if you changed it on purpose."
        )
    return tensors


def _group(
    folder: Path, tensors: Mapping[str, StoredTensor], names: Mapping[str, str]
) -> dict[str, dict[str, StoredTensor]]:
    """{our module name: {"a": .., "b": .., "base": ..}}."""
    found: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), "")
        name = names.get(tower_name(key.removeprefix(PREFIX).removesuffix(suffix))) if suffix else None
        embedding = "lora_embedding" in suffix
        rows = suffix.startswith(".token_adapter")
        if (
            name is None
            or (rows and name not in (EMBEDDING, HEAD))
            or (suffix.startswith(".lora") and embedding != (name == EMBEDDING))
        ):
            unknown.append(key)
        else:
            found.setdefault(name, {})[_SUFFIXES[suffix]] = tensor
    if unknown:
        raise InputError(
            f"{folder}: the adapter has {listed(unknown)}, and the model has no such linear; "
            "it belongs to another model."
        )
    return found


def _check_base_copies(
    folder: Path,
    places: Mapping[str, Site | FusedSite],
    found: Mapping[str, Mapping[str, StoredTensor]],
    new: tuple[int, int],
) -> None:
    """PEFT stores the base weight of an adapted embedding or head as well; it has to be the model's own.

    Rows of trained tokens may differ and be more: the trained ones stand in for them.
    """
    first, count = new
    for name, parts in found.items():
        site = places[name]
        if "base" not in parts or isinstance(site, FusedSite):
            continue
        weight = site.module.weight.get_value()
        if hasattr(weight, "dequantize"):
            continue  # only embeddings and heads are stored, and a quantised one is not the stored one anyway
        stored = parts["base"]
        same = stored.shape == (max(weight.shape[0], first + count), *weight.shape[1:])
        abstract = isinstance(weight, jax.ShapeDtypeStruct)  # without values to compare
        if same and not abstract:
            own = np.asarray(weight)
            copy = stored.read().astype(own.dtype)[: len(own)]
            kept = (np.arange(len(own)) < first) | (np.arange(len(own)) >= first + count)
            same = np.array_equal(copy[kept], own[kept])
        if not same:
            raise InputError(
                f"{folder}: stores a weight of {name} that is not this model's; it belongs to another model, or its "
                "vocabulary was resized (merge it with PEFT)."
            )


def _factors(
    folder: Path,
    site: Site | FusedSite,
    parts: Mapping[str, StoredTensor],
    rank: int,
    scale: float,
    *,
    use_dora: bool,
) -> Factors:
    fan_out, fan_in = site.shape
    in_file = site.file_shapes(rank) if isinstance(site, FusedSite) else ((rank, fan_in), (fan_out, rank))
    shapes: dict[str, tuple[int, ...]] = dict(zip("ab", in_file, strict=True))
    if use_dora:
        shapes["magnitude"] = (fan_out,)
    if not shapes.keys() <= parts.keys():
        raise InputError(f"{folder}: the adapter of {site.name} lacks one of its factors; copy it again.")
    if use_dora and site.name in (HEAD, EMBEDDING):
        raise InputError(
            f"{folder}: has DoRA on {site.name}, which is supported inside of layers only; merge it with PEFT."
        )
    arrays = []
    for letter, shape in shapes.items():
        what, asked = f"{letter.upper()} of {site.name}", f"rank {rank} and the model ask"
        arrays.append(_finite_array(folder, what, parts[letter], shape, asked))
    return Factors(arrays[0], arrays[1], scale, arrays[2] if use_dora else None)


def _finite_array(
    folder: Path, what: str, stored: StoredTensor, shape: tuple[int, ...], asked: str = "the model asks"
) -> Any:
    if stored.shape != shape:
        raise InputError(
            f"{folder}: {what} has shape {list(stored.shape)} where {asked} for {list(shape)}; the adapter "
            f"belongs to another model, or {CONFIG_NAME} was edited."
        )
    array = stored.read().astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{folder}: {what} has values that are not finite; train it again.")
    return jnp.asarray(array)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
