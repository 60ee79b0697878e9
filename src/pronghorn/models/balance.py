"""The load-balancing loss of a mixture of experts: small where every expert is chosen as often as every other.

With p(t) the softmax of a router's logits, over all layers with experts and all tokens t that count, N (layer, token)
pairs in all,

    L = E Σ_e (c_e / N) (P_e / N),    c_e how many of those pairs chose e,    P_e = Σ p_e(t)

The gradient is that of P: a count has none. Choices are the k largest logits, whatever else moves the router's own.

Source: Fedus, Zoph and Shazeer, Switch Transformers, 2021, equations 4 to 6, https://arxiv.org/abs/2101.03961, with k
choices a token and over all layers at once, as transformers computes it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.experts import router_logits
from pronghorn.models.layers import DecoderLayer


class Balanced(NamedTuple):
    """What goes from layer to layer: the stream, and c and P so far, fp32 `[experts]`."""

    stream: jax.Array
    chosen: jax.Array
    probabilities: jax.Array

    @classmethod
    def start(cls, stream: jax.Array, config: DecoderConfig) -> "Balanced":
        """In front of the first layer."""
        assert config.experts is not None
        zeros = jnp.zeros(config.experts.num_experts, jnp.float32)
        return cls(stream, zeros, zeros)


def layer_choices(
    layer: DecoderLayer, norm: Any, read: jax.Array, counted: jax.Array, *, config: DecoderConfig
) -> tuple[jax.Array, jax.Array]:
    """c and P of one layer, fp32 `[experts]`.

    Args:
      layer: one with experts.
      norm: of what the experts read, or None.
      read: `[batch, seq, d]`, what goes into that norm.
      counted: fp32 `[batch, seq]`, 1 for a token that counts and 0 for one that does not.
    """
    experts = config.experts
    assert experts is not None

    @jax.checkpoint
    def sums(read):
        n = read if norm is None else norm(read)
        logits = router_logits(layer.mlp.gate, n.reshape(-1, n.shape[-1]), experts).astype(jnp.float32)
        weights = counted.reshape(-1, 1)
        chosen = jax.lax.top_k(jax.lax.stop_gradient(logits), experts.experts_per_token)[1]
        ones = jnp.sum(jax.nn.one_hot(chosen, experts.num_experts, dtype=jnp.float32), axis=1)
        return jnp.sum(weights * ones, axis=0), jnp.sum(weights * jax.nn.softmax(logits, axis=-1), axis=0)

    return sums(read)


def balance_loss(carried: Balanced, counted: jax.Array, config: DecoderConfig) -> jax.Array:
    """L of the file's formula, an fp32 scalar: experts_per_token where choices and probabilities are even."""
    experts = config.experts
    assert experts is not None
    layers = config.num_layers - len(experts.dense_layers)
    pairs = jnp.maximum(layers * jnp.sum(counted), 1.0)
    shares = jax.lax.stop_gradient(carried.chosen) / pairs
    return experts.num_experts * jnp.sum(shares * carried.probabilities / pairs)


def refuse_balance(config: DecoderConfig) -> None:
    """The loss is that of routers that score by a softmax.

    Raises:
      InputError: there are no experts, or they are scored otherwise.
    """
    if config.experts is None:
        raise InputError(
            "router_aux_loss_coef: the model has no experts to balance; remove it from the train section."
        )
    if config.experts.router not in ("softmax", "softmax_after_top_k") or config.extras is not None:
        raise InputError(
            f"router_aux_loss_coef: {config.family} balances its experts without a loss; remove it from the train "
            "section, or output_router_logits from config.json."
        )
