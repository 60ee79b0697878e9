"""`adapter_config.json`: what PEFT writes into it, and what of it can be loaded here.

The scale and the choice of modules follow PEFT's own rules to the letter (`check_target_module_exists`,
`get_pattern_key`), so that one file means one function in both places.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pronghorn.converters.peft_sites import FusedSite, ParameterSite, alpha_of, named_like_experts
from pronghorn.errors import InputError
from pronghorn.lora import ALL_LINEAR, EMBEDDING, HEAD, AdapterInfo
from pronghorn.lora_sites import Factors, Site, sites
from pronghorn.models.decoder import Decoder

CONFIG_NAME = "adapter_config.json"
_NAMED = 5
# Keys of adapter_config.json that are read, or that say nothing about the function.
_KNOWN = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "loftq_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    ]
)
_REFUSED = {
    "modules_to_save": "stores whole modules",
    "lora_bias": "has a bias in B",
    "layer_replication": "repeats layers",
    "fan_in_fan_out": "is for transposed weights",
    "use_qalora": "is QA-LoRA",
    "alora_invocation_tokens": "is an activated LoRA",
    "ensure_weight_tying": "ties its embedding to its head",
}
# Starts that leave the base weights as they were; pissa, olora, corda, loftq, lora_ga change them.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def config_of(
    model: Decoder,
    info: AdapterInfo,
    adapted: Mapping[str, tuple[Site | FusedSite, Factors]],
    modules: Mapping[str, str],
    places: Mapping[str, Site | FusedSite],
) -> dict[str, Any]:
    """The configuration that makes PEFT build exactly these adapters.

    Args:
      model: the adapted model.
      info: its adapter's.
      adapted: {our module name: (site, factors)} of the modules that have one.
      modules: {our module name: the module's path in transformers}.
      places: {our module name: where an adapter can be}.
    """
    # PEFT has no DoRA of parameters: it says so when it reads those of such names.
    weights = set() if info.use_dora else named_like_experts(model, modules) & set(adapted)
    linears = {name: at for name, at in adapted.items() if name not in weights}
    targets, layers = _shortest_targets(model, linears, modules, places)
    parameters = _target_parameters(model, adapted, modules) + [f"{modules[name]}.weight" for name in weights]
    keys = {name: f"{module}.weight" if name in weights else module for name, module in modules.items()}
    ranks = {name: int(factors.a.shape[-2]) for name, (_, factors) in adapted.items()}
    alphas = {
        name: alpha_of(factors, dict(info.alpha_pattern).get(name, info.alpha), info.use_rslora)
        for name, (_, factors) in adapted.items()
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(model),
        "revision": None,
        "inference_mode": True,
        "r": info.rank,
        "lora_alpha": _number(info.alpha),
        "lora_dropout": 0.0 if parameters else info.dropout,  # PEFT refuses it beside parameters
        "use_rslora": info.use_rslora,
        "target_modules": targets,
        "target_parameters": sorted(parameters) or None,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": _shortest_pattern(ranks, info.rank, keys),
        "alpha_pattern": _shortest_pattern(alphas, info.alpha, keys),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": info.use_dora,
        "trainable_token_indices": _token_indices(model, modules),
    }


def _token_indices(model: Decoder, modules: Mapping[str, str]) -> dict[str, list[int]] | None:
    trained = [name for name, site in sites(model).items() if site.new_rows is not None]
    if model.config.tie_word_embeddings:  # PEFT knows that the head is the embedding
        trained = [name for name in trained if name == EMBEDDING]
    tokens = model.new_tokens
    return {
        _last(modules[name]): list(range(tokens.first, tokens.first + tokens.count)) for name in trained
    } or None


def new_token_range(
    folder: Path, config: Mapping[str, Any], modules: Mapping[str, str]
) -> tuple[int, int, list[str]]:
    """(first id, how many, names of the modules whose rows are trained) of `trainable_token_indices`; (0, 0, [])
    where there are none."""
    given = config["trainable_token_indices"]
    if not given:
        return 0, 0, []
    ours = {_last(modules[name]): name for name in (EMBEDDING, HEAD)}
    if isinstance(given, list):
        given = {_last(modules[EMBEDDING]): given}
    path = folder / CONFIG_NAME
    unknown = [name for name in given if name not in ours]
    if unknown:
        raise InputError(
            f"{path}: trains tokens of {unknown[0]!r}, and the model has them in {', '.join(ours)}."
        )
    runs = {tuple(sorted(ids)) for ids in given.values()}
    ids = runs.pop()
    if runs or not ids or ids != tuple(range(ids[0], ids[0] + len(ids))) or ids[-1] >= 2**24:
        raise InputError(
            f"{path}: trains tokens that are not one run of ids, the same in every module; merge the adapter with PEFT."
        )
    return ids[0], len(ids), [ours[name] for name in given]


def _shortest_targets(
    model: Decoder,
    adapted: Mapping[str, tuple[Site | FusedSite, Factors]],
    modules: Mapping[str, str],
    places: Mapping[str, Site | FusedSite],
) -> tuple[list[str], list[int] | None]:
    """(target_modules, layers_to_transform) that choose exactly the adapted modules.

    Last names ("q_proj") where each is adapted in every layer, or in one set of layers, and nothing else has them; else
    full paths.
    """
    layers: dict[str, set[int]] = {}
    adapted = {name: at for name, at in adapted.items() if not isinstance(at[0], ParameterSite)}
    if not adapted:
        return [], None
    for name, (site, _) in adapted.items():
        if site.layer is not None:
            layers.setdefault(_last(modules[name]), set()).add(site.layer)
    special = [modules[name] for name in adapted if name in (HEAD, EMBEDDING)]
    every = set(range(model.config.num_layers))
    full: tuple[list[str], None] = sorted(modules[name] for name in adapted), None
    if model.source is not None and model.source.wrapped:  # other towers have modules of these names
        return full
    short: tuple[list[str], list[int] | None] = full
    first = next(iter(layers.values()), every)
    if all(where == every for where in layers.values()):
        short = sorted([*layers, *map(_last, special)]), None
    # PEFT takes layers_to_transform to exclude everything that is in no layer.
    elif not special and all(where == first for where in layers.values()):
        short = sorted(layers), sorted(first)
    named = _typed(
        Path(), {"target_modules": short[0], "layers_to_transform": short[1], "r": 1, "lora_alpha": 1}
    )
    return short if expected_modules(Path(), named, modules, places) == set(adapted) else full


def _target_parameters(
    model: Decoder, adapted: Mapping[str, tuple[Site | FusedSite, Factors]], modules: Mapping[str, str]
) -> list[str]:
    """The bare parameters of experts, by their last two names where one is adapted in every layer."""
    found: dict[str, list[str]] = {}
    for name, (site, _) in adapted.items():
        if isinstance(site, ParameterSite):
            found.setdefault(".".join(modules[name].split(".")[-2:]), []).append(modules[name])
    every = model.config.num_layers
    chosen = [[last] if len(full) == every else full for last, full in found.items()]
    return [name for names in chosen for name in names]


def _shortest_pattern(
    values: Mapping[str, float], usual: float, modules: Mapping[str, str]
) -> dict[str, Any]:
    """Entries where a module departs from the usual value, under its last name where all of that name agree."""
    pattern: dict[str, Any] = {}
    by_last: dict[str, set[float]] = {}
    for name, value in values.items():
        by_last.setdefault(_last(modules[name]), set()).add(value)
    for name, value in values.items():
        if value != usual:
            pattern[_last(modules[name]) if len(by_last[_last(modules[name])]) == 1 else modules[name]] = (
                _number(value)
            )
    return pattern


def base_name(model: Decoder) -> str | None:
    """The base model's hub name where it came from the hub's cache, else its folder."""
    if model.source is None:
        return None
    folder = Path(model.source.path)
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return model.source.path


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, with every key that is read present and of its type."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{path}: no such file; give the folder of a PEFT adapter.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON ({str(error)[:100]}); copy the adapter again.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise InputError(
            f"{path}: peft_type is {kind!r}, and only LORA can be loaded; merge the adapter with PEFT."
        )
    for key, why in _REFUSED.items():
        if config.get(key):
            raise InputError(
                f"{path}: {key}={config[key]!r} {why} and is not supported; merge the adapter with PEFT."
            )
    unknown = [key for key, value in config.items() if value and key not in _KNOWN and key not in _REFUSED]
    if unknown:
        raise InputError(
            f"{path}: sets {listed(unknown)}, which pronghorn does not know and which may change the result; "
            "merge the adapter with PEFT."
        )
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{path}: bias={config['bias']!r} trains biases too, which is not supported; merge with PEFT."
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise InputError(f"{path}: task_type is {config['task_type']!r}, and only CAUSAL_LM can be loaded.")
    start = config.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        raise InputError(
            f"{path}: init_lora_weights={start!r} changed the base weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which turns it into a plain LoRA."
        )
    return _typed(path, config)


def _typed(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """`config` with defaults filled in and every value that is read of its type."""
    defaults: dict[str, Any] = {
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "target_modules": [],
        "target_parameters": [],
        "trainable_token_indices": None,
    }
    config = defaults | {key: value for key, value in config.items() if value is not None}
    if isinstance(config["layers_to_transform"], int):
        config["layers_to_transform"] = [config["layers_to_transform"]]

    def positive(value: Any, kinds: tuple[type, ...] = (int, float)) -> bool:
        return type(value) in kinds and 0 < value < float("inf")

    def names(value: Any) -> bool:
        return isinstance(value, str) or (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        )

    def pattern(value: Any, kinds: tuple[type, ...] = (int, float)) -> bool:
        return isinstance(value, dict) and all(positive(item, kinds) for item in value.values())

    def token_ids(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

    layers, dropout = config["layers_to_transform"], config["lora_dropout"]
    tokens = config["trainable_token_indices"]
    checks = {
        "r": positive(config.get("r"), (int,)),
        "lora_alpha": positive(config.get("lora_alpha")),
        "lora_dropout": isinstance(dropout, int | float) and 0 <= dropout < 1,
        "use_rslora": isinstance(config["use_rslora"], bool),
        "use_dora": isinstance(config["use_dora"], bool),
        "rank_pattern": pattern(config["rank_pattern"], (int,)),
        "alpha_pattern": pattern(config["alpha_pattern"]),
        "layers_to_transform": layers is None
        or (isinstance(layers, list) and all(type(layer) is int for layer in layers)),
        "layers_pattern": config["layers_pattern"] is None or names(config["layers_pattern"]),
        "exclude_modules": config["exclude_modules"] is None or names(config["exclude_modules"]),
        "target_modules": names(config["target_modules"])
        and bool(config["target_modules"] or config["target_parameters"]),
        "target_parameters": isinstance(config["target_parameters"], list)
        and names(config["target_parameters"]),
        "trainable_token_indices": tokens is None
        or token_ids(tokens)
        or (isinstance(tokens, dict) and all(token_ids(ids) for ids in tokens.values())),
    }
    for key, fine in checks.items():
        if not fine:
            raise InputError(f"{path}: {key}={config.get(key)!r} cannot be used; copy the adapter again.")
    return config


def expected_modules(
    folder: Path,
    config: Mapping[str, Any],
    modules: Mapping[str, str],
    places: Mapping[str, Site | FusedSite],
) -> set[str]:
    """The modules that PEFT would adapt for this configuration."""
    targets, excluded = config["target_modules"], config["exclude_modules"]
    chosen = _chosen_parameters(folder, config, modules, places)
    for name, module in modules.items():
        if isinstance(places[name], ParameterSite):
            continue
        if excluded is not None and _chosen_by(folder, excluded, module):
            continue
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            match = places[name].layer is not None
        else:
            match = _chosen_by(folder, targets, module)
        # PEFT looks at the layers of a list of names only, and not at a name that is a module's whole path.
        if match and isinstance(targets, list) and module not in targets and config["layers_to_transform"]:
            match = _layer_of(folder, config["layers_pattern"], module) in config["layers_to_transform"]
        if match:
            chosen.add(name)
    return chosen


def _chosen_parameters(
    folder: Path,
    config: Mapping[str, Any],
    modules: Mapping[str, str],
    places: Mapping[str, Site | FusedSite],
) -> set[str]:
    """The places that `target_parameters` names: bare parameters, and linears by that of their weight."""
    parameters = {
        name: module if isinstance(places[name], ParameterSite) else f"{module}.weight"
        for name, module in modules.items()
        if places[name].layer is not None
    }
    chosen = set()
    for target in config["target_parameters"]:
        matched = {name for name, parameter in parameters.items() if _chosen_by(folder, [target], parameter)}
        if not matched:
            raise InputError(
                f"{folder / CONFIG_NAME}: target_parameters has {target[:80]!r}, a bare parameter for which "
                "there are no adapters in this model; merge the adapter with PEFT."
            )
        chosen |= matched
    return chosen


def pattern_keys(
    folder: Path,
    config: Mapping[str, Any],
    modules: Mapping[str, str],
    places: Mapping[str, Site | FusedSite],
) -> dict[str, str]:
    """{our name: what PEFT compares `rank_pattern` and `alpha_pattern` with}: the module's path, or its parameter's
    where that was chosen."""
    chosen = _chosen_parameters(folder, config, modules, places)
    return {
        name: f"{module}.weight" if name in chosen and not isinstance(places[name], ParameterSite) else module
        for name, module in modules.items()
    }


def _chosen_by(folder: Path, targets: str | list[str], module: str) -> bool:
    if isinstance(targets, str):
        return _regex(folder, targets, module, full=True) is not None
    return module in targets or any(module.endswith(f".{target}") for target in targets)


def _layer_of(folder: Path, patterns: str | list[str] | None, module: str) -> int | None:
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        return int(match[1]) if match else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = _regex(folder, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module, full=False)
        if match:
            return int(match["idx"])
    return None


def pattern_value(folder: Path, config: Mapping[str, Any], key: str, module: str, usual: Any) -> Any:
    """The value of the first pattern that matches the end of the module's path, as in PEFT."""
    for pattern, value in config[key].items():
        if _regex(folder, rf"(.*\.)?({pattern})$", module, full=False):
            return value
    return usual


def _regex(folder: Path, pattern: str, text: str, *, full: bool) -> re.Match[str] | None:
    try:
        return re.fullmatch(pattern, text) if full else re.match(pattern, text)
    except re.error as error:
        raise InputError(
            f"{folder / CONFIG_NAME}: {pattern[:80]!r} is not a regular expression ({error}); correct it."
        ) from None


def targets_of(target_modules: str | list[str]) -> tuple[str, ...]:
    if isinstance(target_modules, list):
        return tuple(target_modules)
    return (ALL_LINEAR,) if target_modules.lower() == ALL_LINEAR else (f"re:{target_modules}",)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _number(value: float) -> int | float:
    """An integer where it is one: PEFT's `lora_alpha` usually is."""
    return int(value) if value == int(value) else value


def listed(names: list[str]) -> str:
    """The first few of `names`, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
