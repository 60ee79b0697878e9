"""A gated feed-forward layer with adapters, its norm and its residual included, as one op that saves four arrays.

With r = 1 / sqrt(mean(x²) + eps), g = norm_weight + weight_offset, n = (x r) g, f the activation, and each product with
its adapter as in `stacked_linears`:

    e = gate(n)      u = up(n)      h = f(e) u      y = x + down(h)
    dh = G_d A_d + dY W_d                          dA_d = G_dᵀ h
    du = dh f(e)     de = dh u f'(e)               h again, in the same pass
    dx = dY + norm's gradient of (de, du)          as in `norm_linears`

Saved: x (as it came in), r, e, u, and the T of the adapters, under the names that `rms_norm`, `gated_activation` and
`lora_linear` give them; neither n nor h. Without `residual`, y = down(h) and dx lacks dY.

Where kernels run and adapters are thin, the rank-r products of gate, up and dh, and T of down, are left to the kernels
of `lowrank_gated_activation`: e and u are then saved without them, and neither h nor a second pass over de and du is
needed for the gradients of the adapters.

With dropout nothing is shared between adapters, so the op is then made of `rms_norm`, `lora_linear` and
`gated_activation`. Implementations are chosen as in `norm_linears`.

Sources: Shazeer, GLU Variants Improve Transformer, 2020, https://arxiv.org/abs/2002.05202, and those of `norm_linears`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.gated_activation import (
    Activation,
    check_activation,
    gated_activation,
    gated_activation_backward,
    gated_activation_forward,
)
from pronghorn.pallas_kernels.lora_linear import RANK_NAME, over_tokens, rounds_operands, times_transposed
from pronghorn.pallas_kernels.lowrank_gated_activation import (
    GatedFactors,
    GatedGradients,
    lowrank_gated_backward,
    lowrank_gated_forward,
)
from pronghorn.pallas_kernels.norm_linears import (
    Dropout,
    NormOptions,
    Wanted,
    backward_to_norm,
    bound_of_norm,
    check_norm,
    drops,
    one_linear,
    save_norm,
)
from pronghorn.pallas_kernels.rms_norm import rms_norm, rms_norm_forward
from pronghorn.pallas_kernels.stacked_linears import (
    LinearWeights,
    apply_linears,
    check_linears,
    input_gradient,
    own_rows,
    rank_gradient,
    share_rank_products,
    shared_factors,
    stacked_a,
    wanted_fields,
    weight_gradients,
)


class _Options(NamedTuple):
    norm: NormOptions  # scales of gate and up
    down_scale: float
    activation: Activation
    residual: bool


def gated_mlp(
    x: jax.Array,
    norm_weight: jax.Array,
    gate: LinearWeights,
    up: LinearWeights,
    down: LinearWeights,
    *,
    scales: Sequence[float] = (1.0, 1.0, 1.0),
    eps: float,
    weight_offset: float = 0.0,
    activation: Activation = "silu",
    residual: bool = True,
    dropout: Dropout | None = None,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """x + down(activation(gate(n)) · up(n)), n = rms_norm(x).

    Args:
      x: [..., d]; bf16, fp16 or fp32.
      norm_weight: [d].
      gate, up: weights [f, d]; down: [d, f]. Any of them may lack an adapter, ranks may differ.
      scales: s = alpha / r of gate, up and down.
      eps, weight_offset: of the norm, as in `rms_norm`.
      activation: "silu", "gelu_tanh" or "gelu".
      residual: add x; without it the layer's output alone, for families that normalise that first.
      dropout: rates and keys of gate, up and down; None drops nothing.
      implementation: as in `norm_linears`.

    Returns:
      [..., d] in the dtype of x.

    Raises:
      InputError: for an unknown activation, or where shapes do not fit.
    """
    check_activation(activation)
    if len(scales) != 3:
        raise InputError(f"gated_mlp: {len(scales)} scales; give those of gate, up and down.")
    check_norm("gated_mlp", x, norm_weight)
    check_linears("gated_mlp", x.shape[-1], (gate, up), scales[:2])
    check_linears("gated_mlp", gate.weight.shape[0], (down,), scales[2:])
    if up.weight.shape != gate.weight.shape or down.weight.shape[0] != x.shape[-1]:
        raise InputError(
            f"gated_mlp: gate {gate.weight.shape}, up {up.weight.shape} and down {down.weight.shape} must be [f, d], "
            f"[f, d] and [d, f] for x {x.shape}."
        )
    if launch.resolve(implementation, default_cpu="pallas") == "xla":
        implementation = "xla"
    linears = gate, up, down
    if implementation == "xla" or drops(dropout):
        return _one_by_one(
            x,
            norm_weight,
            linears,
            scales,
            eps,
            weight_offset,
            activation,
            residual,
            dropout,
            implementation,
        )
    with_kernel = launch.resolve(implementation) == "pallas"
    gate_scale, up_scale, down_scale = (float(s) for s in scales)
    norm = NormOptions((gate_scale, up_scale), float(eps), float(weight_offset), with_kernel)
    return _gated_mlp(x, norm_weight, linears, _Options(norm, down_scale, activation, residual))


def gated_mlp_reference(
    x: jax.Array,
    norm_weight: jax.Array,
    gate: LinearWeights,
    up: LinearWeights,
    down: LinearWeights,
    *,
    scales: Sequence[float] = (1.0, 1.0, 1.0),
    eps: float,
    weight_offset: float = 0.0,
    activation: Activation = "silu",
    residual: bool = True,
    dropout: Dropout | None = None,
) -> jax.Array:
    """The oracle of `gated_mlp`: the oracles of norm, linear layers and activation, one after the other."""
    linears = gate, up, down
    return _one_by_one(
        x, norm_weight, linears, scales, eps, weight_offset, activation, residual, dropout, "xla"
    )


def _one_by_one(
    x, norm_weight, linears, scales, eps, weight_offset, activation, residual, dropout, implementation
):
    n = rms_norm(x, norm_weight, eps=eps, weight_offset=weight_offset, implementation=implementation)
    gate, up = (one_linear(n, linears, scales, index, dropout, implementation) for index in (0, 1))
    h = gated_activation(gate, up, activation=activation, implementation=implementation)
    y = one_linear(h, linears, scales, 2, dropout, implementation)
    return x + y if residual else y


class _Forward(NamedTuple):
    y: jax.Array
    inverse_rms: jax.Array
    gate: jax.Array
    up: jax.Array
    t: jax.Array | None
    t_down: jax.Array | None


def _compute(x, norm_weight, linears, options) -> _Forward:
    norm = options.norm
    n, inverse_rms = rms_norm_forward(
        x, norm_weight, eps=norm.eps, weight_offset=norm.weight_offset, with_kernel=norm.with_kernel
    )
    finished = _finished_by_kernels(linears, norm.with_kernel)
    layers = _without_adapters(linears[:2]) if finished else linears[:2]
    largest = bound_of_norm(norm_weight, layers, norm)
    (gate, up), t = apply_linears(n, layers, norm.scales, largest=largest)
    gate = checkpoint_name(gate, "gated_activation_gate")
    up = checkpoint_name(up, "gated_activation_up")
    factors = None
    if finished:
        t = times_transposed(n, stacked_a(linears[:2], n.dtype), n.dtype)
        b_gate, b_up = shared_factors(linears[:2], norm.scales, n.dtype)
        factors = GatedFactors(t, b_gate, b_up, a_down=stacked_a(linears[2:], n.dtype))
    h, t_down = _activated(gate, up, factors, options)
    add = x if options.residual else None
    (y,), t_down = apply_linears(h, linears[2:], (options.down_scale,), add=add, t=t_down)
    return _Forward(y, inverse_rms, gate, up, t, t_down)


def _finished_by_kernels(linears, with_kernel) -> bool:
    """Whether kernels add the rank-r products of gate and up (and of dh, where down has an adapter)."""
    gate, up, down = linears
    adapted = gate.lora_a is not None or up.lora_a is not None
    return with_kernel and adapted and share_rank_products((gate, up)) and share_rank_products((down,))


def _activated(gate, up, factors, options):
    """(h, T of down or None); `factors` are the rank-r products that gate and up lack, or None."""
    if factors is not None:
        return lowrank_gated_forward(gate, up, factors, activation=options.activation)
    h = gated_activation_forward(
        gate, up, activation=options.activation, with_kernel=options.norm.with_kernel
    )
    return h, None


def _without_adapters(linears):
    return tuple(linear._replace(lora_a=None, lora_b=None) for linear in linears)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gated_mlp(x, norm_weight, linears, options):
    return _compute(x, norm_weight, linears, options).y


def _gated_mlp_forward(x, norm_weight, linears, options):
    fields = tuple(wanted_fields("gated_mlp", linear) for linear in linears)
    wanted, wanted_down = Wanted(launch.perturbed(x), launch.perturbed(norm_weight), fields[:2]), fields[2]
    values = jax.custom_derivatives.custom_vjp_primal_tree_values
    x, norm_weight, linears = values((x, norm_weight, linears))
    done = _compute(x, norm_weight, linears, options)
    saved: dict[str, Any] = save_norm(x, done.inverse_rms, done.t, norm_weight, linears[:2], wanted)
    saved["down"] = linears[2]
    if wanted.past_norm or any(wanted.linears) or wanted_down & {"lora_a", "weight"}:
        saved["gate"], saved["up"] = done.gate, done.up
        if "t" not in saved and _finished_by_kernels(linears, options.norm.with_kernel):
            saved["t"] = checkpoint_name(done.t, RANK_NAME)
    if "lora_b" in wanted_down:
        saved["t_down"] = checkpoint_name(done.t_down, RANK_NAME)
    return done.y, (saved, launch.Static((wanted, wanted_down)))


def _gated_mlp_backward(options, residuals, dy):
    saved, static = residuals
    wanted, wanted_down = static.value
    norm, scale, dtype = options.norm, (options.down_scale,), dy.dtype
    passing = dy if options.residual else None
    down = (saved["down"],)
    past_activation = wanted.past_norm or any(wanted.linears)
    g: Any = rank_gradient((dy,), down, scale) if past_activation or "lora_a" in wanted_down else None
    g = None if g is None else g.astype(dtype)
    factors = None
    if _finished_by_kernels((*saved["linears"], saved["down"]), norm.with_kernel) and "t" in saved:
        factors = GatedFactors(saved["t"], *shared_factors(saved["linears"], norm.scales, dtype))
    found = GatedGradients()
    if past_activation:
        found = _past_activation(saved, factors, g, dy, down, wanted, wanted_down, options)
    elif wanted_down & {"lora_a", "weight"}:
        gate, up, dy = jax.lax.optimization_barrier((saved["gate"], saved["up"], dy))
        h, _ = _activated(gate, up, factors, options)
        found = GatedGradients(h=h)
    da = found.da_down
    if da is None and "lora_a" in wanted_down:
        da = over_tokens(g, found.h, jnp.float32)
    of_down = weight_gradients((dy,), da, saved.get("t_down"), found.h, down, scale, (wanted_down,))
    if not past_activation:
        return None, None, (None, None, *of_down)

    dbs = found.db_gate, found.db_up
    others = wanted._replace(
        linears=tuple(
            fields if db is None else fields - {"lora_b"}
            for fields, db in zip(wanted.linears, dbs, strict=True)
        )
    )
    largest = (found.largest_dgate, found.largest_dup)
    dx, dnorm_weight, of_both = backward_to_norm(
        (found.dgate, found.dup), passing, saved, others, norm, largest=largest, g=found.g_both
    )
    of_both = tuple(
        gradient
        if db is None
        else gradient._replace(lora_b=own_rows(db, index, saved["linears"], norm.scales))
        for index, (gradient, db) in enumerate(zip(of_both, dbs, strict=True))
    )
    return dx, dnorm_weight, (*of_both, *of_down)


def _past_activation(saved, factors, g, dy, down, wanted, wanted_down, options) -> GatedGradients:
    """dgate and dup, and h or what it is wanted for."""
    gate, up = saved["gate"], saved["up"]
    if factors is None:
        with_h = bool(wanted_down & {"lora_a", "weight"})
        dh = input_gradient((dy,), g, down)
        return GatedGradients(
            *gated_activation_backward(
                dh,
                gate,
                up,
                activation=options.activation,
                with_h=with_h,
                with_kernel=options.norm.with_kernel,
            )
        )
    if g is not None:
        factors = factors._replace(g=g, a_down=stacked_a(down, dy.dtype))
    asked = {
        "h": "weight" in wanted_down,
        "da_down": "lora_a" in wanted_down,
        "db_gate": "lora_b" in wanted.linears[0],
        "db_up": "lora_b" in wanted.linears[1],
        "g_both": wanted.past_norm or wanted.has("lora_a"),
        "largest_dgate": wanted.past_norm and rounds_operands(saved["linears"][0].weight),
        "largest_dup": wanted.past_norm and rounds_operands(saved["linears"][1].weight),
    }
    return lowrank_gated_backward(
        input_gradient((dy,), None, down),
        gate,
        up,
        factors,
        activation=options.activation,
        wanted=tuple(name for name, yes in asked.items() if yes),
    )


_gated_mlp.defvjp(_gated_mlp_forward, _gated_mlp_backward, symbolic_zeros=True)
