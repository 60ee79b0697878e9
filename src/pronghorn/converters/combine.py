"""Several adapters of one base made into one, by weights; the base itself is not needed.

With w_i the weight and s_i the scale of adapter i:

    cat     A = [s_1 A_1; s_2 A_2; ..],  B = [w_1 B_1, w_2 B_2, ..]      exact: B A = Σ w_i s_i B_i A_i, ranks add up
    svd     the best approximation of that sum with a given rank, from the factors (no product of a weight's size)
    linear  A = Σ sign(w_i) √|w_i s_i| A_i,  B = Σ √|w_i s_i| B_i        PEFT's "linear": it also has terms B_i A_j, so
                                                                         it is for adapters that grew from one start

The same as PEFT's `add_weighted_adapter`. A module that only some adapters have gets what those have.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pronghorn.converters.carried_files import load_tokenizer, write_manifest, written_by_us
from pronghorn.converters.peft import PREFIX, WEIGHTS_NAME, read_manifest
from pronghorn.converters.peft_config import CONFIG_NAME, pattern_value, read_config
from pronghorn.converters.safetensors_files import TensorSpec, inside_folder, read_header, write_file
from pronghorn.errors import InputError
from pronghorn.files import new_folder
from pronghorn.fingerprint import same_base
from pronghorn.lora_config import adapter_scale

Method = Literal["cat", "linear", "svd"]
_PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
Scaled = tuple[np.ndarray, np.ndarray, float]  # A, B, s
Pair = tuple[np.ndarray, np.ndarray]  # of which s is 1


def combine_adapters(
    adapters: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    *,
    method: Method = "cat",
    rank: int | None = None,
) -> dict[str, Any]:
    """Write one adapter folder out of several.

    Args:
      adapters: PEFT folders, of one base.
      weights: one for each; they need not add up to 1, and may be negative.
      out: must not exist or be empty.
      method: see above.
      rank: of the result, for "svd"; None takes the largest of the adapters' ranks.

    Returns:
      `out`, `method`, `weights`, `modules`, `rank` (the largest), and for "svd" `lost`: the share of the sum's norm
      that the rank cannot hold.

    Raises:
      InputError: adapters that cannot be combined.
    """
    folders = [Path(adapter) for adapter in adapters]
    _check_arguments(folders, weights, method, rank)
    found = [_read(folder) for folder in folders]
    manifests = [read_manifest(folder) for folder in folders]
    _check_one_base(folders, manifests)
    modules = sorted({name for one in found for name in one[1]})
    largest = rank or max(pair[0].shape[0] for _, pairs in found for pair in pairs.values())
    joined: dict[str, Pair] = {}
    lost = kept = 0.0
    for name in modules:
        parts = [(w, pairs[name]) for w, (_, pairs) in zip(weights, found, strict=True) if name in pairs]
        _check_shapes(name, [pair for _, pair in parts])
        if method == "linear":
            joined[name] = _linear(name, parts)
            continue
        pair = _concatenated(parts)
        if method == "svd":
            pair, dropped, held = _truncated(pair, largest)
            lost, kept = lost + dropped, kept + held
        joined[name] = pair
    ranks = {name: pair[0].shape[0] for name, pair in joined.items()}
    usual = max(ranks.values())
    _write(Path(out), folders, found, manifests, joined, ranks, usual, weights, method)
    report = {
        "out": str(out),
        "method": method,
        "weights": list(weights),
        "modules": len(modules),
        "rank": usual,
    }
    if method == "svd":
        report["lost"] = float(np.sqrt(lost / max(lost + kept, 1e-30)))
    return report


def _check_arguments(folders: list[Path], weights: Sequence[float], method: str, rank: int | None) -> None:
    if method not in get_args(Method):
        raise InputError(f"--method {method}: use one of {', '.join(get_args(Method))}.")
    if len(folders) < 2:
        raise InputError("merge-adapters: give two adapters or more.")
    if len(weights) != len(folders):
        raise InputError(f"--weights: {len(weights)} weights for {len(folders)} adapters; give one for each.")
    if not all(np.isfinite(weights)) or not any(weights):
        raise InputError("--weights: give finite numbers that are not all zero.")
    if rank is not None and (method != "svd" or rank < 1):
        raise InputError(f"--rank {rank}: is for --method svd, and at least 1.")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Scaled]]:
    """(configuration, {key of A: (A, B, s)}) of one adapter, in fp32."""
    config = read_config(folder)
    if config["use_dora"]:
        raise InputError(
            f"{folder}: is DoRA, whose row lengths do not add up; merge it into its base instead."
        )
    if not all(name.endswith(".weight") for name in config["target_parameters"]):
        raise InputError(
            f"{folder}: has adapters of experts that are bare parameters, which cannot be combined; merge it into its "
            "base instead."
        )
    tensors, _ = read_header(inside_folder(folder, WEIGHTS_NAME))
    pairs: dict[str, Scaled] = {}
    for key in tensors:
        for suffix_a, suffix_b in _PAIRS:
            if not key.endswith(suffix_a):
                continue
            name = key.removesuffix(suffix_a)
            if name + suffix_b not in tensors:
                raise InputError(
                    f"{folder}: the adapter of {name} lacks one of its two factors; copy it again."
                )
            module = name.removeprefix(PREFIX)
            key_of_patterns = f"{module}.weight" if _is_parameter(config, module) else module
            rank = pattern_value(folder, config, "rank_pattern", key_of_patterns, config["r"])
            alpha = pattern_value(folder, config, "alpha_pattern", key_of_patterns, config["lora_alpha"])
            a, b = (tensors[name + suffix].read().astype(np.float32) for suffix in (suffix_a, suffix_b))
            if a.shape[0] != rank or b.shape[1] != rank:
                raise InputError(
                    f"{folder}: {module} has not the rank {rank} that {CONFIG_NAME} says; copy it again."
                )
            pairs[name + suffix_a] = (a, b, adapter_scale(rank, alpha, config["use_rslora"]))
    others = [key for key in tensors if "lora_" not in key]
    if others or not pairs:
        what = f"{others[0]} beside its factors" if others else "no factors"
        raise InputError(f"{folder}: has {what}, which cannot be combined; merge it into its base instead.")
    return config, pairs


def _is_parameter(config: Mapping[str, Any], module: str) -> bool:
    """Whether a linear is named by that of its weight, among `target_parameters`."""
    weight = f"{module}.weight"
    return any(weight == name or weight.endswith(f".{name}") for name in config["target_parameters"])


def _check_one_base(folders: list[Path], manifests: list[dict[str, Any]]) -> None:
    first = next((i for i, manifest in enumerate(manifests) if manifest.get("base_hash")), None)
    for folder, manifest in zip(folders, manifests, strict=True):
        if first is None or not manifest.get("base_hash"):
            continue
        if not same_base(manifest["base_hash"], manifests[first]["base_hash"]):
            raise InputError(
                f"{folder}: was trained on another base model than {folders[first]}; they do not add up."
            )
        if manifest.get("template_hash") != manifests[first].get("template_hash"):
            raise InputError(
                f"{folder}: was trained with another chat template than {folders[first]}; use one of them."
            )


def _check_shapes(name: str, pairs: list[Scaled]) -> None:
    if len({(a.shape[1], b.shape[0]) for a, b, _ in pairs}) > 1:
        raise InputError(
            f"{name}: the adapters are for weights of different shapes; they are of different models."
        )


def _concatenated(parts: list[tuple[float, Scaled]]) -> Pair:
    a = np.concatenate([np.float32(s) * a for _, (a, _, s) in parts], axis=0)
    b = np.concatenate([np.float32(weight) * b for weight, (_, b, _) in parts], axis=1)
    return a, b


def _linear(name: str, parts: list[tuple[float, Scaled]]) -> Pair:
    if len({a.shape[0] for _, (a, _, _) in parts}) > 1:
        raise InputError(f"{name}: --method linear needs adapters of one rank; use cat, or svd.")
    roots = [np.float32(abs(weight * s) ** 0.5) for weight, (_, _, s) in parts]
    a = np.sum([np.sign(w) * root * a for root, (w, (a, _, _)) in zip(roots, parts, strict=True)], axis=0)
    b = np.sum([root * b for root, (_, (_, b, _)) in zip(roots, parts, strict=True)], axis=0)
    return a.astype(np.float32), b.astype(np.float32)


def _truncated(pair: Pair, rank: int) -> tuple[Pair, float, float]:
    """(the best pair of that rank, squared norm that is lost, squared norm that is kept)."""
    q_b, r_b = np.linalg.qr(pair[1].astype(np.float64))
    q_a, r_a = np.linalg.qr(pair[0].astype(np.float64).T)
    u, values, v = np.linalg.svd(r_b @ r_a.T)
    root = np.sqrt(values[:rank])
    a = (root[:, None] * (v[:rank] @ q_a.T)).astype(np.float32)
    b = (q_b @ u[:, :rank] * root).astype(np.float32)
    return (a, b), float(np.sum(values[rank:] ** 2)), float(np.sum(values[:rank] ** 2))


def _write(
    out: Path,
    folders: list[Path],
    found: list[tuple[dict[str, Any], dict[str, Scaled]]],
    manifests: list[dict[str, Any]],
    joined: Mapping[str, Pair],
    ranks: Mapping[str, int],
    usual: int,
    weights: Sequence[float],
    method: str,
) -> None:
    arrays: dict[str, np.ndarray] = {}
    for key, (a, b) in joined.items():
        suffix_a, suffix_b = next(pair for pair in _PAIRS if key.endswith(pair[0]))
        arrays[key] = a
        arrays[key.removesuffix(suffix_a) + suffix_b] = b
    modules = {
        key: key.removeprefix(PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
        for key in joined
    }
    parameters = {
        module for module in modules.values() if any(_is_parameter(config, module) for config, _ in found)
    }
    keys = {key: f"{module}.weight" if module in parameters else module for key, module in modules.items()}
    pattern = {keys[key]: rank for key, rank in ranks.items() if rank != usual}
    config = dict(found[0][0]) | {
        "r": usual,
        "lora_alpha": usual,  # the scales are in the factors
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(set(modules.values()) - parameters),
        "target_parameters": sorted(f"{module}.weight" for module in parameters) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with new_folder(out, replace=written_by_us(out)) as folder:
        specs = {name: TensorSpec(np.dtype(np.float32), array.shape) for name, array in arrays.items()}
        write_file(folder / WEIGHTS_NAME, specs, lambda name: np.ascontiguousarray(arrays[name]))
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        own = next((path for path in folders if load_tokenizer(path) is not None), None)
        if own is not None:
            load_tokenizer(own).save_pretrained(str(folder))
        known: dict[str, Any] = next((manifest for manifest in manifests if manifest.get("base_hash")), {})
        write_manifest(
            folder,
            "adapter",
            rank=usual,
            alpha=float(usual),
            combined={
                "method": method,
                "weights": list(weights),
                "adapters": [path.name for path in folders],
            },
            base_hash=known.get("base_hash"),
            template_hash=known.get("template_hash"),
        )
