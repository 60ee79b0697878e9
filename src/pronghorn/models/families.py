"""The families that pronghorn knows, by the `model_type` of a `config.json`."""

from pronghorn.errors import InputError
from pronghorn.models import (
    apertus,
    arcee,
    cohere,
    cohere2,
    ernie4_5,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    glm,
    granite,
    helium,
    hunyuan,
    llama,
    ministral,
    mistral,
    nemotron,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from pronghorn.models.config_json import Family, HfConfig

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    ministral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    phi3.FAMILY,
    smollm3.FAMILY,
    olmo2.FAMILY,
    olmo3.FAMILY,
    granite.FAMILY,
    cohere.FAMILY,
    cohere2.FAMILY,
    starcoder2.FAMILY,
    seed_oss.FAMILY,
    apertus.FAMILY,
    ernie4_5.FAMILY,
    exaone4.FAMILY,
    nemotron.FAMILY,
    stablelm.FAMILY,
    hunyuan.FAMILY,
    helium.FAMILY,
    arcee.FAMILY,
    glm.GLM,
    glm.GLM4,
)


def family_for(hf_config: HfConfig) -> Family:
    """The family of a checkpoint; its `config_from_hf` will read this config.

    Args:
      hf_config: the dict of a config.json.

    Raises:
      InputError: model_type is absent or not supported, or the config has keys that are refused, named.
    """
    supported = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    model_type = hf_config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            family.config_from_hf(hf_config)
            return family
    if model_type is None:
        raise InputError(f"config.json has no model_type; supported are {supported}.")
    remote = (
        ", and its auto_map asks for code from the model folder, which is never run"
        if hf_config.get("auto_map")
        else ""
    )
    raise InputError(f"config.json: model_type is {model_type!r}{remote}; supported are {supported}.")


def family_named(name: str) -> Family:
    """The family of `DecoderConfig.family`.

    Raises:
      InputError: there is none of that name.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise InputError(f"There is no family {name!r}; known are {', '.join(f.name for f in FAMILIES)}.")


__all__ = ["FAMILIES", "Family", "family_for", "family_named"]
