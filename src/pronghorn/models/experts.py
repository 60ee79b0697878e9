"""The forward pass of a mixture of experts: route, sort by expert, one grouped product a linear, sum back.

Everything has static shapes: T tokens that choose k experts each are T k rows, sorted by expert. No row is dropped and
none is padded, whatever the router chooses; an expert without a token is a group of no rows.

    rows     x_s = n[t(s)],                 s the sorted place of (token t, choice j)
    experts  y_s = W_down (f(W_gate x_s) * W_up x_s), each W the expert's own (and its bias); `clamped_swiglu` may stand
             in place of f and the product
    back     y_t = Σ_j w_tj y_s(t, j)       in fp32, rounded once

W_down is linear: without a bias w_s multiplies the width values in front of it, h_s = w_s f(W_gate x_s) * W_up x_s, in
the pass that computes them, and y_t = Σ_j W_down h_s(t, j). Then dw_s is a sum over what backward has at hand, and no
y_s, the largest array of a layer, is kept for it. With a bias (or `clamped_swiglu`) w weighs y, and y is kept.

A gather has a scatter-add for its gradient, which is slow and adds up in no fixed order. All gathers here know their
inverse, so that their gradients are gathers too: dn_t = Σ_j dx_s(t, j), and dy_s = dy_t(s), with weights w_s dy_t(s)
and dw_tj = dy_t · y_s(t, j). Where no weight is in the way, `grouped_linears` reads n_t(s), and dy_t(s) in backward,
through the order, and the rows `[tokens k, d]` of neither are written.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pronghorn.models.config import DecoderConfig
from pronghorn.models.expert_layers import Router, SparseMLP
from pronghorn.models.experts_config import ExpertsConfig
from pronghorn.models.layers import value_or_none
from pronghorn.pallas_kernels.clamped_swiglu import clamped_swiglu
from pronghorn.pallas_kernels.gated_activation import gated_activation
from pronghorn.pallas_kernels.grouped_linear import FACTORS_NAME, RANK_NAME, TokenRows
from pronghorn.pallas_kernels.grouped_products import gather
from pronghorn.pallas_kernels.weighted_gated_activation import weighted_gated_activation


class Routing(NamedTuple):
    """What a router chose.

    Attributes:
      logits: `[tokens, experts]` in the dtype of the stream, or fp32 where `wide_logits`.
      weights: fp32 `[tokens, k]`, of the chosen experts.
      experts: int32 `[tokens, k]`, by falling score; of equal scores the expert with the lower number first.
    """

    logits: jax.Array
    weights: jax.Array
    experts: jax.Array


class Order(NamedTuple):
    """The T k rows by expert.

    Attributes:
      choice: int32 `[rows]`, the place t k + j that stands at each sorted place.
      place: int32 `[tokens, k]`, the sorted place of each choice.
      group_sizes: int32 `[experts]`.
    """

    choice: jax.Array
    place: jax.Array
    group_sizes: jax.Array

    def tokens(self) -> TokenRows:
        """The sorted rows as copies of tokens."""
        return TokenRows(self.choice // self.place.shape[1], self.place)


def router_logits(router: Router, n: jax.Array, config: ExpertsConfig) -> jax.Array:
    """`Routing.logits` of n `[tokens, d]`."""
    wide_type = jnp.float32 if config.wide_logits else None
    contract = (((1,), (1,)), ((), ()))
    weight = router.weight.get_value()
    # bitsandbytes quantises a router that is a linear layer in transformers (Llama 4).
    weight = weight.dequantize() if hasattr(weight, "dequantize") else weight
    logits = jax.lax.dot_general(n, weight, contract, preferred_element_type=wide_type)
    bias = value_or_none(router.bias)
    return logits if bias is None else logits + bias.astype(logits.dtype)


def route(router: Router, n: jax.Array, config: ExpertsConfig) -> Routing:
    """The experts of each token of n `[tokens, d]`, as transformers chooses them; see `ExpertsConfig`."""
    logits = router_logits(router, n, config)
    k, wide = config.experts_per_token, logits.astype(jnp.float32)
    if config.router in ("softmax_after_top_k", "sigmoid_after_top_k"):
        best, experts = jax.lax.top_k(wide, k)
        weights = (
            jax.nn.sigmoid(best) if config.router == "sigmoid_after_top_k" else jax.nn.softmax(best, axis=-1)
        )
        return Routing(logits, weights, experts.astype(jnp.int32))
    scores = jax.nn.sigmoid(wide) if config.router == "sigmoid" else jax.nn.softmax(wide, axis=-1)
    correction = value_or_none(router.e_score_correction_bias)
    ranked = jax.lax.stop_gradient(scores)
    if correction is not None:
        ranked = ranked + correction.astype(jnp.float32).reshape(-1)
    if config.groups > 1:
        ranked = _of_best_groups(ranked, config)
    experts = jax.lax.top_k(ranked, k)[1].astype(jnp.int32)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.normalized:
        total = jnp.sum(weights, axis=-1, keepdims=True) + config.normalizer_epsilon
        weights = weights / jnp.maximum(total, config.normalizer_minimum)
    return Routing(logits, weights * config.scaling_factor, experts)


def _of_best_groups(ranked: jax.Array, config: ExpertsConfig) -> jax.Array:
    """Scores `[tokens, experts]`, those outside of the best groups minus infinity."""
    grouped = ranked.reshape(ranked.shape[0], config.groups, -1)
    counted = min(2, grouped.shape[-1]) if config.group_score == "two_best" else 1
    of_group = jnp.sum(jax.lax.top_k(grouped, counted)[0], axis=-1)
    chosen = jax.lax.top_k(of_group, config.groups_chosen)[1]
    allowed = jnp.any(chosen[:, :, None] == jnp.arange(config.groups), axis=1)
    return jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(ranked.shape)


def order_by_expert(experts: jax.Array, num_experts: int) -> Order:
    """The order of the rows for choices int32 `[tokens, k]`; of one expert's rows the earlier token first."""
    flat = experts.reshape(-1)
    choice = jnp.argsort(flat, stable=True).astype(jnp.int32)
    rows = jnp.arange(flat.size, dtype=jnp.int32)
    place = jnp.zeros(flat.size, jnp.int32).at[choice].set(rows, unique_indices=True).reshape(experts.shape)
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Order(choice, place, sizes)


