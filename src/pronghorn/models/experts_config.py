"""`ExpertsConfig`: the mixture of experts in place of a layer's feed-forward network."""

import dataclasses
from typing import Literal

RouterKind = Literal["softmax", "softmax_after_top_k", "sigmoid", "sigmoid_after_top_k"]
GroupScore = Literal["two_best", "best"]


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A router that chooses k of E feed-forward networks for every token, and what stands beside them.

    With l = W_gate n the router's logits of a token n, s its scores and b the correction (zero without one):

      softmax               s = softmax(l), chosen by s + b
      softmax_after_top_k   chosen by l, s = softmax over the k that are chosen
      sigmoid               s = sigmoid(l), chosen by s + b
      sigmoid_after_top_k   chosen by l, s = sigmoid(l): the same where sigmoid(l) is no 1

    y = scaling_factor Σ_chosen w_e f_e(n) (+ the shared expert's), w_e = s_e, or where `normalized`
    s_e / max(Σ_chosen s + normalizer_epsilon, normalizer_minimum).

    Attributes:
      num_experts, experts_per_token: E and k.
      width: of one expert, between its two products.
      router: see above.
      normalized: weights of the chosen add up to one.
      scaling_factor: of the weights, after that.
      normalizer_epsilon, normalizer_minimum: of the sum that weights are divided by.
      weights_on_input: an expert computes f_e(w_e n), and its output has no weight (Llama 4).
      wide_logits: the logits are fp32, not rounded to the dtype of the stream.
      correction_bias: b is there: it moves the choice, never the weights, and has no gradient.
      correction_row: the checkpoint has b as a matrix of one row.
      groups, groups_chosen: experts are taken from the best `groups_chosen` of so many equal groups only; 1 and 1 for
        no limit.
      group_score: of a group: the sum of its two best (DeepSeek-V3, arXiv:2412.19437, 2.1.2), or its best
        (DeepSeek-V2, arXiv:2405.04434, 2.2.2).
      shared_width: of the feed-forward network that every token goes through as well; 0 for none.
      shared_gate: its output is multiplied by sigmoid(w n).
      dense_layers: indices of the layers that have a plain feed-forward network.
      router_bias: the router's logits are W_gate n + b.
      bias: the three linears of every expert have biases.
      swiglu_limit: experts compute `clamped_swiglu` with this limit in place of act(gate) * up; None for no limit.
      swiglu_alpha: of that function.
      balance_coefficient: of the load-balancing loss, where it is asked for.
      balance_loss: the checkpoint asks for that loss (`output_router_logits`).
    """

    num_experts: int
    experts_per_token: int
    width: int
    router: RouterKind = "softmax"
    normalized: bool = False
    scaling_factor: float = 1.0
    normalizer_epsilon: float = 0.0
    normalizer_minimum: float = 0.0
    weights_on_input: bool = False
    wide_logits: bool = False
    correction_bias: bool = False
    correction_row: bool = False
    groups: int = 1
    groups_chosen: int = 1
    group_score: GroupScore = "two_best"
    shared_width: int = 0
    shared_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    router_bias: bool = False
    bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    balance_coefficient: float = 0.0
    balance_loss: bool = False

    def __post_init__(self) -> None:
        if self.swiglu_limit is not None and not self.swiglu_limit > 0:
            raise ValueError(f"swiglu_limit {self.swiglu_limit} is not over zero")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} is not between 1 and num_experts {self.num_experts}"
            )
        if self.num_experts % self.groups or not 1 <= self.groups_chosen <= self.groups:
            raise ValueError(
                f"groups {self.groups} and groups_chosen {self.groups_chosen} do not fit {self.num_experts} experts"
            )
        if self.experts_per_token > self.groups_chosen * (self.num_experts // self.groups):
            raise ValueError(
                f"the {self.groups_chosen} groups chosen have fewer than {self.experts_per_token} experts"
            )
