"""The modules of a mixture of experts, named as in Hugging Face. What they compute is in `models/experts.py`.

A linear of all experts is one module, its weight stacked on an axis of experts: `[experts, out, in]`. Where layers are
scanned there is an axis of layers in front of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pronghorn.models.config import DecoderConfig
from pronghorn.models.experts_config import ExpertsConfig
from pronghorn.models.layers import MLP, Linear, WideConstant, _normal, _param, value_or_none
from pronghorn.pallas_kernels.grouped_linear import grouped_linears
from pronghorn.pallas_kernels.stacked_grouped_linear import stack_well, stacked_grouped_linears
from pronghorn.pallas_kernels.stacked_linears import LinearWeights


class Router(nnx.Module):
    """The router's weight `[experts, d]`, its bias `[experts]` or None, and `e_score_correction_bias` fp32 `[experts]`
    (or `[1, experts]`) or None.

    It is no `Linear`: neither adapters nor quantisation are for it, as in transformers.
    """

    def __init__(
        self, config: ExpertsConfig, hidden: int, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()
    ):
        shape = (*leading, config.num_experts, hidden)
        self.weight = _param(_normal(rngs, shape, dtype), ("experts", "hidden"), leading)
        zeros = jnp.zeros((*leading, config.num_experts), dtype) if config.router_bias else None
        self.bias = nnx.data(None if zeros is None else _param(zeros, ("experts",), leading))
        correction = None
        if config.correction_bias:
            row = ("one",) * config.correction_row
            zeros = jnp.zeros((*leading, *(1 for _ in row), config.num_experts), jnp.float32)
            correction = WideConstant(zeros, logical_axes=("layers",) * len(leading) + (*row, "experts"))
        self.e_score_correction_bias = nnx.data(correction)


class ExpertLinear(Linear):
    """y = x W_eᵀ + b_e + s (x A_eᵀ) B_eᵀ for rows x sorted by expert e, through `pallas_kernels.grouped_linear`.

    Attributes are those of `Linear` with an axis of experts in front: weight `[experts, out, in]`, bias
    `[experts, out]`, lora_A fp32 `[experts, r, in]`, lora_B `[experts, out, r]`. DoRA and dropout are not for it.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str, str],
        bias: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
        leading: tuple[int, ...] = (),
    ):
        super().__init__(
            in_features,
            out_features,
            axes=axes,
            bias=bias,
            dtype=dtype,
            rngs=rngs,
            leading=(*leading, experts),
        )
        layers = ("layers",) * len(leading)
        for name, own in (("weight", axes), ("bias", axes[:1])):
            variable = getattr(self, name)
            if variable is not None:
                axes_of_all = (*layers, "experts", *own)
                setattr(self, name, nnx.Param(variable.get_value(), logical_axes=axes_of_all))

    def arrays(self) -> LinearWeights:
        """What `grouped_linears` takes."""
        return LinearWeights(self.weight.get_value(), *self.adapter(), value_or_none(self.bias))


class Experts(nnx.Module):
    """`{gate,up,down}_proj` of all experts. `stacked`: the layers lie on an axis in front, and are scanned over."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()):
        assert config.experts is not None
        self.stacked = bool(leading)
        count, width, hidden = config.experts.num_experts, config.experts.width, config.hidden_size
        common: dict[str, Any] = {
            "dtype": dtype,
            "rngs": rngs,
            "leading": leading,
            "bias": config.experts.bias,
        }
        self.gate_proj = ExpertLinear(count, hidden, width, axes=("ffn", "hidden"), **common)
        self.up_proj = ExpertLinear(count, hidden, width, axes=("ffn", "hidden"), **common)
        self.down_proj = ExpertLinear(count, width, hidden, axes=("hidden", "ffn"), **common)

    def gate_and_up(self, rows: jax.Array, group_sizes: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """`[rows, d]`, those of expert 0 first, and int32 `[experts]` how many each has -> gate and up
        `[rows, width]`, or both beside each other `[rows, 2 width]` and None."""
        layers = (self.gate_proj, self.up_proj)
        scales = [layer.lora_scale for layer in layers]
        linears = [layer.arrays() for layer in layers]
        # One product is faster than two where its weight need not be put together out of arrays that exist. In a scan
        # the two dequantised matrices find room between the stacks of gradients, and one of twice their size does not:
        # 0.3 GiB more of a Qwen3-30B-A3B that keeps layer inputs only.
        if not self.stacked and stack_well(rows, linears):
            return stacked_grouped_linears(rows, linears, group_sizes, scales=scales), None
        gate, up = grouped_linears(rows, linears, group_sizes, scales=scales)
        return gate, up

    def down(self, hidden: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """`[rows, width]` -> `[rows, d]`, like `gate_and_up`."""
        layer = self.down_proj
        return grouped_linears(hidden, [layer.arrays()], group_sizes, scales=[layer.lora_scale])[0]


class SparseMLP(nnx.Module):
    """Parameters of a mixture of experts: the router `gate`, `experts`, and `shared_expert` (with its
    `shared_expert_gate`) or None."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()):
        experts = config.experts
        assert experts is not None
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "leading": leading}
        self.gate = Router(experts, config.hidden_size, **common)
        self.experts = Experts(config, **common)
        shared = MLP(config, width=experts.shared_width, **common) if experts.shared_width else None
        self.shared_expert = nnx.data(shared)
        gate = (
            Linear(config.hidden_size, 1, axes=("one", "hidden"), **common) if experts.shared_gate else None
        )
        self.shared_expert_gate = nnx.data(gate)