@jax.custom_vjp
def rows_by_expert(n: jax.Array, order: Order) -> jax.Array:
    """n `[tokens, d]` -> its rows by expert, `[tokens k, d]`."""
    return gather(n, order.tokens().token)


def _rows_forward(n, order):
    return rows_by_expert(n, order), order


def _rows_backward(order, dx):
    return order.tokens().sum(dx), None


rows_by_expert.defvjp(_rows_forward, _rows_backward)


@jax.custom_vjp
def weighted_sum(y: jax.Array, weights: jax.Array, order: Order) -> jax.Array:
    """Rows by expert `[tokens k, d]` and fp32 weights `[tokens, k]` -> `[tokens, d]` in the dtype of y."""
    chosen = gather(y, order.place).astype(jnp.float32)
    return jnp.sum(weights[..., None] * chosen, axis=1).astype(y.dtype)


def _sum_forward(y, weights, order):
    return weighted_sum(y, weights, order), (y, weights, order)


def _sum_backward(residuals, dout):
    y, weights, order = residuals
    wide = dout.astype(jnp.float32)
    of_rows = gather(wide, order.tokens().token)
    dy = (weights_by_expert(weights, order) * of_rows).astype(y.dtype)
    chosen = gather(y, order.place).astype(jnp.float32)
    return dy, jnp.sum(wide[:, None] * chosen, axis=-1), None


weighted_sum.defvjp(_sum_forward, _sum_backward)


