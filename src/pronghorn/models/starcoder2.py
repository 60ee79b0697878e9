"""StarCoder 2.

Special: layer norm with bias, biases everywhere (`use_bias`), an MLP without a gate named c_fc and c_proj, a window on
every layer where `sliding_window` is set; tied.
"""

from typing import Any

from pronghorn.models.config import DecoderConfig, LayerKind
from pronghorn.models.config_json import Family, HfConfig, flag, positive, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names

_NAMES = {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
# Dropout is for training from scratch: fine-tuning here drops in front of adapters only.
_KNOWN = frozenset({
    "attention_dropout", "embedding_dropout", "residual_dropout", "sliding_window", "use_bias"
})  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {"mlp_type": ("default",), "norm_type": ("layer_norm",)}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    defaults = {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "tie_word_embeddings": True}
    hf = defaults | {"max_position_embeddings": 4096} | dict(hf)
    window = positive(hf, "sliding_window") if hf.get("sliding_window") is not None else None
    kind: LayerKind = "full" if window is None else "sliding"
    bias = flag(hf, "use_bias", True)
    return read_common(
        hf,
        family="starcoder2",
        known=_KNOWN,
        neutral=_NEUTRAL,
        default_kv_heads=2,
        eps_key="norm_epsilon",
        norm="layer",
        norm_bias=True,
        gated_mlp=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        sliding_window=window,
        layer_kinds=(kind,) * positive(hf, "num_hidden_layers"),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return write_common(config, "starcoder2", "Starcoder2ForCausalLM", eps_key="norm_epsilon") | {
        "sliding_window": config.sliding_window,
        "use_bias": config.qkv_bias,
    }


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    return llama_tensor_names(config, _NAMES)


FAMILY = Family("starcoder2", ("starcoder2",), config_from_hf, config_to_hf, tensor_names)
