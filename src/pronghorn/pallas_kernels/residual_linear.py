"""The linear layer that ends a branch (attention's output projection), with the residual stream it is added to.

With X [tokens, in] the branch, R [tokens, out] the residual stream, and products as in `stacked_linears`:

    Y = R + X Wᵀ + T B̂ᵀ + b          T = X Aᵀ
    dR = dY       dX = G A + dY W       G = dY B̂       dA = Gᵀ X       dB = s dYᵀ T       dW = dYᵀ X       db = Σ dY

The stream is added to the small product, and their sum, inside cuBLAS, to the large one. X may come with its features
spread over several axes ([batch, seq, heads, head_dim]): it is saved as the very array that came in, which attention
saves as well, where a reshaped one would be a second copy under `lax.scan`.

Saved: X where A or W is trained, T ("lora_linear_rank") where B is. Dropout and implementations as in `norm_linears`.

Source: that of `lora_linear`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.lora_linear import RANK_NAME, over_tokens
from pronghorn.pallas_kernels.norm_linears import Dropout, drops, one_linear
from pronghorn.pallas_kernels.stacked_linears import (
    LinearWeights,
    apply_linears,
    check_linears,
    input_gradient,
    rank_gradient,
    wanted_fields,
    weight_gradients,
)


def residual_linear(
    residual: jax.Array,
    x: jax.Array,
    linear: LinearWeights,
    *,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """residual + linear(x).

    Args:
      residual: [..., out]; bf16, fp16 or fp32.
      x: [..., in], or [..., a, b] with a · b = in, in the dtype of residual.
      linear: weight [out, in], with or without an adapter.
      scale: s = alpha / r.
      dropout: one rate and key, or None.
      implementation: "pallas" (the hand gradient; no kernel is launched), "xla" (autodiff), or None: the former.

    Returns:
      [..., out] in the dtype of residual.

    Raises:
      InputError: where shapes or dtypes do not fit.
    """
    flat = _flat(residual, x)
    check_linears("residual_linear", flat.shape[-1], (linear,), (scale,))
    if residual.shape != (*flat.shape[:-1], linear.weight.shape[0]) or residual.dtype != x.dtype:
        raise InputError(
            f"residual_linear: residual {residual.dtype}{residual.shape} must be {x.dtype} "
            f"{(*flat.shape[:-1], linear.weight.shape[0])} for x {x.shape}."
        )
    if launch.resolve(implementation, default_cpu="pallas") == "xla":
        implementation = "xla"
    if implementation == "xla" or drops(dropout):
        return residual + one_linear(flat, (linear,), (scale,), 0, dropout, implementation)
    return _residual_linear(residual, x, linear, float(scale))


def residual_linear_reference(
    residual: jax.Array,
    x: jax.Array,
    linear: LinearWeights,
    *,
    scale: float = 1.0,
    dropout: Dropout | None = None,
) -> jax.Array:
    """The oracle of `residual_linear`."""
    return residual + one_linear(_flat(residual, x), (linear,), (scale,), 0, dropout, "xla")


def _flat(residual, x):
    """[..., in], whatever axes the features of x are spread over."""
    tokens = x.shape[: residual.ndim - 1]
    return x.reshape(*tokens, math.prod(x.shape[len(tokens) :]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _residual_linear(residual, x, linear, scale):
    return apply_linears(_flat(residual, x), (linear,), (scale,), add=residual)[0][0]


def _residual_linear_forward(residual, x, linear, scale):
    wanted_x, wanted = launch.perturbed(x), wanted_fields("residual_linear", linear)
    values = jax.custom_derivatives.custom_vjp_primal_tree_values
    residual, x, linear = values((residual, x, linear))
    (y,), t = apply_linears(_flat(residual, x), (linear,), (scale,), add=residual)
    saved = {"linear": linear}
    if wanted & {"lora_a", "weight"}:
        saved["x"] = x
    if "lora_b" in wanted:
        saved["t"] = checkpoint_name(t, RANK_NAME)
    return y, (saved, launch.Static((wanted_x, wanted, x.shape)))


def _residual_linear_backward(scale, residuals, dy):
    saved, static = residuals
    wanted_x, wanted, shape = static.value
    linears = (saved["linear"],)
    g: Any = rank_gradient((dy,), linears, (scale,)) if wanted_x or "lora_a" in wanted else None
    dx = input_gradient((dy,), g, linears).reshape(shape) if wanted_x else None
    x: Any = _flat(dy, saved["x"]) if "x" in saved else None
    da = over_tokens(g.astype(dy.dtype), x, jnp.float32) if "lora_a" in wanted else None
    (gradient,) = weight_gradients((dy,), da, saved.get("t"), x, linears, (scale,), (wanted,))
    return dy, dx, gradient


_residual_linear.defvjp(_residual_linear_forward, _residual_linear_backward, symbolic_zeros=True)
