"""ERNIE 4.5 with a mixture of experts (21B-A3B, 300B-A47B).

Special: ERNIE 4.5's attention, tied; experts in every `moe_layer_interval`-th layer from `moe_layer_start_index` to
`moe_layer_end_index`, chosen by a softmax and a correction (`moe_statics` in the file, a matrix of one row), their
weights divided by a sum that is `moe_norm_min` at least; one network that every token goes through. The layers that
predict further tokens (mtp) are left out, as in transformers.
"""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import (
    Family,
    HfConfig,
    flag,
    number,
    positive,
    read_common,
    whole,
    write_common,
)
from pronghorn.models.experts_config import ExpertsConfig
from pronghorn.models.tensor_names import SHARED_EXPERTS, expert_tensors, llama_tensor_names

_KNOWN = frozenset({
    "moe_intermediate_size", "moe_k", "moe_layer_end_index", "moe_layer_interval", "moe_layer_start_index",
    "moe_norm_min", "moe_num_experts", "moe_num_shared_experts", "num_nextn_predict_layers", "output_router_logits",
    "router_aux_loss_coef",
    # How many rows an expert took in pre-training at most; here and in transformers none is dropped.
    "moe_capacity",
})  # fmt: skip
_NEUTRAL = {
    "moe_gate": ("topk",),
    "moe_use_aux_free": (True,),
    "use_bias": (False,),
    "use_rmsnorm": (True,),
}
_NAMES = SHARED_EXPERTS | {"mlp.gate.e_score_correction_bias": "mlp.moe_statics.e_score_correction_bias"}


def _dense_layers(layers: int, start: int, end: int, interval: int) -> tuple[int, ...]:
    return tuple(i for i in range(layers) if not start <= i <= end or (i + 1) % interval)


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Read a config.json; InputError names what it refuses."""
    hf = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True} | dict(hf)
    layers, width = positive(hf, "num_hidden_layers"), positive(hf, "moe_intermediate_size", 1536)
    last = hf.get("moe_layer_end_index")
    last = layers - 1 if last in (None, -1) else whole(hf, "moe_layer_end_index")
    start, interval = whole(hf, "moe_layer_start_index", 1), positive(hf, "moe_layer_interval", 1)
    dense = _dense_layers(layers, start, last, interval)
    if len(dense) == layers:
        raise InputError(
            "config.json: moe_layer_start_index, moe_layer_end_index and moe_layer_interval leave no layer with "
            "experts; use model_type ernie4_5."
        )
    try:
        experts = ExpertsConfig(
            num_experts=positive(hf, "moe_num_experts", 64),
            experts_per_token=positive(hf, "moe_k", 6),
            width=width,
            normalized=True,
            normalizer_minimum=number(hf, "moe_norm_min", 1e-12),
            wide_logits=True,
            correction_bias=True,
            correction_row=True,
            shared_width=width * whole(hf, "moe_num_shared_experts", 2),
            dense_layers=dense,
            balance_coefficient=number(hf, "router_aux_loss_coef", 0.001),
            balance_loss=flag(hf, "output_router_logits"),
        )
    except ValueError as error:
        raise InputError(f"config.json describes no possible mixture of experts: {error}.") from error
    return read_common(
        hf,
        family="ernie4_5_moe",
        known=_KNOWN,
        neutral=_NEUTRAL,
        default_kv_heads=4,
        rope_interleaved=True,
        experts=experts,
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Write a config.json."""
    experts = config.experts
    assert experts is not None
    sparse = [i for i in range(config.num_layers) if config.is_sparse(i)]
    start, end = sparse[0], sparse[-1]
    interval = next(
        step
        for step in range(1, config.num_layers + 1)
        if _dense_layers(config.num_layers, start, end, step) == experts.dense_layers
    )
    return write_common(config, "ernie4_5_moe", "Ernie4_5_MoeForCausalLM") | {
        "moe_intermediate_size": experts.width,
        "moe_k": experts.experts_per_token,
        "moe_layer_end_index": end,
        "moe_layer_interval": interval,
        "moe_layer_start_index": start,
        "moe_norm_min": experts.normalizer_minimum,
        "moe_num_experts": experts.num_experts,
        "moe_num_shared_experts": experts.shared_width // experts.width,
        "output_router_logits": experts.balance_loss,
        "router_aux_loss_coef": experts.balance_coefficient,
        "use_bias": False,
    }


FAMILY = Family(
    "ernie4_5_moe",
    ("ernie4_5_moe",),
    config_from_hf,
    config_to_hf,
    lambda config: llama_tensor_names(config, _NAMES),
    stacked_tensors=expert_tensors,
    left_out=lambda hf: ("model.mtp_", "mtp."),
)
