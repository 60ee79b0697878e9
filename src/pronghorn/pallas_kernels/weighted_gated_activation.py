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
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.gated_activation import (
    Activation,
    check_activation,
    launch_options,
    sigmoid_in_kernel,
    tile_of_program,
    value_and_slope,
)


def weighted_gated_activation(
    gate: jax.Array,
    up: jax.Array,
    weights: jax.Array,
    *,
    activation: Activation = "silu",
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """weights · activation(gate) · up.

    Args:
      gate, up: [rows, f], one dtype: bf16, fp16 or fp32.
      weights: fp32 [rows, 1].
      activation: as in `gated_activation`.
      implementation: "pallas", "xla" or None for the platform's default. Both have the gradient by hand.

    Returns:
      [rows, f] in the dtype of gate.

    Raises:
      InputError: for an unknown activation, or shapes or dtypes that do not fit.
    """
    check_activation(activation)
    if gate.ndim != 2 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise InputError(
            f"weighted_gated_activation: gate is {gate.dtype}{gate.shape}, up is {up.dtype}{up.shape}; they must be "
            "[rows, f] and alike."
        )
    if weights.shape != (gate.shape[0], 1) or weights.dtype != jnp.float32:
        raise InputError(
            f"weighted_gated_activation: weights {weights.dtype}{weights.shape} must be float32{(gate.shape[0], 1)}."
        )
    with_kernel = launch.resolve(implementation) == "pallas" and gate.size > 0
    return _weighted(gate, up, weights, activation, with_kernel)


def weighted_gated_activation_reference(
    gate: jax.Array, up: jax.Array, weights: jax.Array, *, activation: Activation = "silu"
) -> jax.Array:
    """The oracle of `weighted_gated_activation`, in plain jax.numpy."""
    value, _ = value_and_slope(gate.astype(jnp.float32), activation)
    return (weights * value * up.astype(jnp.float32)).astype(gate.dtype)


def _load(refs, tile, mask):
    return (triton.load(ref.at[tile], mask=mask, other=0.0).astype(jnp.float32) for ref in refs)


def _weights_of(weights_ref, rows):
    """fp32 [block, 1], zeros past the last row."""
    return triton.load(weights_ref.at[rows], mask=rows < weights_ref.shape[0], other=0.0)


def _forward_kernel(gate_ref, up_ref, weights_ref, out_ref, *, activation, block):
    tile, mask = tile_of_program(gate_ref.shape, block)
    gate, up = _load((gate_ref, up_ref), tile, mask)
    value, _ = value_and_slope(gate, activation, sigmoid_in_kernel)
    out = _weights_of(weights_ref, tile[0]) * value * up
    triton.store(out_ref.at[tile], out.astype(out_ref.dtype), mask=mask)


def _backward_kernel(
    dout_ref, gate_ref, up_ref, weights_ref, dgate_ref, dup_ref, shares_ref, *, activation, block
):
    tile, mask = tile_of_program(gate_ref.shape, block)
    dout, gate, up = _load((dout_ref, gate_ref, up_ref), tile, mask)
    value, slope = value_and_slope(gate, activation, sigmoid_in_kernel)
    share = jnp.sum(dout * value * up, axis=1)
    dout = _weights_of(weights_ref, tile[0]) * dout
    triton.store(dgate_ref.at[tile], (dout * up * slope).astype(dgate_ref.dtype), mask=mask)
    triton.store(dup_ref.at[tile], (dout * value).astype(dup_ref.dtype), mask=mask)
    rows, columns_block = tile[0][:, 0], pl.program_id(0) % shares_ref.shape[0]
    triton.store(shares_ref.at[columns_block, rows], share, mask=rows < shares_ref.shape[1])


def _launch(kernel, name, arguments, activation, *, gradients):
    """Arguments [rows, f], the last [rows, 1]. `name` is a launch of the same traffic, whose measured block serves."""
    shape, dtype = arguments[0].shape, arguments[0].dtype
    grid, block, warps = launch_options(name, shape, dtype)
    alike = jax.ShapeDtypeStruct(shape, dtype)
    shares = jax.ShapeDtypeStruct((launch.cdiv(shape[1], block[1]), shape[0]), jnp.float32)
    return launch.pallas_call(
        functools.partial(kernel, block=block, activation=activation),
        name=f"weighted_{name}",
        grid=grid,
        num_warps=warps,
        out_shape=(alike, alike, shares) if gradients else (alike,),
        # Each program reads its elements before it writes them: gradients take the memory of what was saved.
        input_output_aliases={1: 0, 2: 1} if gradients else {},
    )(*arguments[:-1], arguments[-1][:, 0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _weighted(gate, up, weights, activation, with_kernel):
    if with_kernel:
        arguments = gate, up, weights
        return _launch(_forward_kernel, "gated_activation_forward", arguments, activation, gradients=False)[0]
    return weighted_gated_activation_reference(gate, up, weights, activation=activation)


def _weighted_forward(gate, up, weights, activation, with_kernel):
    gate = checkpoint_name(gate, "gated_activation_gate")
    up = checkpoint_name(up, "gated_activation_up")
    return _weighted(gate, up, weights, activation, with_kernel), (gate, up, weights)


def _weighted_backward(activation, with_kernel, saved, dout):
    if with_kernel:
        arguments = dout, *saved
        dgate, dup, shares = _launch(
            _backward_kernel, "gated_activation_backward", arguments, activation, gradients=True
        )
        return dgate, dup, jnp.sum(shares, axis=0)[:, None]
    dtype = saved[0].dtype
    # The barrier keeps XLA from finding forward's values equal to these and alive until here.
    dout, gate, up, weights = jax.lax.optimization_barrier((dout, *saved))
    dout, gate, up = (array.astype(jnp.float32) for array in (dout, gate, up))
    value, slope = value_and_slope(gate, activation)
    dweights = jnp.sum(dout * value * up, axis=1, keepdims=True)
    return (weights * dout * up * slope).astype(dtype), (weights * dout * value).astype(dtype), dweights


_weighted.defvjp(_weighted_forward, _weighted_backward)
