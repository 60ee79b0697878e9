"""The text tower of a model that also sees images, read as the model of its own that it is.

Gemma 3 from 4B on, Gemma 3n and 4, Llama 4, Mistral Small 3.1, Qwen 3.5, LLaVA (1.5, NeXT, OneVision, ViP), InternVL 3
and LFM 2 VL wrap a text model that we know: `text_config` is its configuration, and its tensors are
`language_model.model...` on the hub, `model.language_model...` as transformers 5 names most modules (`Family.tower`).
On text alone the wrapper computes what the tower computes, so tensors of the other towers are left out, never read.
What is saved is a text model; an adapter is written for the wrapper, which is what PEFT finds in the base folder.
"""

from collections.abc import Mapping
from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.families import WRAPPERS

_TOWER = "language_model."
_CARRIED = ("dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text tower; the configuration itself where the model is no wrapper that we know.

    Raises:
      InputError: the wrapper has no configuration of its text tower.
    """
    if config.get("model_type") not in WRAPPERS:
        return dict(config)
    text = config.get("text_config")
    if not isinstance(text, dict) or "model_type" not in text:
        raise InputError(
            f"config.json: model_type {config['model_type']!r} needs a text_config with the model_type of its text "
            "tower; download the file again."
        )
    # What the tower leaves out the wrapper says.
    above = {key: config[key] for key in _CARRIED if config.get(key) is not None and text.get(key) is None}
    return {key: value for key, value in text.items() if key != "_name_or_path"} | above


def tower_tensors(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The text tower's tensors by the names that it has as a model of its own; all of them where there is no tower."""
    if not any(tower_name(name) != name for name in stored):
        return dict(stored)
    return {
        tower_name(name): tensor
        for name, tensor in stored.items()
        if tower_name(name) != name or name == "lm_head.weight"
    }


def tower_name(name: str) -> str:
    """A tensor's or module's name in the text tower: `model.language_model.layers.0.mlp` -> `model.layers.0.mlp`."""
    if name.startswith(_TOWER):
        return name.removeprefix(_TOWER)
    return f"model.{name.removeprefix(f'model.{_TOWER}')}" if name.startswith(f"model.{_TOWER}") else name


def wrapped_name(name: str, tower: str) -> str:
    """The other way: a module's name in transformers' wrapper, whose text tower is at `Family.tower`."""
    if name.startswith("model."):
        return f"{tower}.{name.removeprefix('model.')}"
    return tower.removesuffix("model") + name if tower.endswith(".model") else name