@jax.custom_vjp
def weights_by_expert(weights: jax.Array, order: Order) -> jax.Array:
    """fp32 `[tokens, k]` -> the weight of every row by expert, `[tokens k, 1]`."""
    return gather(weights.reshape(-1), order.choice)[:, None]


def _weights_forward(weights, order):
    return weights_by_expert(weights, order), order


def _weights_backward(order, dw):
    return gather(dw[:, 0], order.place), None


weights_by_expert.defvjp(_weights_forward, _weights_backward)


def sparse_mlp(
    module: SparseMLP,
    x: jax.Array,
    norm: Any,
    *,
    config: DecoderConfig,
    linear: Any,
) -> jax.Array:
    """The mixture's output `[batch, seq, d]` for n = norm(x), or n = x where there is no norm.

    Saved: x, gate and up of every row, what the router chose, T of `grouped_linears`, and where down has a bias y of
    every row. The norm, gathered rows and what is elementwise are computed again, the products are not.

    Args:
      linear: `(holder, name, x) -> y`, a plain linear of the shared expert.
    """
    experts = config.experts
    assert experts is not None
    flat = x.reshape(-1, x.shape[-1])
    activation: Any = config.activation

    # The products with A of an adapter read all rows again, and leave a few numbers of each. Masters that lie in one
    # vector (`FlatTree`) are sliced out of it: XLA would keep fp32 slices for backward, and keeps half of that where
    # the products' own 16 bits are saved. Layers on an axis have their masters read where they are.
    names = (RANK_NAME,) if module.experts.stacked else (RANK_NAME, FACTORS_NAME)
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    products_kept = functools.partial(jax.checkpoint, policy=policy)

    def normalized(flat):
        return flat if norm is None else norm(flat)

    @jax.checkpoint
    def choose(flat):
        return route(module.gate, normalized(flat), experts)

    @products_kept
    def widen(flat, weights, order):
        n = normalized(flat)
        if weights is None:
            return module.experts.gate_and_up(n, order.group_sizes, order.tokens())
        rows = rows_by_expert(n, order)
        rows = (weights_by_expert(weights, order) * rows.astype(jnp.float32)).astype(rows.dtype)
        return module.experts.gate_and_up(rows, order.group_sizes)

    @products_kept
    def narrow(gate, up, weights, order, summed):
        if weights is not None:
            of_rows = weights_by_expert(weights, order)
            hidden = weighted_gated_activation(gate, up, of_rows, activation=activation)
        elif experts.swiglu_limit is None:
            hidden = gated_activation(gate, up, activation=activation)
        else:
            hidden = clamped_swiglu(gate, up, limit=experts.swiglu_limit, alpha=experts.swiglu_alpha)
        return module.experts.down(hidden, order.group_sizes, summed)

    @jax.checkpoint
    def shared_widen(flat):
        n = normalized(flat)
        return [linear(module.shared_expert, name, n) for name in ("gate_proj", "up_proj")]

    @jax.checkpoint
    def shared_narrow(gate, up):
        return linear(module.shared_expert, "down_proj", gated_activation(gate, up, activation=activation))

    @jax.checkpoint
    def gated(flat, y):
        share = jax.nn.sigmoid(linear(module, "shared_expert_gate", normalized(flat)).astype(jnp.float32))
        return (share * y.astype(jnp.float32)).astype(y.dtype)

    routing = choose(flat)
    order = order_by_expert(routing.experts, experts.num_experts)
    # The one of these that multiplies by the weights: the rows, the values in front of down, or what leaves it.
    before = inside = after = None
    if experts.weights_on_input:
        before = routing.weights
    elif module.experts.down_proj.bias is None and experts.swiglu_limit is None:
        inside = routing.weights
    else:
        after = routing.weights
    out = narrow(*widen(flat, before, order), inside, order, order.tokens() if after is None else None)
    if after is not None:
        out = weighted_sum(out, after, order)
    if module.shared_expert is not None:
        shared = shared_narrow(*shared_widen(flat))
        out = out + (gated(flat, shared) if experts.shared_gate else shared)
    return out.reshape(x.shape)
