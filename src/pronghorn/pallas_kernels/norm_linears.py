"""RMSNorm and the linear layers that read it (q, k and v), as one op that never saves the normalised input.

With r = 1 / sqrt(mean(x²) + eps) per row, g = norm_weight + weight_offset, and T, G, dn as in `stacked_linears`:

    n   = (x r) g                        y_i = n W_iᵀ + T B̂_iᵀ + b_i
    dx  = dX + r (g dn − x̂ mean(x̂ g dn)),  x̂ = x r          dg = Σ dn x̂
    dA  = Gᵀ n = ((r G)ᵀ x) g            column by column

The op returns x as well, for the residual stream: dX is what flows back into that, and norm's backward adds it in the
pass that writes dx. In this form dA reads x itself, so that training adapters alone never builds n again. Where a
weight is trained, or in fp16, whose range r G may leave, n is rebuilt from x and r, elementwise.

Saved: x as the very array that came in, r ("rms_norm_inverse_rms", one fp32 a row) and T ("lora_linear_rank"), each
only where something trained asks for it. The names are for `jax.checkpoint` policies.

With dropout each adapter sees a mask of its own, so nothing is shared: the op is then `rms_norm` and `lora_linear` one
after the other. As with `lora_linear` the hand gradient is the default on every device; "pallas" also launches norm's
kernels, where the default does so on a GPU alone; "xla" is the oracle under autodiff.

Sources: those of `rms_norm` and `lora_linear`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.lora_linear import RANK_NAME, lora_linear, over_tokens, rounds_operands
from pronghorn.pallas_kernels.rms_norm import (
    largest_normalized,
    normalized,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from pronghorn.pallas_kernels.stacked_linears import (
    LinearWeights,
    apply_linears,
    check_linears,
    input_gradient,
    instantiate,
    rank_gradient,
    wanted_fields,
    weight_gradients,
)


class Dropout(NamedTuple):
    """Dropout in front of the adapters of an op.

    Attributes:
      rates: the share of the input that each adapter does not see, in [0, 1).
      keys: a random key for each, drawn from by `lora_linear`.
    """

    rates: tuple[float, ...]
    keys: tuple[jax.Array, ...]


class NormOptions(NamedTuple):
    """What an op that starts with a norm is compiled for."""

    scales: tuple[float, ...]
    eps: float
    weight_offset: float
    with_kernel: bool


class Wanted(NamedTuple):
    """What is differentiated."""

    x: bool
    norm_weight: bool
    linears: tuple[frozenset[str], ...]

    def has(self, field: str) -> bool:
        """Whether that field of any layer is."""
        return any(field in fields for fields in self.linears)

    @property
    def past_norm(self) -> bool:
        """Whether the gradient with respect to the normalised input is needed."""
        return self.x or self.norm_weight


def norm_linears(
    x: jax.Array,
    norm_weight: jax.Array,
    linears: Sequence[LinearWeights],
    *,
    scales: Sequence[float],
    eps: float,
    weight_offset: float = 0.0,
    dropout: Dropout | None = None,
    implementation: launch.Implementation | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """(x, (y_1, y_2, ..)) with y_i the i-th linear layer of rms_norm(x).

    Args:
      x: [..., d]; bf16, fp16 or fp32.
      norm_weight: [d].
      linears: weights [out_i, d]; any of them may lack an adapter, ranks may differ.
      scales: s_i = alpha / r of each.
      eps, weight_offset: of the norm, as in `rms_norm`.
      dropout: None drops nothing.
      implementation: "pallas" (hand gradient and kernels), "xla" (oracle), or None: the hand gradient, with kernels
        where the platform has them.

    Returns:
      x, to be used by the residual stream, and y_i [..., out_i] in the dtype of x.

    Raises:
      InputError: where shapes do not fit.
    """
    linears, scales = tuple(linears), tuple(float(s) for s in scales)
    check_norm("norm_linears", x, norm_weight)
    check_linears("norm_linears", x.shape[-1], linears, scales)
    if launch.resolve(implementation, default_cpu="pallas") == "xla":
        implementation = "xla"
    if implementation == "xla" or drops(dropout):
        return x, _one_by_one(x, norm_weight, linears, scales, eps, weight_offset, dropout, implementation)
    with_kernel = launch.resolve(implementation) == "pallas"
    options = NormOptions(scales, float(eps), float(weight_offset), with_kernel)
    return _norm_linears(x, norm_weight, linears, options)


def norm_linears_reference(
    x: jax.Array,
    norm_weight: jax.Array,
    linears: Sequence[LinearWeights],
    *,
    scales: Sequence[float],
    eps: float,
    weight_offset: float = 0.0,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The oracle of `norm_linears`: the oracles of the norm and of each layer, one after the other."""
    return x, _one_by_one(x, norm_weight, linears, scales, eps, weight_offset, dropout, "xla")


def _one_by_one(x, norm_weight, linears, scales, eps, weight_offset, dropout, implementation):
    n = rms_norm(x, norm_weight, eps=eps, weight_offset=weight_offset, implementation=implementation)
    return tuple(
        one_linear(n, linears, scales, index, dropout, implementation) for index in range(len(linears))
    )


def one_linear(
    x: jax.Array,
    linears: Sequence[LinearWeights],
    scales: Sequence[float],
    index: int,
    dropout: Dropout | None,
    implementation: launch.Implementation | None,
) -> jax.Array:
    """`lora_linear` of one layer of a group, with its dropout."""
    linear = linears[index]
    rate = 0.0 if dropout is None else dropout.rates[index]
    return lora_linear(
        x,
        linear.weight,
        linear.lora_a,
        linear.lora_b,
        scale=scales[index],
        bias=linear.bias,
        dropout_rate=rate,
        dropout_key=dropout.keys[index] if dropout is not None and rate else None,
        implementation=implementation,
    )


