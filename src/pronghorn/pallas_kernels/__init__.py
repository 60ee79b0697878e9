"""The hot operations, one a file: formula, oracle, Pallas kernel, and a gradient derived by hand.

Usable alone: nothing here knows of models. `kernels("xla")` as a context runs the oracles instead. A name below is the
function; its module of the same name is reached with `from pronghorn.pallas_kernels.rms_norm import ...`.
"""

from pronghorn.pallas_kernels.clamped_swiglu import clamped_swiglu
from pronghorn.pallas_kernels.convolved_heads import convolved_heads
from pronghorn.pallas_kernels.cross_entropy import cross_entropy
from pronghorn.pallas_kernels.flash_attention import flash_attention
from pronghorn.pallas_kernels.gated_activation import gated_activation
from pronghorn.pallas_kernels.gated_delta_rule import gated_delta_rule
from pronghorn.pallas_kernels.gated_mlp import gated_mlp
from pronghorn.pallas_kernels.grouped_linear import grouped_linear
from pronghorn.pallas_kernels.launch import kernels
from pronghorn.pallas_kernels.layer_norm import layer_norm
from pronghorn.pallas_kernels.linear_cross_entropy import linear_cross_entropy, linear_token_losses
from pronghorn.pallas_kernels.lora_linear import lora_linear
from pronghorn.pallas_kernels.norm_linears import norm_linears
from pronghorn.pallas_kernels.residual_linear import residual_linear
from pronghorn.pallas_kernels.rms_norm import rms_norm
from pronghorn.pallas_kernels.rope import apply_rope
from pronghorn.pallas_kernels.stacked_linears import LinearWeights
from pronghorn.pallas_kernels.state_space import state_space
from pronghorn.pallas_kernels.weighted_gated_activation import weighted_gated_activation

__all__ = [
    "LinearWeights",
    "apply_rope",
    "clamped_swiglu",
    "convolved_heads",
    "cross_entropy",
    "flash_attention",
    "gated_activation",
    "gated_delta_rule",
    "gated_mlp",
    "grouped_linear",
    "kernels",
    "layer_norm",
    "linear_cross_entropy",
    "linear_token_losses",
    "lora_linear",
    "norm_linears",
    "residual_linear",
    "rms_norm",
    "state_space",
    "weighted_gated_activation",
]
