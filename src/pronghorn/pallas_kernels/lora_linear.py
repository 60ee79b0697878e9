"""A linear layer with a low-rank adapter, and its gradient by hand: no ΔW = B A, no cotangent of a frozen weight.

With X [tokens, in], W [out, in] (frozen or trained, 16 bit or quantised), A [r, in], B [out, r] and M the dropout mask
over 1 − rate (all ones without dropout):

    T  = (X ∘ M) Aᵀ
    Y  = X Wᵀ + s T Bᵀ + bias
    G  = s dY B                        rank r, computed once
    dX = dY W + (G A) ∘ M
    dA = Gᵀ (X ∘ M)        dB = s dYᵀ T        dW = dYᵀ X        dbias = Σ dY

Products run in the dtype of X with fp32 accumulation; A and B are cast to it, their gradients leave the products in
fp32. They are left to XLA, and through it to cuBLAS: a kernel of our own reached 89 % of it, and the rank-r product is
added in cuBLAS's epilogue. So this op launches no kernel: "pallas" names the hand gradient, which is the default on
every device, a CPU included, since what it saves does not depend on the device. "xla" is the oracle under autodiff.

Saved: X only where A or W is trained; T (r numbers a token, named "lora_linear_rank" for `jax.checkpoint` policies)
where B is, since reading X again costs more than keeping 1/256 of it. X is saved as the very array that came in, so
that layers which share it (q, k, v; gate, up) save it once: a name is for whoever made it to give. A quantised weight
is dequantised again in backward; the mask is drawn again from its key.

Source: Hu et al., LoRA, 2021, section 4.1, https://arxiv.org/abs/2106.09685; dropout on the adapter's input as in PEFT.
"""

import functools
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch

# What T is called, for `jax.checkpoint` policies.
RANK_NAME = "lora_linear_rank"


@runtime_checkable
class QuantizedWeight(Protocol):
    """A frozen weight kept in fewer bits: a registered pytree with a shape.

    One that need not become an array to be multiplied (FP8) has `times_transposed(x, dtype, largest)`, x Wᵀ, and
    `times(y, dtype, largest)`, y W, besides; `largest` is as in `project`. One that need not for a few rows (NF4) has
    `product(x, dtype)`, x Wᵀ. One that is written below others without a copy has `dequantize_above(*others)`.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def dequantize(self) -> jax.Array: ...


def lora_linear(
    x: jax.Array,
    weight: jax.Array | QuantizedWeight,
    lora_a: jax.Array | None = None,
    lora_b: jax.Array | None = None,
    *,
    scale: float = 1.0,
    bias: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """x Wᵀ + scale · (dropout(x) Aᵀ) Bᵀ + bias.

    Args:
      x: [..., in]; bf16, fp16 or fp32.
      weight: [out, in] of any float dtype, or a `QuantizedWeight`, which is never trained.
      lora_a, lora_b: [r, in] and [out, r], fp32 masters; both or neither. Without them this is a plain linear layer.
      scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
      bias: [out].
      dropout_rate: the share of x that the adapter does not see, in [0, 1); kept values are divided by 1 − rate.
      dropout_key: the random key of this call. None turns dropout off: evaluation.
      implementation: "pallas" (the hand gradient), "xla" (autodiff), or None for the hand gradient.

    Returns:
      [..., out] in the dtype of x.

    Raises:
      InputError: when shapes do not fit, one of A and B is missing, or the rate is out of range.
    """
    check_arguments("lora_linear", x.shape[-1], weight, lora_a, lora_b, bias)
    if not 0.0 <= dropout_rate < 1.0:
        raise InputError(f"lora_linear: dropout_rate={dropout_rate} must be in [0, 1).")
    if lora_a is None or dropout_rate == 0.0:
        dropout_key = None
    if launch.resolve(implementation, default_cpu="pallas") == "xla":
        return lora_linear_reference(
            x,
            weight,
            lora_a,
            lora_b,
            scale=scale,
            bias=bias,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
        )
    return _lora_linear(x, weight, lora_a, lora_b, bias, dropout_key, float(scale), float(dropout_rate))


def check_arguments(op: str, inputs: int, weight: Any, lora_a: Any, lora_b: Any, bias: Any) -> None:
    """Raise InputError where the arrays of a linear layer do not fit each other or x [..., inputs]."""
    if len(weight.shape) != 2 or inputs != weight.shape[1]:
        raise InputError(f"{op}: weight {weight.shape} must be [out, in] for x of {inputs} columns.")
    if (lora_a is None) != (lora_b is None):
        raise InputError(f"{op}: give both lora_a and lora_b, or neither.")
    if lora_a is not None:
        rank = lora_a.shape[0]
        if lora_a.shape != (rank, weight.shape[1]) or lora_b.shape != (weight.shape[0], rank):
            raise InputError(
                f"{op}: lora_a {lora_a.shape} and lora_b {lora_b.shape} must be [r, in] and [out, r] "
                f"for weight {weight.shape}."
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"{op}: bias {bias.shape} must be {weight.shape[:1]}.")


def lora_linear_reference(
    x: jax.Array,
    weight: jax.Array | QuantizedWeight,
    lora_a: jax.Array | None = None,
    lora_b: jax.Array | None = None,
    *,
    scale: float = 1.0,
    bias: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The oracle of `lora_linear`: the formula in jax.numpy, summed in fp32, rounded once."""
    y = project(x, weight, jnp.float32)
    if lora_a is not None and lora_b is not None:
        seen = _dropout(x, dropout_key, dropout_rate)
        t = jnp.einsum("...i,ri->...r", seen, lora_a.astype(x.dtype), preferred_element_type=jnp.float32)
        b = lora_b.astype(x.dtype)
        y += scale * jnp.einsum("...r,or->...o", t.astype(x.dtype), b, preferred_element_type=jnp.float32)
    if bias is not None:
        y += bias.astype(jnp.float32)
    return y.astype(x.dtype)


