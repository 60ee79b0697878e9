"""Mixtral (8x7B, 8x22B).

Special: Mistral's attention; every layer has experts, as wide as `intermediate_size` says, and the weights of those
chosen add up to one. The file calls the layer's network `block_sparse_moe` and its linears w1 (gate), w3 (up) and w2
(down).
"""

from typing import Any

from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import Family, HfConfig, positive, read_common, write_common
from pronghorn.models.experts_json import EXPERT_KEYS, read_experts, write_experts
from pronghorn.models.tensor_names import expert_tensors, llama_tensor_names

_EXPERTS = {
    "mlp.experts.gate_proj": "block_sparse_moe.experts.{}.w1",
    "mlp.experts.up_proj": "block_sparse_moe.experts.{}.w3",
    "mlp.experts.down_proj": "block_sparse_moe.experts.{}.w2",
}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    window = None if hf.get("sliding_window") is None else positive(hf, "sliding_window")
    return read_common(
        hf,
        family="mixtral",
        known=EXPERT_KEYS | {"sliding_window"},
        default_kv_heads=8,
        # Noise on the router's input while training in transformers, which no published checkpoint has.
        neutral={"router_jitter_noise": (0,)},
        sliding_window=window,
        layer_kinds=("full" if window is None else "sliding",) * positive(hf, "num_hidden_layers"),
        experts=read_experts(
            hf,
            count=8,
            chosen=2,
            coefficient=0.001,
            width=positive(hf, "intermediate_size"),
            normalized=True,
        ),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    return (
        write_common(config, "mixtral", "MixtralForCausalLM")
        | write_experts(config, "num_local_experts")
        | {"sliding_window": config.sliding_window}
    )


FAMILY = Family(
    "mixtral",
    ("mixtral",),
    config_from_hf,
    config_to_hf,
    lambda config: llama_tensor_names(config, {"mlp.gate": "block_sparse_moe.gate"}),
    stacked_tensors=lambda config: expert_tensors(config, _EXPERTS),
)
