"""The text tower of a model that also sees images, read as the model of its own that it is.

Gemma 3 from 4B on, Gemma 3n and 4, Llama 4, Mistral Small 3.1, Qwen 2 VL to 3.5, LLaVA (1.5, NeXT, OneVision, ViP),
InternVL 3, EXAONE 4.5 and LFM 2 VL wrap a text model that we know: `text_config` is its configuration, and its tensors
are `language_model.model...` on the hub, `model.language_model...` as transformers 5 names most modules
(`Family.tower`). On text alone the wrapper computes what the tower computes, so tensors of the other towers are left
out, never read. What is saved is a text model; an adapter is written for the wrapper, which is what PEFT finds in the
base folder.
"""

from collections.abc import Mapping
from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.families import WRAPPERS

_TOWER = "language_model."
_VISION = "visual."  # as Qwen 2 and 2.5 VL are published, whose text tower has a text model's names
# Towers that are a text model but for their name and the sections of rope, which belong to images: that model, and
# their defaults.
_TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {"rms_norm_eps": 1e-5, "rope_theta": 1e6}),
    "qwen2_5_vl_text": ("qwen2", {"rms_norm_eps": 1e-5, "rope_theta": 1e6}),
    "exaone4_5_text": ("exaone4", {}),
    "qwen3_vl_text": ("qwen3", {"head_dim": 128, "num_key_value_heads": 32, "rope_theta": 5e5}),
}
_SECTIONS = ("mrope_section", "mrope_interleaved")
# What stands beside the keys of the tower where there is no text_config.
_OF_THE_WRAPPER = frozenset({
    "image_token_id", "video_token_id", "vision_config", "vision_end_token_id", "vision_start_token_id",
    "vision_token_id",
})  # fmt: skip
_CARRIED = ("dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text tower; the configuration itself where the model is no wrapper that we know.

    Raises:
      InputError: the wrapper has no configuration of its text tower.
    """
    if config.get("model_type") not in WRAPPERS:
        return dict(config)
    text = config.get("text_config")
    if text is None and f"{config['model_type']}_text" in _TEXT_MODELS and "vision_config" in config:
        text = {key: value for key, value in config.items() if key not in _OF_THE_WRAPPER}
        text["model_type"] = f"{config['model_type']}_text"
    if not isinstance(text, dict) or "model_type" not in text:
        raise InputError(
            f"config.json: model_type {config['model_type']!r} needs a text_config with the model_type of its text "
            "tower; download the file again."
        )
    # What the tower leaves out the wrapper says.
    above = {key: config[key] for key in _CARRIED if config.get(key) is not None and text.get(key) is None}
    text = {key: value for key, value in text.items() if key != "_name_or_path"} | above
    return _without_sections(text) if text["model_type"] in _TEXT_MODELS else text


def _without_sections(text: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the text model that the tower is."""
    model_type, defaults = _TEXT_MODELS[text["model_type"]]
    text = defaults | text | {"model_type": model_type}
    for name in ("rope_parameters", "rope_scaling"):
        rope = text.get(name)
        if isinstance(rope, dict):
            rope = {key: value for key, value in rope.items() if key not in _SECTIONS}
            kinds = {key: "default" for key in ("type", "rope_type") if rope.get(key) == "mrope"}
            text[name] = rope | kinds
    return text


def tower_tensors(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The text tower's tensors by the names that it has as a model of its own; all of them where there is no tower."""
    if not any(tower_name(name) != name for name in stored):
        return {name: tensor for name, tensor in stored.items() if not name.startswith(_VISION)}
    return {
        tower_name(name): tensor
        for name, tensor in stored.items()
        if tower_name(name) != name or name == "lm_head.weight"
    }


def has_tower(stored: Mapping[str, Any]) -> bool:
    """Whether tensors of these names are those of a wrapper."""
    return any(tower_name(name) != name or name.startswith(_VISION) for name in stored)


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
