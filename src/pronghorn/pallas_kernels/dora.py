"""DoRA: a linear layer whose adapter changes directions, and whose rows have trained lengths.

With V = W + s B A, v_j the length of its row j, held constant for the gradient as the paper proposes, and c = m / v:

    Y = c ∘ (X Wᵀ + s (X Aᵀ) Bᵀ) + bias
    v_j² = |W_j|² + 2 s (W Aᵀ)_j · B_j + s² B_j (A Aᵀ) B_jᵀ            without forming B A
    dU = c ∘ dY      dm = Σ dY ∘ U / v      with U what is in brackets, saved      and dX, dA, dB of `lora_linear` for
    dU

m [out] starts as the lengths of W's rows, so the layer starts as it was. The products are `lora_linear`; W Aᵀ costs as
much as r more tokens. Norms are summed in fp32, and A and B are first rounded to the dtype of X, as the products take
them.

Source: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, sections 4.1 and 4.3,
https://arxiv.org/abs/2402.09353. Dropout drops inputs of A only; PEFT lets the term c W X see the dropped inputs too.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pronghorn.pallas_kernels.lora_linear import QuantizedWeight, dense, lora_linear

_TINY = 1e-30


def dora_linear(
    x: jax.Array,
    weight: jax.Array | QuantizedWeight,
    lora_a: jax.Array,
    lora_b: jax.Array,
    magnitude: jax.Array,
    *,
    scale: float = 1.0,
    bias: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """`[..., in]` -> `[..., out]` in the dtype of x.

    Args:
      x, weight, lora_a, lora_b, scale, bias: as in `lora_linear`.
      magnitude: fp32 [out], m.
      **options: `dropout_rate`, `dropout_key` and `implementation` of `lora_linear`.
    """
    a, b = (jax.lax.stop_gradient(factor.astype(x.dtype)) for factor in (lora_a, lora_b))
    lengths = jax.lax.stop_gradient(row_norms(jax.lax.stop_gradient(weight), a, b, scale))
    u = lora_linear(x, weight, lora_a, lora_b, scale=scale, **options)
    y = u.astype(jnp.float32) * (magnitude.astype(jnp.float32) / lengths)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def row_norms(
    weight: jax.Array | QuantizedWeight,
    lora_a: jax.Array | None = None,
    lora_b: jax.Array | None = None,
    scale: float = 1.0,
) -> jax.Array:
    """fp32 [out]: the lengths of the rows of W + s B A, or of W."""
    w = dense(weight, weight.dtype if hasattr(weight, "dtype") else jnp.float32)
    squares = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=1)
    if lora_a is not None and lora_b is not None:
        b = lora_b.astype(jnp.float32)
        across = _product(w, lora_a)
        inner = _product(lora_a, lora_a)
        squares += 2.0 * scale * jnp.sum(across * b, axis=1)
        squares += scale * scale * jnp.sum(_product(b, inner) * b, axis=1)
    return jnp.sqrt(jnp.maximum(squares, _TINY))


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """left · rightᵀ in fp32, whatever both are."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dtype = jnp.promote_types(left.dtype, right.dtype)
    return jax.lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
