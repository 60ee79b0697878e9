"""VaultGemma.

Special: as Gemma 2 without the norms on what each half of a layer puts out.
"""

from typing import Any

from pronghorn.models import gemma2
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig
from pronghorn.models.tensor_names import llama_tensor_names

_NAMES = {"post_attention_layernorm": "pre_feedforward_layernorm"}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    return gemma2.read(hf, family="vaultgemma", block="pre")


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return gemma2.write_sandwich(config, "vaultgemma", "VaultGemmaForCausalLM")


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    return llama_tensor_names(config, _NAMES)


FAMILY = Family("vaultgemma", ("vaultgemma",), config_from_hf, config_to_hf, tensor_names)
