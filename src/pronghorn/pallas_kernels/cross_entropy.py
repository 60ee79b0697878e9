"""Cross entropy of given logits, one loss a row.

    loss = (1−ε)(lse − z_y) + ε (lse − mean z),  lse = log Σ_j exp z_j,  z = softcap·tanh(logit_scale·x / softcap)
    ∂loss/∂x_j = (exp(z_j − lse) − (1−ε)[j = y] − ε/V) · logit_scale (1 − (z_j/softcap)²)

Forward is an online log-sum-exp over blocks of the vocabulary inside one kernel; saved for backward are the logits
themselves and two floats a row (lse and lse − z_y, each to full relative precision: `cross_entropy_kernels` says
how). Backward writes its gradient over the logits where XLA may reuse them. Where the logits come from a product with
the head's weight, `linear_cross_entropy` never holds them all.

Source: label smoothing as in Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016),
section 7; online softmax as in Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

import functools

import jax
import jax.numpy as jnp

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import cross_entropy_kernels as kernels
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.cross_entropy_kernels import LossOptions


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """Loss of each row in nats.

    Args:
      logits: [..., V], bf16, fp16 or fp32.
      labels: [...], integers in [0, V), or `ignore_index`: then loss and gradient are zero, whatever the logits. Any
        other label is never used as an address: its loss and its row of the gradient are NaN.
      label_smoothing: ε in [0, 1): the target is (1−ε) on the label and ε/V everywhere.
      softcap: None, or the bound c of z = c·tanh(x/c) (Gemma 2).
      logit_scale: a factor on the logits, before the softcap (Cohere, Granite).

    Returns:
      [...] fp32, not divided by anything.

    Raises:
      InputError: shapes that do not match, labels that are no integers, an option out of range.
    """
    options = LossOptions(label_smoothing, softcap, logit_scale)
    if logits.ndim == 0 or logits.shape[:-1] != labels.shape or logits.shape[-1] == 0:
        raise InputError(
            f"cross_entropy: logits {logits.shape} and labels {labels.shape} do not match; give logits [..., V] and "
            "labels [...]."
        )
    check_labels(labels)
    if launch.resolve(implementation) == "xla" or labels.size == 0:
        return cross_entropy_reference(logits, labels, ignore_index=ignore_index, options=options)
    vocab_size = logits.shape[-1]
    safe, ignored, factor = kernels.label_status(labels.reshape(-1), vocab_size, ignore_index)
    loss = _row_losses(options, logits.reshape(-1, vocab_size), safe)
    # The factor is multiplied, not selected, so that the NaN of a bad label reaches its gradient too.
    return jnp.where(ignored, 0.0, loss * factor).reshape(labels.shape)


def check_labels(labels: jax.Array) -> None:
    """Raises InputError unless the labels are integers."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(f"cross entropy: labels are {labels.dtype}; give integers.")


def cross_entropy_reference(
    logits: jax.Array, labels: jax.Array, *, ignore_index: int = -100, options: LossOptions | None = None
) -> jax.Array:
    """The oracle: the same losses in plain jnp, differentiated by JAX."""
    options = options or LossOptions()
    vocab_size = logits.shape[-1]
    safe, ignored, factor = kernels.label_status(labels, vocab_size, ignore_index)
    # Ignored rows leave before the arithmetic: 0 · ∞ in their gradient would be NaN.
    z = kernels.transform(jnp.where(ignored[..., None], 0.0, logits), options)
    target = jax.nn.one_hot(safe, vocab_size, dtype=bool)
    label_z = jnp.sum(jnp.where(target, z, 0.0), axis=-1)
    other = jax.nn.logsumexp(jnp.where(target, -jnp.inf, z), axis=-1)
    loss = jax.nn.softplus(other - label_z)
    if options.label_smoothing:  # not as 0 · mean: a column of −inf may be there
        loss = loss + options.label_smoothing * (label_z - jnp.mean(z, axis=-1))
    return jnp.where(ignored, 0.0, loss * factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_losses(options: LossOptions, logits: jax.Array, labels: jax.Array) -> jax.Array:
    return kernels.forward(logits, labels, options)[0]


def _forward_rule(options, logits, labels):
    loss, lse, nll = kernels.forward(logits, labels, options)
    return loss, (logits, labels, lse, nll)


def _backward_rule(options, residuals, cotangent):
    logits, labels, lse, nll = residuals
    return kernels.backward(logits, labels, lse, nll, cotangent, options), None


_row_losses.defvjp(_forward_rule, _backward_rule)
