"""SwiGLU with both factors kept within a limit, and one added to the second: h = c σ(α c) (v + 1).

    c = min(gate, L)      v = max(−L, min(up, L))      f(c) = c σ(α c)      f'(c) = σ(α c) (1 + α c (1 − σ(α c)))

From D = ∂L/∂h: ∂L/∂gate = D (v + 1) f'(c) where gate <= L, and ∂L/∂up = D f(c) where |up| <= L; zero elsewhere. At the
limit itself the gradient passes, as in torch. Saved: gate and up, named "clamped_swiglu_gate" and "clamped_swiglu_up"
for `jax.checkpoint` policies; backward rebuilds the rest. Everything is fp32, rounded once.

Source: gpt-oss (OpenAI, 2025, https://arxiv.org/abs/2508.10925, section 2.1); σ(1.702 c) c approximates the exact GELU
(Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415, section 2).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.gated_activation import (
    as_gates,
    checked_gates,
    gates_in_place,
    halves,
    launch_forward,
    launch_rows,
    load_wide,
    named_gates,
    places_of_gates,
    sigmoid_in_kernel,
    store_all,
    tile_of_program,
)


def clamped_swiglu(
    gate: jax.Array,
    up: jax.Array | None,
    *,
    limit: float = 7.0,
    alpha: float = 1.702,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """c σ(alpha c) (v + 1), c the gate up to the limit, v the other factor within ± the limit.

    Args:
      gate, up: [..., f], one dtype: bf16, fp16 or fp32; or gate and up beside each other, [..., 2 f], and None.
      limit: L, over zero.
      alpha: the gain of the sigmoid.
      implementation: "pallas", "xla" or None for the platform's default. Both have the gradient by hand.

    Returns:
      [..., f] in the dtype of gate.

    Raises:
      InputError: shapes or dtypes that differ, or a limit that is not over zero.
    """
    gates = checked_gates("clamped_swiglu", gate, up)
    if not limit > 0:
        raise InputError(f"clamped_swiglu: limit={limit} must be over zero.")
    with_kernel = launch.resolve(implementation) == "pallas" and gate.size > 0
    return _clamped_swiglu(gates, float(limit), float(alpha), with_kernel)


def clamped_swiglu_reference(
    gate: jax.Array, up: jax.Array | None = None, *, limit: float = 7.0, alpha: float = 1.702
) -> jax.Array:
    """The oracle of `clamped_swiglu`, in plain jax.numpy."""
    gate, up = halves((gate,) if up is None else (gate, up))
    c = jnp.minimum(gate.astype(jnp.float32), limit)
    v = jnp.clip(up.astype(jnp.float32), -limit, limit)
    return (c * jax.nn.sigmoid(alpha * c) * (v + 1.0)).astype(gate.dtype)


def _factors(gate, up, limit, alpha, sigmoid: Callable = jax.nn.sigmoid):
    """(f(c), v + 1, s = σ(α c), c)."""
    c = jnp.minimum(gate, limit)
    s = sigmoid(alpha * c)
    return c * s, jnp.minimum(jnp.maximum(up, -limit), limit) + 1.0, s, c


def _gradients(dout, gate, up, limit, alpha, sigmoid: Callable = jax.nn.sigmoid):
    """(∂L/∂gate, ∂L/∂up), all fp32."""
    value, shifted, s, c = _factors(gate, up, limit, alpha, sigmoid)
    slope = s * (1.0 + alpha * c * (1.0 - s))
    dgate = jnp.where(gate <= limit, dout * shifted * slope, 0.0)
    dup = jnp.where((up <= limit) & (up >= -limit), dout * value, 0.0)
    return dgate, dup


def _forward_kernel(*refs, limit, alpha, block):
    *gates, out_ref = refs
    tile, mask = tile_of_program(out_ref.shape, block)
    gate, up = load_wide(places_of_gates(gates, tile, out_ref.shape[1]), mask)
    value, shifted, _, _ = _factors(gate, up, limit, alpha, sigmoid_in_kernel)
    store_all([out_ref.at[tile]], [value * shifted], mask)


def _backward_kernel(dout_ref, *refs, limit, alpha, block):
    """refs: gate and up (one ref or two), and their gradients."""
    count, width = len(refs) // 2, dout_ref.shape[1]
    tile, mask = tile_of_program(dout_ref.shape, block)
    places = [dout_ref.at[tile], *places_of_gates(refs[:count], tile, width)]
    dout, gate, up = load_wide(places, mask)
    gradients = _gradients(dout, gate, up, limit, alpha, sigmoid_in_kernel)
    store_all(places_of_gates(refs[count:], tile, width), gradients, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _clamped_swiglu(gates, limit, alpha, with_kernel):
    if with_kernel:
        return launch_forward(_forward_kernel, "clamped_swiglu_forward", gates, limit=limit, alpha=alpha)
    return clamped_swiglu_reference(*gates, limit=limit, alpha=alpha)


def _clamped_swiglu_forward(gates, limit, alpha, with_kernel):
    gates = named_gates("clamped_swiglu", gates)
    return _clamped_swiglu(gates, limit, alpha, with_kernel), gates


def _clamped_swiglu_backward(limit, alpha, with_kernel, gates, dout):
    if with_kernel:
        arguments, name = (dout, *gates), "clamped_swiglu_backward"
        aliases, static = gates_in_place(gates), {"limit": limit, "alpha": alpha}
        return (launch_rows(_backward_kernel, name, arguments, gates, aliases, **static),)
    wide, gate, up = (array.astype(jnp.float32) for array in (dout, *halves(gates)))
    gradients = [array.astype(dout.dtype) for array in _gradients(wide, gate, up, limit, alpha)]
    return (as_gates(gradients, gates),)


_clamped_swiglu.defvjp(_clamped_swiglu_forward, _clamped_swiglu_backward)
