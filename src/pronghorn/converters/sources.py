"""Where a model's files are: a folder, a GGUF file, or a name on the Hugging Face hub."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from pronghorn.errors import InputError
from pronghorn.files import made_once

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What a model folder needs, and never code or pickles. Some repositories hold the weights a second time.
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
_UNWANTED = ("original/*", "onnx/*", "consolidated*", "*.bin", "*.pt", "*.pth")


def resolve_model_path(name: str | Path, *, gguf_dtype: str = "bfloat16") -> Path:
    """The folder that holds a model's `config.json` and safetensors.

    Args:
      name: a folder; a `.gguf` file, which is converted once into the user's cache folder; or a hub name, which is
        looked for in the hub's cache first and downloaded if it is not there.
      gguf_dtype: dtype of the weights of a converted GGUF file.

    Raises:
      InputError: there is no such thing, or it cannot be fetched.
    """
    text = str(name)
    if not text:
        raise InputError("the model's path is empty; give a folder, a .gguf file or a hub name.")
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _converted_gguf(path, gguf_dtype)
        raise InputError(f"{text}: is a file; give the folder that holds config.json and the weights.")
    if not _HUB_NAME.fullmatch(text) or text.lower().endswith((".gguf", ".safetensors", ".bin")):
        raise InputError(f"{text}: no such file or folder; check the path.")
    return _hub_folder(text)


def cache_folder() -> Path:
    """The user's cache folder: `$XDG_CACHE_HOME/pronghorn`, by default `~/.cache/pronghorn`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pronghorn"


def _converted_gguf(path: Path, dtype: str) -> Path:
    from pronghorn.converters.gguf import convert_gguf

    state = path.stat()
    key = f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0{dtype}"
    folder = cache_folder() / "gguf" / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / "config.json").is_file():
        made_once(folder, lambda new: convert_gguf(path, new, dtype=dtype))
    return folder


def _hub_folder(name: str) -> Path:
    """The newest snapshot of a hub repository: the cached one where it is whole, else downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    options: dict[str, Any] = {"allow_patterns": list(_WANTED), "ignore_patterns": list(_UNWANTED)}
    try:
        cached = Path(snapshot_download(name, local_files_only=True, **options))
        if _is_whole(cached):
            return cached
    except HFValidationError:
        raise InputError(f"{name}: no such folder, and no valid hub name; check the spelling.") from None
    except (OSError, ValueError):
        pass  # not cached
    try:
        return Path(snapshot_download(name, **options))
    except GatedRepoError:
        raise InputError(
            f"{name}: the hub asks to accept the model's licence first; do so on its page, then run `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{name}: no such folder, and the hub has no such model (or it is private); check the spelling, "
            "or run `hf auth login`."
        ) from None
    except Exception as error:  # the client raises errors of several HTTP libraries
        raise InputError(
            f"{name}: no such folder, not in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__}); give a folder, or download the model where there is a network."
        ) from None


def _is_whole(folder: Path) -> bool:
    """Whether a cached snapshot has what loading needs; a download that was cut short leaves part of it."""
    from pronghorn.converters.safetensors_files import open_weights

    if not (folder / "config.json").is_file():
        return False
    try:
        open_weights(folder)
    except InputError:
        return False
    return True
