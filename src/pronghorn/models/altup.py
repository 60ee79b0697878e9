"""What only Gemma 3n has: several residual streams of which a layer computes one, a low-rank product beside attention,
and gates of which the small part is cut off.

AltUp (Baykal et al. 2023, arXiv:2301.13310), streams h_0 .. h_(n-1), a the active one, f the layer; with
m(x) = tanh(W_route norm(x) / d), n numbers a token:

    predict   p_q = h_q + Σ_r P(m(h_a))_qr h_r
    correct   h_q = p_q + (f(p_a) - p_a) (1 + C(m(f(p_a))))_q

LAuReL (Menghani et al. 2024, arXiv:2411.07501) on the normalised stream n: n + norm(W_right W_left n).

Sparsity (Gemma 3n, Google 2025): of a token's gate g only what is over the mean by the standard deviations that a
normal distribution needs for a share s to lie below: relu(g - mean(g) - icdf(s) std(g)).
"""

import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pronghorn.models.config import DecoderConfig
from pronghorn.models.extras_config import AltUpConfig
from pronghorn.models.layers import Linear, hidden_norm
from pronghorn.models.projections import one_linear

_SMALLEST = 1e-5  # of a mean square that is divided by


class AltUp(nnx.Module):
    """Parameters of AltUp in a layer."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()):
        assert config.extras is not None and config.extras.altup is not None
        hidden, streams = config.hidden_size, config.extras.altup.streams
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "leading": leading}
        self.correct_output_scale = nnx.Param(
            jnp.zeros((*leading, hidden), dtype), logical_axes=("layers",) * len(leading) + ("hidden",)
        )
        self.correction_coefs = Linear(streams, streams, axes=("one", "one"), **common)
        self.prediction_coefs = Linear(streams, streams**2, axes=("one", "one"), **common)
        self.modality_router = Linear(hidden, streams, axes=("one", "hidden"), **common)
        self.router_norm = hidden_norm(config, dtype=dtype, leading=leading)


class Laurel(nnx.Module):
    """Parameters of LAuReL in a layer."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, leading: tuple[int, ...] = ()):
        assert config.extras is not None and config.extras.altup is not None
        hidden, rank = config.hidden_size, config.extras.altup.laurel_rank
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "leading": leading}
        self.linear_left = Linear(hidden, rank, axes=("ffn", "hidden"), **common)
        self.linear_right = Linear(rank, hidden, axes=("hidden", "ffn"), **common)
        self.post_laurel_norm = hidden_norm(config, dtype=dtype, leading=leading)


def streams_of(projections: Any, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
    """x `[batch, seq, d]` and its projections with the length of x, `[streams, batch, seq, d]`."""
    keys = _keys(dropout_key, len(projections))
    others = [_as_long_as(x, project(x, key)) for project, key in zip(projections, keys, strict=True)]
    return jnp.stack([x, *others])


def joined(projections: Any, streams: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
    """The mean of the first stream and the others' projections with its length, `[batch, seq, d]`."""
    first, keys = streams[0], _keys(dropout_key, len(projections))
    others = [
        _as_long_as(first, project(x, key))
        for project, x, key in zip(projections, streams[1:], keys, strict=True)
    ]
    return jnp.mean(jnp.stack([first, *others]), axis=0)


def _keys(dropout_key: jax.Array | None, count: int) -> list[Any]:
    return [None] * count if dropout_key is None else list(jax.random.split(dropout_key, count))


@jax.checkpoint
def _as_long_as(x: jax.Array, y: jax.Array) -> jax.Array:
    """y with the root mean square that x has, along the last axis."""
    wanted, found = (jnp.mean(jnp.square(z.astype(jnp.float32)), axis=-1, keepdims=True) for z in (x, y))
    scale = jnp.sqrt(wanted) / jnp.sqrt(jnp.maximum(found, _SMALLEST))
    return (y.astype(jnp.float32) * scale).astype(y.dtype)


def _modalities(module: AltUp, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
    """tanh(W_route norm(x) / d), `[batch, seq, streams]`."""
    routed = module.router_norm(x) * jnp.asarray(1 / x.shape[-1], x.dtype)
    routed = one_linear(module, "modality_router", routed, dropout_key)
    return jnp.tanh(routed.astype(jnp.float32)).astype(x.dtype)


def predict(
    module: AltUp, streams: jax.Array, config: AltUpConfig, dropout_key: jax.Array | None
) -> jax.Array:
    """What each stream will be, `[streams, batch, seq, d]` of the same. Nothing but the streams is saved."""

    @jax.checkpoint
    def run(streams):
        count = config.streams
        coefficients = one_linear(
            module, "prediction_coefs", _modalities(module, streams[config.active], dropout_key), dropout_key
        )
        coefficients = coefficients.reshape(*coefficients.shape[:-1], count, count)
        mixed = jnp.einsum("bsqp,pbsd->qbsd", coefficients, streams, preferred_element_type=jnp.float32)
        return (streams + mixed).astype(streams.dtype)

    return run(streams)


def correct(
    module: AltUp, predicted: jax.Array, found: jax.Array, config: AltUpConfig, dropout_key: jax.Array | None
) -> jax.Array:
    """The streams once the active one is known, found `[batch, seq, d]`. Nothing but the arguments is saved."""

    @jax.checkpoint
    def run(predicted, found):
        key = (
            None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
        )  # predict has routed already
        coefficients = one_linear(module, "correction_coefs", _modalities(module, found, key), key)
        news = found - predicted[config.active]
        coefficients = jnp.moveaxis(coefficients + 1, -1, 0)[..., None]
        return predicted + news * coefficients

    return run(predicted, found)


def add_laurel(module: Laurel, x: jax.Array, n: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
    """(x + n + norm(W_right W_left n)) / sqrt(2), all `[batch, seq, d]`: x after attention, n what attention read."""
    low = one_linear(module, "linear_left", n, dropout_key)
    laurel = module.post_laurel_norm(one_linear(module, "linear_right", low, dropout_key))
    return (x + n + laurel) * jnp.asarray(1 / math.sqrt(2), x.dtype)


def cut_off(gate: jax.Array, share: float) -> jax.Array:
    """The gate `[.., width]` less what about a `share` of it is below, in fp32, zero there."""
    g = gate.astype(jnp.float32)
    mean = jnp.mean(g, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(g - mean), axis=-1, keepdims=True))
    return jax.nn.relu(g - mean - statistics.NormalDist().inv_cdf(share) * deviation).astype(gate.dtype)
