"""Reading and writing the keys of a `config.json` that are about experts and shared by several families."""

from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.config_json import HfConfig, flag, number, positive
from pronghorn.models.experts_config import ExpertsConfig

# Read by `read_experts`, whatever the family.
EXPERT_KEYS = frozenset({
    "num_experts", "num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"
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