def is_quantized(weight: Any) -> bool:
    """Whether a weight is a `QuantizedWeight` and no array."""
    return hasattr(weight, "dequantize")


def differentiated(op: str, arguments: Mapping[str, Any]) -> frozenset[str]:
    """Names of those that are, as a `symbolic_zeros` forward rule sees them; a quantised "weight" may not be."""
    wanted = frozenset(name for name, argument in arguments.items() if launch.perturbed(argument))
    if "weight" in wanted and is_quantized(arguments["weight"]):
        raise InputError(f"{op}: a quantised weight cannot be trained; freeze it, or load it in 16 bit.")
    return wanted


def dense(weight: Any, dtype: Any) -> jax.Array:
    """A weight as an array of this dtype."""
    return (weight.dequantize() if is_quantized(weight) else weight).astype(dtype)


def _dropout(x, key, rate):
    """x ∘ M, drawn from the key; x itself without one. M is linear and diagonal, so this is also its transpose."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def times_transposed(x: jax.Array, matrix: jax.Array, dtype: Any) -> jax.Array:
    """x [..., i] · matrix [o, i]ᵀ -> [..., o]."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, matrix, dims, preferred_element_type=dtype)


def times(y: jax.Array, matrix: jax.Array, dtype: Any) -> jax.Array:
    """y [..., o] · matrix [o, i] -> [..., i]."""
    return jax.lax.dot_general(y, matrix, (((y.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype)


def over_tokens(y: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """y [..., o]ᵀ · x [..., i] -> [o, i], summed over every leading axis."""
    tokens = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(y, x, ((tokens, tokens), ((), ())), preferred_element_type=dtype)


def rounds_operands(weight: Any) -> bool:
    """Whether a weight's products are its own, and round what it is multiplied with."""
    return hasattr(weight, "times_transposed")


def project(
    x: jax.Array, weight: jax.Array | QuantizedWeight, dtype: Any, largest: jax.Array | None = None
) -> jax.Array:
    """x [..., in] Wᵀ -> [..., out], by the weight's own product where it has one.

    `largest`, fp32 [], is a bound of |x| where one is known: such a product needs one scale for x then.
    """
    if rounds_operands(weight):
        return weight.times_transposed(x, dtype, largest)  # type: ignore[union-attr]
    if hasattr(weight, "product"):
        return weight.product(x, dtype)
    return times_transposed(x, dense(weight, x.dtype), dtype)


def project_back(
    y: jax.Array, weight: jax.Array | QuantizedWeight, dtype: Any, largest: jax.Array | None = None
) -> jax.Array:
    """y [..., out] W -> [..., in], like `project`."""
    if rounds_operands(weight):
        return weight.times(y, dtype, largest)  # type: ignore[union-attr]
    return times(y, dense(weight, y.dtype), dtype)


def _compute(x, weight, lora_a, lora_b, bias, key, scale, rate):
    """(Y, T); T is None without an adapter."""
    read = x
    if is_quantized(weight) and not rounds_operands(weight):
        # Dequantised when x is there and not before, see `stacked_linears`.
        read, weight = jax.lax.optimization_barrier((x, weight))
    y, t = project(read, weight, x.dtype), None
    if lora_a is not None:
        t = times_transposed(_dropout(x, key, rate), lora_a.astype(x.dtype), x.dtype)
        # The scale goes on the smallest matrix of the product, before the one rounding of B.
        y += times_transposed(t, (scale * lora_b).astype(x.dtype), x.dtype)
    if bias is not None:
        y += bias.astype(x.dtype)
    return y, t


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _lora_linear(x, weight, lora_a, lora_b, bias, key, scale, rate):
    return _compute(x, weight, lora_a, lora_b, bias, key, scale, rate)[0]


def _lora_linear_forward(x, weight, lora_a, lora_b, bias, key, scale, rate):
    arguments = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    wanted = differentiated("lora_linear", arguments)
    x, weight, lora_a, lora_b, bias, key = jax.custom_derivatives.custom_vjp_primal_tree_values(
        (x, weight, lora_a, lora_b, bias, key)
    )
    # Arguments are saved as the very objects that came in, which jax recognises: one copy, whoever else saves them.
    saved = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias, "key": key}
    if wanted & {"weight", "lora_a"}:
        saved["x"] = x
    y, t = _compute(x, weight, lora_a, lora_b, bias, key, scale, rate)
    if "lora_b" in wanted:
        saved["t"] = checkpoint_name(t, RANK_NAME)
    return y, (saved, launch.Static((wanted, x.dtype)))


def _lora_linear_backward(scale, rate, residuals, dy):
    saved, static = residuals
    wanted, dtype = static.value
    gradients: dict[str, Any] = dict.fromkeys(("x", "weight", "lora_a", "lora_b", "bias"))
    weight, lora_a, lora_b, key = (saved[name] for name in ("weight", "lora_a", "lora_b", "key"))
    # Without the barriers XLA would find the forward's dequantised weight, or its mask, equal to the one computed
    # here, and keep it alive from one to the other.
    if is_quantized(weight) or key is not None:
        weight, key, dy = jax.lax.optimization_barrier((weight, key, dy))

    if lora_a is not None and wanted & {"x", "lora_a"}:
        g = times(dy, (scale * lora_b).astype(dtype), dtype)
    if "x" in wanted:
        dx = project_back(dy, weight, dtype)
        if lora_a is not None:
            dx += _dropout(times(g, lora_a.astype(dtype), dtype), key, rate)
        gradients["x"] = dx
    if "lora_a" in wanted:
        seen = _dropout(saved["x"], key, rate)
        gradients["lora_a"] = over_tokens(g, seen, jnp.float32).astype(lora_a.dtype)
    if "lora_b" in wanted:
        gradients["lora_b"] = (scale * over_tokens(dy, saved["t"], jnp.float32)).astype(lora_b.dtype)
    if "weight" in wanted:
        # bf16 out of bf16 operands: the product rounds once, and no fp32 copy of the weight's size exists.
        product_dtype = jnp.promote_types(dtype, weight.dtype)
        gradients["weight"] = over_tokens(dy, saved["x"], product_dtype).astype(weight.dtype)
    if "bias" in wanted:
        total = jnp.sum(dy.astype(jnp.float32), axis=tuple(range(dy.ndim - 1)))
        gradients["bias"] = total.astype(saved["bias"].dtype)
    return *gradients.values(), None


_lora_linear.defvjp(_lora_linear_forward, _lora_linear_backward, symbolic_zeros=True)
