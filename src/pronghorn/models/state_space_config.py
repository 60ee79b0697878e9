"""`StateSpaceConfig`: the layers of Mamba 2 in place of attention, or beside it."""

import dataclasses
import math
from typing import Literal

GatedNorm = Literal["gate_first", "norm_first", "none"]


@dataclasses.dataclass(frozen=True)
class StateSpaceConfig:
    """Sizes and switches of `models/mamba.py`, which has the formulas.

    Attributes:
      heads, head_dim: of what is written to the state.
      groups, state_dim: of the directions that it is written in and read from; heads / groups heads share one. The
        norm is of so many equal groups, too.
      conv_width: tokens of the convolution.
      conv_bias, input_bias, output_bias: which of the convolution and the two projections have a bias.
      step_limits: what steps are clamped to.
      gated_norm: rms_norm(o silu(z)), rms_norm(o) silu(z), or o silu(z).
      input_scale, output_scale: factors of what the layer reads and of what it adds.
      part_scales: factors of z, x, b, c and the step, as they are projected.
    """

    heads: int
    head_dim: int
    groups: int
    state_dim: int
    conv_width: int
    conv_bias: bool = True
    input_bias: bool = False
    output_bias: bool = False
    step_limits: tuple[float, float] = (0.0, math.inf)
    gated_norm: GatedNorm = "gate_first"
    input_scale: float = 1.0
    output_scale: float = 1.0
    part_scales: tuple[float, ...] = (1.0,) * 5

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise ValueError(f"{self.heads} state-space heads are no multiple of {self.groups} groups")
        low, high = self.step_limits
        if not 0 <= low <= high:
            raise ValueError(f"the limits of state-space steps, {low} and {high}, are no range from 0 on")
        if len(self.part_scales) != 5:
            raise ValueError(f"a state-space projection has 5 parts, and {len(self.part_scales)} factors")

    @property
    def width(self) -> int:
        """Dims of all heads."""
        return self.heads * self.head_dim

    @property
    def conv_features(self) -> int:
        """What the convolution runs over: x, b and c."""
        return self.width + 2 * self.groups * self.state_dim

    @property
    def projected(self) -> int:
        """Rows of the projection in front: z, x, b, c and a step a head."""
        return self.width + self.conv_features + self.heads
