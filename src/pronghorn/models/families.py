"""The families that pronghorn knows, by the `model_type` of a `config.json`."""

from collections.abc import Mapping

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
    granite4,
    helium,
    hunyuan,
    hyperclovax,
    internlm3,
    lfm2,
    llama,
    ministral,
    ministral3,
    mistral,
    mixtral,
    nemotron,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_moe,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
    vaultgemma,
)
from pronghorn.models.config_json import Family, HfConfig, unusual_keys

_NAMED = 6

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
    granite4.FAMILY,
    vaultgemma.FAMILY,
    hyperclovax.FAMILY,
    internlm3.INTERNLM3,
    internlm3.IQUESTCODER,
    ministral3.FAMILY,
    lfm2.FAMILY,
    qwen3_5.FAMILY,
    qwen3_moe.FAMILY,
    mixtral.FAMILY,
    olmoe.FAMILY,
    qwen2_moe.FAMILY,
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
    remote = ", whose auto_map asks for code, which is never run," if hf_config.get("auto_map") else ""
    inner = hf_config.get("text_config")
    if isinstance(inner, Mapping):
        found = f"a wrapper of a text tower of model_type {inner.get('model_type')!r}"
    elif keys := unusual_keys(hf_config):
        found = f"beyond a plain decoder it sets {', '.join(keys[:_NAMED])}"
        found += f" and {len(keys) - _NAMED} more keys" * (len(keys) > _NAMED)
    else:
        found = "no key of it is unusual: see docs/adding-a-model.md"
    raise InputError(
        f"config.json: model_type {model_type!r}{remote} is not "
        f"supported ({found}); supported are {supported}, and text "
        "towers in gemma3, mistral3, qwen3_5, llava, llava_next, llava_onevision, vipllava, internvl, lfm2_vl."
    )


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