def check_norm(op: str, x: jax.Array, norm_weight: jax.Array) -> None:
    """Raise InputError where the norm's weight is not one value a column of x."""
    if norm_weight.shape != x.shape[-1:]:
        raise InputError(f"{op}: norm_weight {norm_weight.shape} must be {x.shape[-1:]} for x {x.shape}.")


def drops(dropout: Dropout | None) -> bool:
    """Whether anything is dropped."""
    return dropout is not None and any(dropout.rates)


def save_norm(
    x: jax.Array,
    inverse_rms: jax.Array,
    t: jax.Array | None,
    norm_weight: jax.Array,
    linears: Any,
    wanted: Wanted,
) -> dict[str, Any]:
    """What `backward_to_norm` needs of forward; arrays that came in as arguments stay the very same objects."""
    saved = {"norm_weight": norm_weight, "linears": linears}
    if wanted.past_norm or wanted.has("lora_a") or wanted.has("weight"):
        saved["x"] = x
        saved["inverse_rms"] = checkpoint_name(inverse_rms, "rms_norm_inverse_rms")
    if wanted.has("lora_b"):
        saved["t"] = checkpoint_name(t, RANK_NAME)
    return saved


def backward_to_norm(
    dys: Sequence[jax.Array],
    residual_gradient: jax.Array | None,
    saved: dict[str, Any],
    wanted: Wanted,
    options: NormOptions,
    *,
    largest: Sequence[Any] | None = None,
    g: Any = None,
) -> tuple[jax.Array | None, jax.Array | None, tuple[LinearWeights, ...]]:
    """(dx, dnorm_weight, gradients of the layers) of norm and linear layers; None for what is not `wanted`.

    Args:
      dys: dY_i [..., out_i]. residual_gradient: dX [..., d], which passes by the norm; None counts as zero.
      saved: from `save_norm`.
      largest: magnitudes of dY_i where they are known.
      g: G where it is known.
    """
    x: Any = saved.get("x")
    inverse_rms: Any = saved.get("inverse_rms")
    norm_weight = saved["norm_weight"]
    linears = saved["linears"]
    dtype = dys[0].dtype
    if g is None and (wanted.past_norm or wanted.has("lora_a")):
        g = rank_gradient(dys, linears, options.scales)

    n = da = None
    if wanted.has("weight") or (wanted.has("lora_a") and dtype == jnp.float16):
        # Behind a barrier, or XLA would find forward's n equal to this one and keep it alive until here.
        late_rms, dys = jax.lax.optimization_barrier((inverse_rms, tuple(dys)))
        n = normalized(x, late_rms, norm_weight, weight_offset=options.weight_offset)
    if wanted.has("lora_a") and n is not None:
        da = over_tokens(g.astype(dtype), n, jnp.float32)
    elif wanted.has("lora_a"):
        da = over_tokens((g * inverse_rms[..., None]).astype(dtype), x, jnp.float32)
        da *= norm_weight.astype(jnp.float32) + options.weight_offset
    gradients = weight_gradients(dys, da, saved.get("t"), n, linears, options.scales, wanted.linears)

    of_norm: dict[str, jax.Array] = {}
    if wanted.past_norm:
        dn = input_gradient(dys, g, linears, largest)
        of_norm = rms_norm_backward(
            dn,
            x,
            inverse_rms,
            norm_weight,
            wanted=(("x",) if wanted.x else ()) + (("weight",) if wanted.norm_weight else ()),
            weight_offset=options.weight_offset,
            with_kernel=options.with_kernel,
            residual_gradient=residual_gradient,
        )
    return of_norm.get("x"), of_norm.get("weight"), gradients


def _compute(x, norm_weight, linears, options):
    """((y_1, ..), T, r)."""
    n, inverse_rms = rms_norm_forward(
        x, norm_weight, eps=options.eps, weight_offset=options.weight_offset, with_kernel=options.with_kernel
    )
    largest = bound_of_norm(norm_weight, linears, options)
    return *apply_linears(n, linears, options.scales, largest=largest), inverse_rms


def bound_of_norm(
    norm_weight: jax.Array, linears: Sequence[LinearWeights], options: NormOptions
) -> jax.Array | None:
    """max|n| at most, where one of the layers rounds n; it costs no pass over n, and does not depend on it."""
    if not any(rounds_operands(linear.weight) for linear in linears):
        return None
    return largest_normalized(norm_weight, options.weight_offset)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm_linears(x, norm_weight, linears, options):
    return x, _compute(x, norm_weight, linears, options)[0]


def _norm_linears_forward(x, norm_weight, linears, options):
    wanted = Wanted(
        launch.perturbed(x),
        launch.perturbed(norm_weight),
        tuple(wanted_fields("norm_linears", linear) for linear in linears),
    )
    values = jax.custom_derivatives.custom_vjp_primal_tree_values
    x, norm_weight, linears = values((x, norm_weight, linears))
    outputs, t, inverse_rms = _compute(x, norm_weight, linears, options)
    saved = save_norm(x, inverse_rms, t, norm_weight, linears, wanted)
    return (x, outputs), (saved, launch.Static(wanted))


def _norm_linears_backward(options, residuals, cotangents):
    saved, wanted = residuals
    dx, dys = cotangents
    passing = None if isinstance(dx, jax.custom_derivatives.SymbolicZero) else dx
    return backward_to_norm([instantiate(dy) for dy in dys], passing, saved, wanted.value, options)


_norm_linears.defvjp(_norm_linears_forward, _norm_linears_backward, symbolic_zeros=True)
