"""MiniCPM 3 (4B).

Special: multi-head latent attention in a dense model, here with pairs (i, i + R/2); factors on the embedding
(`scale_emb`), on what each half of a layer adds (`scale_depth` over the root of the number of layers) and on the logits
(`dim_model_base` over the hidden size); tied.
"""

import math
from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, number, positive, read_common, write_common
from pronghorn.models.latent_json import LATENT_KEYS, read_latent, write_latent
from pronghorn.models.tensor_names import llama_tensor_names

_DEFAULTS = {
    "intermediate_size": 6400,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "tie_word_embeddings": True,
}
_LATENT = {"kv_lora_rank": 256, "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
_OWN_CODE = frozenset({
    "configuration_minicpm.MiniCPM3Config", "modeling_minicpm.MiniCPM3Model", "modeling_minicpm.MiniCPM3ForCausalLM",
    "modeling_minicpm.MiniCPM3ForSequenceClassification",
})  # fmt: skip


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = _DEFAULTS | dict(hf)
    hidden, root = positive(hf, "hidden_size"), math.sqrt(positive(hf, "num_hidden_layers"))
    bias = flag(hf, "attention_bias")
    defaults = _LATENT | {"v_head_dim": hidden // positive(hf, "num_attention_heads")}
    return read_common(
        hf,
        family="minicpm3",
        known=LATENT_KEYS | {"attention_bias", "dim_model_base", "mlp_bias", "scale_depth", "scale_emb"},
        own_code=_OWN_CODE,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=flag(hf, "mlp_bias"),
        embedding_scale=number(hf, "scale_emb", 12.0),
        # A null means without a factor, here and below; an absent key the family's default.
        residual_scale=number(hf, "scale_depth", root) / root,
        logit_scale=positive(hf, "dim_model_base", hidden) / hidden,
        **read_latent(hf, defaults),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return (
        write_common(config, "minicpm3", "MiniCPM3ForCausalLM")
        | write_latent(config)
        | {
            "attention_bias": config.qkv_bias,
            "mlp_bias": config.mlp_bias,
            "scale_emb": config.embedding_scale,
            # Rounded, so that what was read is written: a root is taken and multiplied by again.
            "scale_depth": round(config.residual_scale * math.sqrt(config.num_layers), 12),
            "dim_model_base": round(config.logit_scale * config.hidden_size),
        }
    )


FAMILY = Family("minicpm3", ("minicpm3",), config_from_hf, config_to_hf, llama_tensor_names)
