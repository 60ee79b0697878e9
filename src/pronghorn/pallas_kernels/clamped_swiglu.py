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
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.gated_activation import launch_rows, sigmoid_in_kernel, tile_of_program


def clamped_swiglu(
    gate: jax.Array,
    up: jax.Array,
    *,
    limit: float = 7.0,
    alpha: float = 1.702,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """c σ(alpha c) (v + 1), c the gate up to the limit, v the other factor within ± the limit.

    Args:
      gate, up: [..., f], one dtype: bf16, fp16 or fp32.
      limit: L, over zero.
      alpha: the gain of the sigmoid.
      implementation: "pallas", "xla" or None for the platform's default. Both have the gradient by hand.

    Returns:
      [..., f] in the dtype of gate.

    Raises:
      InputError: shapes or dtypes that differ, or a limit that is not over zero.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise InputError(
            f"clamped_swiglu: gate is {gate.dtype}{gate.shape}, up is {up.dtype}{up.shape}; they must be alike."
        )
    if not limit > 0:
        raise InputError(f"clamped_swiglu: limit={limit} must be over zero.")
    with_kernel = launch.resolve(implementation) == "pallas" and gate.size > 0
    return _clamped_swiglu(gate, up, float(limit), float(alpha), with_kernel)


def clamped_swiglu_reference(
    gate: jax.Array, up: jax.Array, *, limit: float = 7.0, alpha: float = 1.702
) -> jax.Array:
    """The oracle of `clamped_swiglu`, in plain jax.numpy."""
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


def _load(refs, tile, mask):
    return (triton.load(ref.at[tile], mask=mask, other=0.0).astype(jnp.float32) for ref in refs)


def _forward_kernel(gate_ref, up_ref, out_ref, *, limit, alpha, block):
    tile, mask = tile_of_program(gate_ref.shape, block)
    gate, up = _load((gate_ref, up_ref), tile, mask)
    value, shifted, _, _ = _factors(gate, up, limit, alpha, sigmoid_in_kernel)
    triton.store(out_ref.at[tile], (value * shifted).astype(out_ref.dtype), mask=mask)


def _backward_kernel(dout_ref, gate_ref, up_ref, dgate_ref, dup_ref, *, limit, alpha, block):
    tile, mask = tile_of_program(gate_ref.shape, block)
    dout, gate, up = _load((dout_ref, gate_ref, up_ref), tile, mask)
    dgate, dup = _gradients(dout, gate, up, limit, alpha, sigmoid_in_kernel)
    triton.store(dgate_ref.at[tile], dgate.astype(dgate_ref.dtype), mask=mask)
    triton.store(dup_ref.at[tile], dup.astype(dup_ref.dtype), mask=mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _clamped_swiglu(gate, up, limit, alpha, with_kernel):
    if with_kernel:
        static = {"limit": limit, "alpha": alpha}
        return launch_rows(_forward_kernel, "clamped_swiglu_forward", (gate, up), 1, {}, **static)[0]
    return clamped_swiglu_reference(gate, up, limit=limit, alpha=alpha)


def _clamped_swiglu_forward(gate, up, limit, alpha, with_kernel):
    gate = checkpoint_name(gate, "clamped_swiglu_gate")
    up = checkpoint_name(up, "clamped_swiglu_up")
    return _clamped_swiglu(gate, up, limit, alpha, with_kernel), (gate, up)


def _clamped_swiglu_backward(limit, alpha, with_kernel, saved, dout):
    if with_kernel:
        # Each program reads its elements before it writes them, so the gradients take the memory of what was saved.
        static = {"limit": limit, "alpha": alpha}
        arguments, aliases = (dout, *saved), {1: 0, 2: 1}
        return launch_rows(_backward_kernel, "clamped_swiglu_backward", arguments, 2, aliases, **static)
    dtype = saved[0].dtype
    dout, gate, up = (array.astype(jnp.float32) for array in (dout, *saved))
    return tuple(array.astype(dtype) for array in _gradients(dout, gate, up, limit, alpha))


_clamped_swiglu.defvjp(_clamped_swiglu_forward, _clamped_swiglu_backward)
