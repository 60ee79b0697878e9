"""HyperCLOVA X SEED (text).

Special: the factors of Granite, but `logits_scaling` multiplies, and attention's is that of Llama where none is given;
a norm more on what each half of a layer puts out (`use_post_norm`).
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, number, positive, read_common, write_common
from pronghorn.models.granite import FACTOR_KEYS, read_factors, write_factors
from pronghorn.models.tensor_names import llama_tensor_names

_CODE = frozenset(
    {
        "configuration_hyperclovax.HyperCLOVAXConfig",
        "modeling_hyperclovax.HyperCLOVAXModel",
        "modeling_hyperclovax.HyperCLOVAXForCausalLM",
    }
)
_POST_NORMS = {
    "post_attention_layernorm": "post_norm1",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_norm2",
}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hidden, heads = positive(hf, "hidden_size"), positive(hf, "num_attention_heads")
    scale = number(hf, "attention_multiplier", positive(hf, "head_dim", hidden // heads) ** -0.5)
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        hf,
        family="hyperclovax",
        known=FACTOR_KEYS | {"attention_bias", "mlp_bias", "use_post_norm"},
        own_code=_CODE,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(hf, "mlp_bias"),
        block="sandwich" if flag(hf, "use_post_norm", True) else "pre",
        **(read_factors(hf) | {"attention_scale": scale, "logit_scale": number(hf, "logits_scaling", 1.0)}),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    hf = write_common(config, "hyperclovax", "HyperCLOVAXForCausalLM") | write_factors(config)
    return hf | {
        "attention_bias": config.qkv_bias,
        "logits_scaling": config.logit_scale,
        "mlp_bias": config.mlp_bias,
        "use_post_norm": config.block == "sandwich",
    }


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    return llama_tensor_names(config, _POST_NORMS if config.block == "sandwich" else None)


FAMILY = Family("hyperclovax", ("hyperclovax",), config_from_hf, config_to_hf, tensor_names)
