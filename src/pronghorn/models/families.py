"""The families that pronghorn knows, by the `model_type` of a `config.json`."""

import difflib
import re
from collections.abc import Mapping, Sequence

from pronghorn.errors import InputError
from pronghorn.models import (
    apertus,
    arcee,
    cohere,
    cohere2,
    cwm,
    deepseek_v2,
    deepseek_v3,
    ernie4_5,
    ernie4_5_moe,
    exaone,
    exaone4,
    falcon_h1,
    gemma,
    gemma2,
    gemma3,
    gemma3n,
    gemma4,
    glm,
    glm4_moe,
    gpt_oss,
    granite,
    granite4,
    helium,
    hunyuan,
    hyperclovax,
    internlm3,
    jais2,
    lfm2,
    llama,
    llama4,
    minicpm3,
    ministral,
    ministral3,
    mistral,
    mixtral,
    nemotron,
    nemotron_h,
    olmo,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
    vaultgemma,
)
from pronghorn.models.config_json import Family, HfConfig, unusual_keys

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    ministral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    gemma3n.FAMILY,
    gemma4.FAMILY,
    phi3.FAMILY,
    smollm3.FAMILY,
    olmo.FAMILY,
    olmo2.FAMILY,
    olmo3.FAMILY,
    granite.FAMILY,
    cohere.FAMILY,
    cohere2.FAMILY,
    cwm.FAMILY,
    starcoder2.FAMILY,
    seed_oss.FAMILY,
    apertus.FAMILY,
    ernie4_5.FAMILY,
    exaone.FAMILY,
    exaone4.FAMILY,
    nemotron.FAMILY,
    jais2.FAMILY,
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
    gpt_oss.FAMILY,
    glm4_moe.FAMILY,
    ernie4_5_moe.FAMILY,
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
    minicpm3.FAMILY,
    llama4.FAMILY,
    qwen3_next.FAMILY,
    qwen3_5_moe.FAMILY,
    falcon_h1.FAMILY,
    nemotron_h.FAMILY,
)


# Models that wrap the text tower of a family; `converters/text_towers.py` reads them. Not Aya Vision and Command A
# Vision: their wrapper leaves out Cohere's factor on the logits.
WRAPPERS = (
    "gemma3",
    "gemma3n",
    "gemma4",
    "mistral3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "llava",
    "llava_next",
    "llava_onevision",
    "vipllava",
    "internvl",
    "exaone4_5",
    "lfm2_vl",
    "llama4",
)

_KEYS_NAMED, _KEY_LENGTH, _SENTENCE = 6, 40, 680


def family_for(hf_config: HfConfig) -> Family:
    """The family of a checkpoint; its `config_from_hf` will read this config.

    Args:
      hf_config: the dict of a config.json.

    Raises:
      InputError: model_type is absent or not supported, or the config has keys that are refused, named.
    """
    model_type = hf_config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            family.config_from_hf(hf_config)
            return family
    if model_type is None:
        raise InputError(_with_supported("config.json has no model_type", ""))
    remote = ", whose auto_map asks for code, which is never run," if hf_config.get("auto_map") else ""
    inner, wanted = hf_config.get("text_config"), _clipped(model_type)
    if isinstance(inner, Mapping):
        wanted = _clipped(inner.get("model_type"))
        found = f"a wrapper of a text tower of model_type {wanted!r}"
    elif keys := unusual_keys(hf_config):
        named = ", ".join(_clipped(key) for key in keys[:_KEYS_NAMED])
        found = f"beyond a plain decoder it sets {named}"
        found += f" and {len(keys) - _KEYS_NAMED} more keys" * (len(keys) > _KEYS_NAMED)
    else:
        found = "no key of it is unusual: see docs/adding-a-model.md"
    raise InputError(
        _with_supported(
            f"config.json: model_type {_clipped(model_type)!r}{remote} is not supported ({found})", wanted
        )
    )


def _clipped(value: object) -> str:
    """A value of a file that may be damaged or hostile, short and on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= _KEY_LENGTH else text[: _KEY_LENGTH - 3] + "..."


def _with_supported(problem: str, wanted: str) -> str:
    """The sentence that goes on with what is supported, what is spelt most like `wanted` first."""
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    close = difflib.get_close_matches(wanted, types, n=3)
    problem += f"; nearest: {', '.join(close)}" if close else ""
    room = _SENTENCE - len(problem)
    towers = f", and text towers in {listed(WRAPPERS, room // 4)}."
    supported = "; supported are "
    return problem + supported + listed(types, room - len(supported) - len(towers)) + towers


def listed(names: Sequence[str], room: int) -> str:
    """Names in at most about `room` characters, in their order: those of one stem together, as a shell writes them.

    "gemma{,2,3_text}" is gemma, gemma2 and gemma3_text. What has no room is counted, and docs/models.md has it.
    """
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(re.split("[^a-z]", name)[0], []).append(name)
    text, left = "", len(names)
    for stem, members in stems.items():
        endings = ",".join(name.removeprefix(stem) for name in members)
        group = members[0] if len(members) == 1 else f"{stem}{{{endings}}}"
        rest = f" and {left} more in docs/models.md"
        if len(text) + len(group) + 2 + len(rest) > room:
            return text + rest if text else f"{left} in docs/models.md"
        text += f", {group}" if text else group
        left -= len(members)
    return text


def family_named(name: str) -> Family:
    """The family of `DecoderConfig.family`.

    Raises:
      InputError: there is none of that name.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise InputError(f"There is no family {name!r}; known are {', '.join(f.name for f in FAMILIES)}.")


__all__ = ["FAMILIES", "WRAPPERS", "Family", "family_for", "family_named", "listed"]
