"""EXAONE 3, 3.5 and Deep: Llama's computation, which is what transformers runs for it.

Special: files say `transformer.h.0.attn.attention.out_proj` and the like, where the modules of transformers (and so
adapters) have Llama's names; three keys of the configuration have names of their own. Its first code is named in
`auto_map` and not needed.
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, flag, read_common, write_common
from pronghorn.models.tensor_names import llama_tensor_names

_CODE = frozenset(
    {"configuration_exaone.ExaoneConfig"}
    | {f"modeling_exaone.Exaone{name}" for name in ("Model", "ForCausalLM", "ForSequenceClassification")}
)
# transformers takes either name.
_KEYS = {
    "num_layers": "num_hidden_layers",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}
_MODULES = {
    "self_attn.q_proj": "attn.attention.q_proj",
    "self_attn.k_proj": "attn.attention.k_proj",
    "self_attn.v_proj": "attn.attention.v_proj",
    "self_attn.o_proj": "attn.attention.out_proj",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.norm.weight": "transformer.ln_f.weight",
}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    found = {
        "vocab_size": 102400,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
    }
    found |= {key: value for key, value in hf.items() if key not in _KEYS}
    for theirs, usual in _KEYS.items():
        if hf.get(theirs) is not None:
            if hf.get(usual, hf[theirs]) != hf[theirs]:
                raise InputError(
                    f"config.json: {theirs} and {usual} are one setting and differ; remove one of them."
                )
            found[usual] = hf[theirs]
    attention_bias = flag(hf, "attention_bias")
    return read_common(
        found,
        family="exaone",
        known=frozenset({"attention_bias", "mlp_bias"}),
        neutral={"embed_dropout": (0,)},
        own_code=_CODE,
        default_kv_heads=8,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(hf, "mlp_bias"),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json, with the keys of the published ones."""
    hf = write_common(config, "exaone", "ExaoneForCausalLM")
    names = {usual: theirs for theirs, usual in _KEYS.items()}
    hf = {names.get(key, key): value for key, value in hf.items()}
    return hf | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Our name -> the checkpoint's."""
    return {
        ours: _OUTSIDE.get(theirs, theirs.replace("model.layers.", "transformer.h."))
        for ours, theirs in llama_tensor_names(config, _MODULES).items()
    }


FAMILY = Family(
    "exaone", ("exaone",), config_from_hf, config_to_hf, tensor_names, module_tensors=llama_tensor_names
)
