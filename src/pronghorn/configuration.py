"""A job as one frozen dataclass, read from YAML and `key=value` arguments.

The dataclasses are the only truth: a key that no dataclass has is an error that names the nearest one, and a value
of the wrong type is an error that names the key. Nothing else reads configuration.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pronghorn.data import DataConfig
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig
from pronghorn.training import TrainConfig

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """Everything `pronghorn train`, `plan` and `preview` need.

    Attributes:
      model: a Hugging Face folder, a GGUF file, or a hub name that is cached or can be downloaded.
      dtype: dtype of the frozen weights and of the products.
      layers: "unrolled" (faster step) or "scanned" (faster compilation).
      adapter: a PEFT folder to go on from, instead of a new adapter.
      lora: the adapter to add; `lora: null` trains every weight.
      data: rows, template, masks, packing.
      train: optimiser, schedule, steps, checkpoints; `train.output_dir` is the run folder.
    """

    model: str
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    layers: Literal["unrolled", "scanned"] = "unrolled"
    adapter: str | None = None
    lora: LoRAConfig | None = LoRAConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()


def read_job(path: str | Path | None, overrides: Sequence[str] = ()) -> JobConfig:
    """A `JobConfig` from a YAML file (or none) and `key=value` arguments such as `train.max_steps=60`.

    Raises:
      InputError: for a missing or malformed file, an unknown key, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(
                f"argument {override!r} is not of the form key=value; write for example train.max_steps=60."
            )
        _set(values, key.split("."), _parse_scalar(key, text), override)
    return from_mapping(JobConfig, values)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of a YAML job file.")
    if path.stat().st_size > 1 << 20:
        raise InputError(f"{path}: over 1 MiB is no job file; give the path of a YAML job file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not valid YAML ({detail}); correct the file.") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: the top level must be `key: value` pairs, not a {type(values).__name__}.")
    return values


def _parse_scalar(key: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{key}: the value {text!r} is not valid YAML; quote it.") from None


def _set(values: dict[str, Any], keys: list[str], value: Any, argument: str) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise InputError(
                f"argument {argument!r}: {key} is {inner!r}, which has no keys inside it; set {key} itself."
            )
        values = inner
    values[keys[-1]] = value


def from_mapping(config_class: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """An instance of the frozen dataclass `config_class` from a mapping, checked key by key.

    Raises:
      InputError: naming the key, what is wrong and the nearest key or the allowed values.
    """
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        where = f"{prefix}{key}"
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.4)
            cure = f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(fields)}."
            raise InputError(f"{where}: unknown key; {cure}")
        arguments[key] = _convert(hints[key], value, where)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise InputError(f"{prefix}{name}: missing; give it in the job file or as {prefix}{name}=VALUE.")
    return config_class(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` asks for, or an InputError naming `where`."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in choices and type(value) in {type(choice) for choice in choices}:
            return value
        raise InputError(f"{where}: {value!r} is not one of {', '.join(map(str, choices))}.")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        kinds = [choice for choice in choices if choice is not type(None)]
        failure: InputError | None = None
        for kind in kinds:
            try:
                return _convert(kind, value, where)
            except InputError as error:
                # The message about a mapping's inner key says more than one about a type.
                failure = error if failure is None or isinstance(value, Mapping) else failure
        assert failure is not None
        raise failure
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {value!r} must be `key: value` pairs.")
        return from_mapping(typing.cast(type, hint), value, f"{where}.")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: {value!r} must be a list.")
        return tuple(_convert(choices[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {value!r} must be `key: value` pairs.")
        return {
            _convert(choices[0], k, where): _convert(choices[1], v, f"{where}.{k}") for k, v in value.items()
        }
    if hint is Any:
        return value
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 2e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise InputError(f"{where}: {value!r} must be {names.get(hint, hint.__name__)}.")
