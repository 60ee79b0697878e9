"""Qwen 3.5, dense text models.

Special: layers of a gated delta net, and of attention with a gate; `delta_net_json.py` has what is shared.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig
from pronghorn.models.delta_net_json import further_heads, hybrid_tensor_names, read_hybrid, write_hybrid


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    return read_hybrid(hf, family="qwen3_5", default_kv_heads=4)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_hybrid(config, "qwen3_5_text", "Qwen3_5ForCausalLM")


FAMILY = Family(
    "qwen3_5", ("qwen3_5_text",), config_from_hf, config_to_hf, hybrid_tensor_names, left_out=further_heads
)
