"""Reading and writing the keys of a `config.json` that are about experts and shared by several families."""

from collections.abc import Mapping
from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import HfConfig, flag, number, positive, whole
from pronghorn.models.experts_config import ExpertsConfig

# Read by `read_experts`, whatever the family.
EXPERT_KEYS = frozenset({
    "num_experts", "num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"
})  # fmt: skip
# Read by `read_routed_experts` and `predicting_layers`. In these families output_router_logits asks for no loss.
ROUTED_EXPERT_KEYS = frozenset({
    "first_k_dense_replace", "moe_intermediate_size", "n_group", "n_routed_experts", "n_shared_experts",
    "norm_topk_prob", "num_experts_per_tok", "num_nextn_predict_layers", "output_router_logits",
    "routed_scaling_factor", "topk_group",
})  # fmt: skip
SPARSE_LAYER_KEYS = frozenset({"decoder_sparse_step", "mlp_only_layers"})


def read_experts(
    hf: HfConfig, *, count: int, chosen: int, coefficient: float, **specific: Any
) -> ExpertsConfig:
    """An ExpertsConfig from the keys that every family shares.

    Args:
      hf: the config.json.
      count, chosen, coefficient: the family's defaults of num_experts (or num_local_experts), num_experts_per_tok and
        router_aux_loss_coef.
      specific: the other fields.

    Raises:
      InputError: a key has a value that cannot be, or the two names of the number of experts disagree.
    """
    names = [key for key in ("num_experts", "num_local_experts") if hf.get(key) is not None]
    counts = [positive(hf, key) for key in names]
    if len(set(counts)) > 1:
        raise InputError(
            f"config.json: num_experts is {counts[0]} and num_local_experts {counts[1]}; they are two names of one "
            "number, so remove the wrong one."
        )
    try:
        return ExpertsConfig(
            num_experts=counts[0] if counts else count,
            experts_per_token=positive(hf, "num_experts_per_tok", chosen),
            balance_coefficient=number(hf, "router_aux_loss_coef", coefficient),
            balance_loss=flag(hf, "output_router_logits"),
            **specific,
        )
    except ValueError as error:
        raise InputError(f"config.json describes no possible mixture of experts: {error}.") from error


def write_experts(config: DecoderConfig, count_key: str = "num_experts") -> dict[str, Any]:
    """The keys that `read_experts` reads."""
    experts = config.experts
    assert experts is not None
    return {
        count_key: experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "router_aux_loss_coef": experts.balance_coefficient,
        "output_router_logits": experts.balance_loss,
    }


def read_routed_experts(hf: HfConfig, defaults: Mapping[str, Any], **specific: Any) -> ExpertsConfig:
    """An ExpertsConfig from the keys that DeepSeek's mixtures and their kin have.

    Args:
      defaults: the family's of every one of `ROUTED_EXPERT_KEYS` that is read here.
      specific: the other fields.

    Raises:
      InputError: a key has a value that cannot be, or no layer has experts.
    """
    hf = dict(defaults) | {key: value for key, value in hf.items() if value is not None}
    layers, dense = positive(hf, "num_hidden_layers"), whole(hf, "first_k_dense_replace")
    if dense >= layers:
        raise InputError(
            f"config.json: first_k_dense_replace is {dense} and num_hidden_layers {layers}, which leaves no layer with "
            "experts; make it smaller."
        )
    width = positive(hf, "moe_intermediate_size")
    try:
        return ExpertsConfig(
            num_experts=positive(hf, "n_routed_experts"),
            experts_per_token=positive(hf, "num_experts_per_tok"),
            width=width,
            normalized=flag(hf, "norm_topk_prob"),
            scaling_factor=number(hf, "routed_scaling_factor"),
            wide_logits=True,
            groups=positive(hf, "n_group"),
            groups_chosen=positive(hf, "topk_group"),
            shared_width=width * whole(hf, "n_shared_experts"),
            dense_layers=tuple(range(dense)),
            **specific,
        )
    except ValueError as error:
        raise InputError(f"config.json describes no possible mixture of experts: {error}.") from error


def write_routed_experts(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_routed_experts` reads."""
    experts = config.experts
    assert experts is not None
    return {
        "first_k_dense_replace": len(experts.dense_layers),
        "moe_intermediate_size": experts.width,
        "n_group": experts.groups,
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.shared_width // experts.width,
        "norm_topk_prob": experts.normalized,
        "num_experts_per_tok": experts.experts_per_token,
        "routed_scaling_factor": experts.scaling_factor,
        "topk_group": experts.groups_chosen,
    }


def predicting_layers(hf: HfConfig) -> tuple[str, ...]:
    """How the names of tensors begin of layers that predict further tokens: files have them behind the decoder's."""
    first = positive(hf, "num_hidden_layers")
    count = whole(hf, "num_nextn_predict_layers", 1)
    return tuple(f"model.layers.{first + index}." for index in range(count))


def read_dense_layers(hf: HfConfig) -> tuple[int, ...]:
    """The layers without experts: those of `mlp_only_layers`, and all but every `decoder_sparse_step`-th."""
    step, layers = positive(hf, "decoder_sparse_step", 1), positive(hf, "num_hidden_layers")
    named = hf.get("mlp_only_layers") or []
    if not isinstance(named, list | tuple) or not all(type(i) is int and 0 <= i < layers for i in named):
        raise InputError(f"config.json: mlp_only_layers has to list layers from 0 to {layers - 1}.")
    dense = tuple(i for i in range(layers) if i in named or (i + 1) % step)
    if len(dense) == layers:
        raise InputError(
            "config.json: decoder_sparse_step and mlp_only_layers leave no layer with experts; use the dense family's "
            "model_type."
        )
    return dense


def write_dense_layers(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read_dense_layers`."""
    assert config.experts is not None
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(config.experts.dense_layers)}
