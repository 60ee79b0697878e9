"""How the factors of an adapter start.

    kaiming   A uniform in ±1/sqrt(fan in) (He et al. 2015 with a = sqrt(5)), B zero; PEFT's default
    gaussian  A normal with deviation 1/r, B zero
    pissa     s B0 A0 = the r largest singular parts of W (Meng et al. 2024, https://arxiv.org/abs/2404.02948);
              "pissa_niter_N" finds them by N power iterations on r + 8 random directions (Halko et al. 2011,
              https://arxiv.org/abs/0909.4061, algorithm 4.4), in seconds where an SVD of W takes minutes
    olora     B0 = the first r columns of Q, A0 = the first r rows of R, W = Q R (Buyukakyuz 2024,
              https://arxiv.org/abs/2406.01775)
    loftq     s B A = the r largest singular parts of W - Q(W), the error of the quantised base, so the adapter starts
              by mending it (Li et al. 2023, https://arxiv.org/abs/2310.08659, with one iteration: the base stays the
              one that bitsandbytes makes, as in PEFT's `replace_lora_weights_loftq`)

PiSSA and OLoRA take s B0 A0 out of the base. PEFT changes the base weights for that; here they stay and the adapter is
s (B A - B0 A0) with A0 and B0 frozen: the same function of A and B, the same gradients, and nothing to convert when it
is exported. What is saved is that difference as a plain LoRA of rank 2r on the unchanged base, to which PEFT converts
such an adapter as well (`path_initial_model_for_weight_conversion`). An embedding starts as under kaiming.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pronghorn.errors import InputError
from pronghorn.lora_config import LoRAConfig

_OVERSAMPLED = 8
_HIGHEST = jax.lax.Precision.HIGHEST


def start_factors(
    config: LoRAConfig,
    shape: tuple[int, int],
    weight: Any,
    rank: int,
    scale: float,
    key: jax.Array,
    original: Callable[[], Any] | None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """(A, B, (A0, B0) or None) of one module, fp32.

    Args:
      shape: (fan out, fan in).
      weight: `[out, in]`, maybe quantised; None for an embedding.
      rank, scale: r and s of this module.
      key: of this module.
      original: gives the weight before it was quantised, for "loftq".

    Raises:
      InputError: "loftq" without a quantised weight, or without the original.
    """
    fan_out, fan_in = shape
    zeros = jnp.zeros((fan_out, rank), jnp.float32)
    if weight is None:  # an embedding looks A up: A is zero there, and B is not
        return jnp.zeros((rank, fan_in), jnp.float32), jax.random.normal(key, zeros.shape, jnp.float32), None
    if config.init == "kaiming":
        bound = fan_in**-0.5
        return jax.random.uniform(key, (rank, fan_in), jnp.float32, -bound, bound), zeros, None
    if config.init == "gaussian":
        return jax.random.normal(key, (rank, fan_in), jnp.float32) / rank, zeros, None
    refuse_rank(config, shape, rank)
    quantized = hasattr(weight, "dequantize")
    dense = (weight.dequantize() if quantized else weight).astype(jnp.float32)
    if config.init == "loftq":
        if not quantized or original is None:
            raise InputError(
                "lora.init=loftq: mends what quantisation lost, and this base is not quantised from a folder of 16-bit "
                "weights; set quantization, or another lora.init."
            )
        error = jnp.asarray(original()).astype(jnp.float32) - dense
        return *_singular_parts(error, rank, scale), None
    if config.init == "olora":
        a, b = _orthonormal_parts(dense, rank)
    elif config.power_iterations is not None:
        a, b = _sketched_parts(dense, key, rank, scale, config.power_iterations)
    else:
        a, b = _singular_parts(dense, rank, scale)
    return a, b, (a, b)


def refuse_rank(config: LoRAConfig, shape: tuple[int, int], rank: int) -> None:
    """A start that is cut out of a weight has no more parts than the weight.

    Raises:
      InputError: the rank is larger.
    """
    if config.init not in ("kaiming", "gaussian") and rank > min(shape):
        raise InputError(
            f"lora.rank={rank} is over {min(shape)}, the rank of a weight that lora.init={config.init} cuts."
        )


@functools.partial(jax.jit, static_argnums=1)
def _singular_parts(matrix: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """A `[r, in]` and B `[out, r]` with s B A the best approximation of that rank, both with half the size of it."""
    u, values, v = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale)
    return root[:, None] * v[:rank], u[:, :rank] * root


@functools.partial(jax.jit, static_argnums=(2, 4))
def _sketched_parts(
    matrix: jax.Array, key: jax.Array, rank: int, scale: float, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """The same, of the span that power iterations find."""
    width = min(rank + _OVERSAMPLED, *matrix.shape)
    with jax.default_matmul_precision("highest"):
        basis = jnp.linalg.qr(matrix @ jax.random.normal(key, (matrix.shape[1], width)))[0]
        for _ in range(iterations):
            across = jnp.linalg.qr(matrix.T @ basis)[0]
            basis = jnp.linalg.qr(matrix @ across)[0]
        a, b = _singular_parts(basis.T @ matrix, rank, scale)
        return a, basis @ b


@functools.partial(jax.jit, static_argnums=1)
def _orthonormal_parts(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The first r rows of R and columns of Q: they depend on the first r columns of the matrix alone."""
    q = jnp.linalg.qr(matrix[:, :rank])[0]
    return jnp.matmul(q.T, matrix, precision=_HIGHEST), q
