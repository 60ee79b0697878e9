"""InternLM 3 and IQuest-Coder: Llama's computation, which is what transformers runs for both, with other defaults.

Special: two key/value heads (InternLM) and eight (IQuest) where the file does not say; `qkv_bias` and `bias` are
other names of `attention_bias` and `mlp_bias`. InternLM's own code is named in `auto_map` and not needed.
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names

_INTERNLM_CODE = frozenset({
    f"{module}_internlm3.InternLM3{name}"
    for module, name in (("configuration", "Config"), ("modeling", "Model"), ("modeling", "ForCausalLM"))
})  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False,)}


def _config_from_hf(hf: HfConfig, family: str, kv_heads: int, own_code: frozenset[str]) -> DecoderConfig:
    attention_bias = flag(hf, "attention_bias", flag(hf, "qkv_bias"))
    mlp_bias = flag(hf, "mlp_bias", flag(hf, "bias"))
    if family == "internlm3" and attention_bias != mlp_bias:
        raise InputError("config.json: qkv_bias and bias differ, which transformers does not compute either.")
    return read_common(
        {"head_dim": 128, "rms_norm_eps": 1e-5} | dict(hf),
        family=family,
        known=frozenset({"attention_bias", "mlp_bias", "qkv_bias", "bias"}),
        default_kv_heads=kv_heads,
        neutral=_NEUTRAL,
        own_code=own_code,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=mlp_bias,
    )


def internlm3_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    return _config_from_hf(hf, "internlm3", 2, _INTERNLM_CODE)


def iquestcoder_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    return _config_from_hf(hf, "iquestcoder", 8, frozenset())


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json; the architecture is the class that transformers runs."""
    return write_common(config, config.family, "LlamaForCausalLM") | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


INTERNLM3 = Family("internlm3", ("internlm3",), internlm3_from_hf, config_to_hf, llama_tensor_names)
IQUESTCODER = Family("iquestcoder", ("iquestcoder",), iquestcoder_from_hf, config_to_hf, llama_tensor_names)
