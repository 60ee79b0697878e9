"""The gate of an expert with the router's weight of each row: h = w · f(gate) · up, and all gradients in one pass.

f as in `gated_activation`. From D = ∂L/∂h, of every row:

    ∂L/∂up = w D f(gate)        ∂L/∂gate = w D up f'(gate)        ∂L/∂w = Σ_f D f(gate) up

A linear that follows makes of it w times its output: w before a product of [rows, f] leaves nothing to be kept of its
[rows, d] for the gradient of w. Saved: gate, up and w. Everything is fp32, rounded once.

A program of the kernel holds a block of columns, whose share of ∂L/∂w it writes; the few shares of a row are added up
after it, in a fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.gated_activation import (
    Activation,
    as_gates,
    check_activation,
    checked_gates,
    gates_in_place,
    halves,
    launch_options,
    load_wide,
    named_gates,
    places_of_gates,
    sigmoid_in_kernel,
    store_all,
    tile_of_program,
    value_and_slope,
)


def weighted_gated_activation(
    gate: jax.Array,
    up: jax.Array | None,
    weights: jax.Array,
    *,
    activation: Activation = "silu",
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """weights · activation(gate) · up.

    Args:
      gate, up: [rows, f], one dtype: bf16, fp16 or fp32; or gate and up beside each other, [rows, 2 f], and None.
      weights: fp32 [rows, 1].
      activation: as in `gated_activation`.
      implementation: "pallas", "xla" or None for the platform's default. Both have the gradient by hand.

    Returns:
      [rows, f] in the dtype of gate.

    Raises:
      InputError: for an unknown activation, or shapes or dtypes that do not fit.
    """
    check_activation(activation)
    if gate.ndim != 2:
        raise InputError(f"weighted_gated_activation: gate {gate.shape} must be [rows, f].")
    gates = checked_gates("weighted_gated_activation", gate, up)
    if weights.shape != (gate.shape[0], 1) or weights.dtype != jnp.float32:
        raise InputError(
            f"weighted_gated_activation: weights {weights.dtype}{weights.shape} must be float32{(gate.shape[0], 1)}."
        )
    with_kernel = launch.resolve(implementation) == "pallas" and gate.size > 0
    return _weighted(gates, weights, activation, with_kernel)


def weighted_gated_activation_reference(
    gate: jax.Array, up: jax.Array | None, weights: jax.Array, *, activation: Activation = "silu"
) -> jax.Array:
    """The oracle of `weighted_gated_activation`, in plain jax.numpy."""
    gate, up = halves((gate,) if up is None else (gate, up))
    value, _ = value_and_slope(gate.astype(jnp.float32), activation)
    return (weights * value * up.astype(jnp.float32)).astype(gate.dtype)


def _weights_of(weights_ref, rows):
    """fp32 [block, 1], zeros past the last row."""
    return triton.load(weights_ref.at[rows], mask=rows < weights_ref.shape[0], other=0.0)


def _forward_kernel(*refs, activation, block):
    *gates, weights_ref, out_ref = refs
    tile, mask = tile_of_program(out_ref.shape, block)
    gate, up = load_wide(places_of_gates(gates, tile, out_ref.shape[1]), mask)
    value, _ = value_and_slope(gate, activation, sigmoid_in_kernel)
    store_all([out_ref.at[tile]], [_weights_of(weights_ref, tile[0]) * value * up], mask)


def _backward_kernel(dout_ref, *refs, activation, block):
    """refs: gate and up (one ref or two), the weights, the gradients of the former, and shares of the latter's."""
    count, width = len(refs) // 2 - 1, dout_ref.shape[1]
    gates, weights_ref, gradients, shares_ref = refs[:count], refs[count], refs[count + 1 : -1], refs[-1]
    tile, mask = tile_of_program(dout_ref.shape, block)
    dout, gate, up = load_wide([dout_ref.at[tile], *places_of_gates(gates, tile, width)], mask)
    value, slope = value_and_slope(gate, activation, sigmoid_in_kernel)
    share = jnp.sum(dout * value * up, axis=1)
    dout = _weights_of(weights_ref, tile[0]) * dout
    store_all(places_of_gates(gradients, tile, width), [dout * up * slope, dout * value], mask)
    rows, columns_block = tile[0][:, 0], pl.program_id(0) % shares_ref.shape[0]
    triton.store(shares_ref.at[columns_block, rows], share, mask=rows < shares_ref.shape[1])


def _launch(kernel, name, arguments, gates, weights, activation, *, gradients):
    """`arguments` stand in front of the gates. `name` is a launch of the same traffic, whose measured block serves."""
    rows, dtype = weights.shape[0], gates[0].dtype
    width = gates[0].shape[1] // (3 - len(gates))
    grid, block, warps = launch_options(name, (rows, width), dtype)
    shares = jax.ShapeDtypeStruct((launch.cdiv(width, block[1]), rows), jnp.float32)
    alike = tuple(jax.ShapeDtypeStruct(gate.shape, dtype) for gate in gates)
    return launch.pallas_call(
        functools.partial(kernel, block=block, activation=activation),
        name=f"weighted_{name}",
        grid=grid,
        num_warps=warps,
        out_shape=(*alike, shares) if gradients else (jax.ShapeDtypeStruct((rows, width), dtype),),
        input_output_aliases=gates_in_place(gates) if gradients else {},
    )(*arguments, *gates, weights[:, 0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _weighted(gates, weights, activation, with_kernel):
    if with_kernel:
        name = "gated_activation_forward"
        return _launch(_forward_kernel, name, (), gates, weights, activation, gradients=False)[0]
    return weighted_gated_activation_reference(*halves(gates), weights, activation=activation)


def _weighted_forward(gates, weights, activation, with_kernel):
    gates = named_gates("gated_activation", gates)
    return _weighted(gates, weights, activation, with_kernel), (gates, weights)


def _weighted_backward(activation, with_kernel, saved, dout):
    gates, weights = saved
    if with_kernel:
        name = "gated_activation_backward"
        *gradients, shares = _launch(
            _backward_kernel, name, (dout,), gates, weights, activation, gradients=True
        )
        return tuple(gradients), jnp.sum(shares, axis=0)[:, None]
    dtype = dout.dtype
    # The barrier keeps XLA from finding forward's values equal to these and alive until here.
    dout, gates, weights = jax.lax.optimization_barrier((dout, gates, weights))
    dout, gate, up = (array.astype(jnp.float32) for array in (dout, *halves(gates)))
    value, slope = value_and_slope(gate, activation)
    dweights = jnp.sum(dout * value * up, axis=1, keepdims=True)
    gradients = [(weights * dout * up * slope).astype(dtype), (weights * dout * value).astype(dtype)]
    return as_gates(gradients, gates), dweights


_weighted.defvjp(_weighted_forward, _weighted_backward)
