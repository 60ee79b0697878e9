"""What belongs to a model besides its weights: tokenizer, chat template, generation config, licence, manifest.

Files are copied byte for byte wherever that is the truth; a tokenizer that was changed in memory is written anew.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pronghorn.converters.safetensors_files import inside_folder
from pronghorn.converters.sources import resolve_model_path
from pronghorn.errors import InputError
from pronghorn.files import write_json
from pronghorn.models.decoder import Source

MANIFEST = "pronghorn.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)
CARRIED_PATTERNS = ("generation_config.json", "LICENSE*", "NOTICE*")


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a folder through `transformers.AutoTokenizer`, local files only, no code from the folder.

    Returns:
      the tokenizer, or None where the folder has no tokenizer file.

    Raises:
      InputError: the files are there and cannot be used.
    """
    folder = resolve_model_path(path)
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever their parsers meet
        detail = " ".join(str(error).split())[:200]
        raise InputError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {detail}); "
            "download tokenizer.json and tokenizer_config.json again."
        ) from None


def write_manifest(folder: Path, kind: str, **values: Any) -> None:
    """Write `pronghorn.json`: what this folder is and which files in it are ours, with their sizes. Written last."""
    files = {
        entry.relative_to(folder).as_posix(): entry.stat().st_size
        for entry in sorted(folder.rglob("*"))
        if entry.is_file() and entry.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": f"pronghorn-{kind}", "version": 1, **values, "files": files})


def written_by_us(folder: Path) -> bool:
    """Whether every file in `folder` is one that its manifest lists, so that replacing it destroys nothing else."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = set(manifest["files"]) | {MANIFEST}
        entries = [entry for entry in folder.rglob("*") if not entry.is_dir()]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(entry.relative_to(folder).as_posix() in files for entry in entries)


def carry_files(folder: Path, source: Source | None, tokenizer_from: Any) -> None:
    """Copy tokenizer, template and generation config into `folder`."""
    origin = None if source is None else Path(source.path)
    if origin is not None and not origin.is_dir():
        if tokenizer_from is None:
            raise InputError(
                f"{origin}: the model came from here and the folder is gone; say where the tokenizer is "
                "with tokenizer_from."
            )
        origin = None
    if origin is not None:
        for pattern in CARRIED_PATTERNS:
            _copy(origin, folder, sorted(entry.name for entry in origin.glob(pattern) if entry.is_file()))
    if hasattr(tokenizer_from, "save_pretrained"):
        if origin is not None and same_tokenizer(tokenizer_from, load_tokenizer(origin)):
            _copy_tokenizer(origin, folder)  # the files themselves, not transformers' rewriting of them
        else:
            tokenizer_from.save_pretrained(str(folder))
    elif tokenizer_from is not None:
        chosen = resolve_model_path(tokenizer_from)
        if not _copy_tokenizer(chosen, folder):
            raise InputError(
                f"{chosen}: has no tokenizer files; give a folder that has, or leave tokenizer_from out."
            )
    elif origin is not None:
        _copy_tokenizer(origin, folder)


def _copy_tokenizer(origin: Path, folder: Path) -> int:
    templates = origin / "additional_chat_templates"
    if templates.is_dir() and not templates.is_symlink():
        (folder / templates.name).mkdir()
        _copy(templates, folder / templates.name, sorted(entry.name for entry in templates.glob("*.jinja")))
    return _copy(origin, folder, [name for name in TOKENIZER_FILES if (origin / name).is_file()])


def _copy(origin: Path, folder: Path, names: list[str]) -> int:
    for name in names:
        shutil.copyfile(inside_folder(origin, name), folder / name)
    return len(names)


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers agree in vocabulary, special tokens and chat template."""
    return other is not None and all(
        _told(one, what) == _told(other, what)
        for what in (
            "chat_template",
            "special_tokens_map",
            "added_tokens_decoder",
            "get_vocab",
            "padding_side",
        )
    )


def _told(tokenizer: Any, what: str) -> Any:
    value = getattr(tokenizer, what, None)
    value = value() if callable(value) else value
    return {k: str(v) for k, v in value.items()} if isinstance(value, dict) else value


def source_tokenizer(source: Source | None) -> Any:
    """The tokenizer of the folder that a model came from, or None."""
    if source is None or not Path(source.path).is_dir():
        return None
    return load_tokenizer(source.path)


def chat_template_hash(tokenizer: Any) -> str | None:
    """SHA-256 of a tokenizer's chat template (of all of them, where it has several); None without one."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
