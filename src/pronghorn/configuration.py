"""A job as one frozen dataclass, read from YAML and `key=value` arguments.

The dataclasses are the only truth: a key that no dataclass has is an error that names the nearest one, and a value
of the wrong type is an error that names the key. Nothing else reads configuration.
"""

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pronghorn.data import DataConfig
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig
from pronghorn.quantization import read_quantization
from pronghorn.training import TrainConfig

Config = TypeVar("Config")
# Lists and mappings inside each other in a job file: a job has three.
DEEPEST = 100


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """Everything `pronghorn train`, `plan` and `preview` need.

    Attributes:
      model: a Hugging Face folder, a GGUF file, or a hub name that is cached or can be downloaded.
      dtype: dtype of the frozen weights and of the products.
      layers: "unrolled" (faster step) or "scanned" (faster compilation).
      quantization: "nf4", "fp4", "int8" or "fp8" for the frozen linear weights inside of layers, or a recipe that
        `pronghorn sensitivity` wrote (a .json file); null keeps `dtype`. A folder that bitsandbytes quantised is used
        as it is.
      adapter: a PEFT folder to go on from, instead of a new adapter.
      lora: the adapter to add; `lora: null` trains every weight.
      new_tokens: texts that become tokens of the model; with an adapter only their rows of embedding and head are
        trained beside it.
      data: rows, template, masks, packing.
      train: optimiser, schedule, steps, checkpoints; `train.output_dir` is the run folder.
    """

    model: str
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    layers: Literal["unrolled", "scanned"] = "unrolled"
    quantization: str | None = None
    adapter: str | None = None
    lora: LoRAConfig | None = LoRAConfig()
    new_tokens: tuple[str, ...] = ()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        read_quantization(self.quantization)


def read_job(path: str | Path | None, overrides: Sequence[str] = ()) -> JobConfig:
    """A `JobConfig` from a YAML file (or none) and `key=value` arguments such as `train.max_steps=60`.

    Raises:
      InputError: for a missing or malformed file, an unknown or doubled key, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise InputError(
                f"argument {override[:80]!r} is not of the form key=value; write for example train.max_steps=60."
            )
        _set(values, key.split("."), _parse_scalar(key, text), override)
    return from_mapping(JobConfig, values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file; give the path of a YAML job file.")
        if path.stat().st_size > 1 << 20:
            raise InputError(f"{path}: over 1 MiB is no job file; give the path of a YAML job file.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; give the path of a YAML job file.") from None
    values = _parse_yaml(text, f"{path}: not valid YAML", "correct the file")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: the top level is {_shown(values)}; write `key: value` pairs such as `model: FOLDER`."
        )
    return values


def _parse_scalar(key: str, text: str) -> Any:
    return _parse_yaml(text, f"{key}: the value {_shown(text)} is not valid YAML", "put it in quotes")


def _parse_yaml(text: str, what: str, cure: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML lets the last of two equal keys win; here that is an error, as is nesting that takes it seconds."""

        def fetch_flow_collection_start(self, token_class):
            if self.flow_level >= DEEPEST:  # each bracket costs PyYAML a look at all that are open
                raise yaml.scanner.ScannerError(
                    None, None, f"lists and mappings are nested over {DEEPEST} deep", self.get_mark()
                )
            super().fetch_flow_collection_start(token_class)

        def construct_mapping(self, node, deep=False):
            plain = [key for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"]
            names = [key.value for key in plain]
            for number, key in enumerate(plain):
                if key.value in names[:number]:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} occurs twice", key.start_mark
                    )
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-99-99
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"{what} ({detail}); {cure}.") from None


def _set(values: dict[str, Any], keys: list[str], value: Any, argument: str) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise InputError(
                f"argument {argument[:80]!r}: {key} is {_shown(inner)}, which has no keys inside it; set {key} itself."
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
            raise InputError(f"{where}: unknown key; {_cure(str(key), config_class, prefix)}")
        arguments[key] = _convert(hints[key], value, where)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise InputError(f"{prefix}{name}: missing; give it in the job file or as {prefix}{name}=VALUE.")
    return config_class(**arguments)


def _cure(key: str, config_class: type, prefix: str) -> str:
    """What an unknown key should have been: the same name deeper inside, else the nearest beside it."""
    deeper = [path for path in _paths(config_class, prefix) if path.endswith(f".{key}")]
    if deeper:
        return f"did you mean {' or '.join(deeper)}?"
    names = [field.name for field in dataclasses.fields(config_class)]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(names)}."


def _paths(config_class: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(config_class)
    for name, hint in hints.items():
        yield f"{prefix}{name}"
        for kind in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(kind):
                yield from _paths(typing.cast(type, kind), f"{prefix}{name}.")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` asks for, or an InputError naming `where`."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in choices and type(value) in {type(choice) for choice in choices}:
            return value
        raise InputError(f"{where}: {_shown(value)} is not a choice; use {_listed(hint)}.")
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            known = ", ".join(field.name for field in dataclasses.fields(hint))
            raise InputError(f"{where}: {_shown(value)} must be `key: value` pairs; known keys are {known}.")
        return from_mapping(typing.cast(type, hint), value, f"{where}.")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: {_shown(value)} must be a list, such as [a, b].")
        return tuple(_convert(choices[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {_shown(value)} must be `key: value` pairs, such as {{a: b}}.")
        return {
            _convert(choices[0], k, f"{where}.{k}"): _convert(choices[1], v, f"{where}.{k}")
            for k, v in value.items()
        }
    return _convert_scalar(hint, value, where)


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if value is None and type(None) in typing.get_args(hint):
        return None
    failures = []
    for kind in kinds:
        try:
            return _convert(kind, value, where)
        except InputError as error:
            failures.append(error)
    # An error inside a list or mapping says more than one about the whole.
    inside = [error for error in failures if not str(error).startswith(f"{where}:")]
    if inside or dataclasses.is_dataclass(kinds[0]):
        raise (inside or failures)[0]
    raise InputError(f"{where}: {_shown(value)} must be {_listed(hint)}.")


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 2e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise InputError(f"{where}: {_shown(value)} must be {_listed(hint)}.")


def _listed(hint: Any) -> str:
    """What a value may be, in words."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(", ".join(map(str, choices)).rsplit(", ", 1))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_listed(kind) for kind in choices)
    if origin is tuple:
        return "a list such as [a, b]"
    if origin in (dict, Mapping):
        return "`key: value` pairs"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text (put it in quotes)",
        type(None): "null",
    }
    return names.get(hint) or str(hint)


def _shown(value: Any) -> str:
    """A value for a message: short, however deep or long it is, and in YAML's words."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return reprlib.repr(value)
