"""Root mean square normalisation of the rows of x, fused forward and backward.

With r = 1 / sqrt(mean(x²) + eps) per row, x̂ = x r and g = weight + weight_offset:

    y  = x̂ g
    dx = r (g dy − x̂ mean(x̂ g dy))
    dg = sum over rows of dy x̂

Everything is computed in fp32 and rounded once. Backward reads x and dy once and writes dx; each program adds up its
own rows of dg, and the partial sums, one row a program, are added outside: no atomics, so a rerun is bit-exact.

`rms_norm_forward` and `rms_norm_backward` are for ops that hold the norm and save less than both together would.

Saved: x itself and r (one fp32 a row), named "rms_norm_inverse_rms" for `jax.checkpoint` policies.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4, https://arxiv.org/abs/1910.07467.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch, tuned

# What `tuned` may replace: elements of one array a program, elements a thread. Backward holds x, dy and their products,
# so its block is half as large.
FORWARD = (16384, 64)
BACKWARD = (8192, 32)
MOST_ROWS = 64
# Programs, and so partial sums, of the weight gradient: about two a multiprocessor on the largest GPU. A constant, so
# the order of the additions, and with it the last bit, is the same on every device with the same block.
WEIGHT_GRADIENT_PROGRAMS = 256


def rms_norm(
    x: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    weight_offset: float = 0.0,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """x / sqrt(mean(x², last axis) + eps) · (weight + weight_offset).

    Args:
      x: [..., d]; bf16, fp16 or fp32.
      weight: [d], any of these dtypes. Gets a gradient only where it is differentiated.
      eps: added to the mean square.
      weight_offset: 1.0 where the checkpoint stores the weight minus one (Gemma).
      implementation: "pallas", "xla" or None for the platform's default.

    Returns:
      [..., d] in the dtype of x.

    Raises:
      InputError: when the weight is not one value a column of x.
    """
    if weight.shape != x.shape[-1:]:
        raise InputError(
            f"rms_norm: weight has shape {weight.shape}, x has {x.shape}; weight must be {x.shape[-1:]}."
        )
    if launch.resolve(implementation) == "xla" or x.size == 0:
        return rms_norm_reference(x, weight, eps=eps, weight_offset=weight_offset)
    return _rms_norm(x, weight, float(eps), float(weight_offset))


def rms_norm_reference(
    x: jax.Array, weight: jax.Array, *, eps: float, weight_offset: float = 0.0
) -> jax.Array:
    """The oracle of `rms_norm`, in plain jax.numpy."""
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms * (weight.astype(jnp.float32) + weight_offset)).astype(x.dtype)


def rms_norm_forward(
    x: jax.Array, weight: jax.Array, *, eps: float, weight_offset: float, with_kernel: bool
) -> tuple[jax.Array, jax.Array]:
    """(y, r), for ops that hold this one and write their own gradient: r is fp32, x.shape[:-1]."""
    if with_kernel and x.size:
        y, inverse_rms = _forward(x, weight, eps, weight_offset, save_inverse_rms=True)
        return y, inverse_rms.reshape(x.shape[:-1])
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1) + eps)
    return normalized(x, inverse_rms, weight, weight_offset=weight_offset), inverse_rms


def normalized(x: jax.Array, inverse_rms: jax.Array, weight: jax.Array, *, weight_offset: float) -> jax.Array:
    """y again from x and r: elementwise, so left to XLA."""
    weight32 = weight.astype(jnp.float32) + weight_offset
    return (x.astype(jnp.float32) * inverse_rms[..., None] * weight32).astype(x.dtype)


def largest_normalized(weight: jax.Array, weight_offset: float) -> jax.Array:
    """A bound of |y|, fp32 [], whatever x is: no element of a row exceeds sqrt(d) times the row's rms."""
    weight32 = weight.astype(jnp.float32) + weight_offset
    return math.sqrt(weight.size) * jnp.max(jnp.abs(weight32))


def rms_norm_backward(
    dy: jax.Array,
    x: jax.Array,
    inverse_rms: jax.Array,
    weight: jax.Array,
    *,
    wanted: tuple[str, ...],
    weight_offset: float,
    with_kernel: bool,
    residual_gradient: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Gradients of what is `wanted` of "x" and "weight"; `residual_gradient` [..., d] is added to that of x.

    Where y feeds a branch x + f(y), the gradient that passes the branch by is added in the same pass, before dx is
    rounded.
    """
    if with_kernel and x.size:
        return _backward(dy, x, inverse_rms, weight, residual_gradient, wanted, weight_offset)
    dy32 = dy.astype(jnp.float32)
    x_hat = x.astype(jnp.float32) * inverse_rms[..., None]
    gradients = {}
    if "x" in wanted:
        scaled = dy32 * (weight.astype(jnp.float32) + weight_offset)
        mean = jnp.mean(x_hat * scaled, axis=-1, keepdims=True)
        dx = inverse_rms[..., None] * (scaled - x_hat * mean)
        if residual_gradient is not None:
            dx += residual_gradient.astype(jnp.float32)
        gradients["x"] = dx.astype(x.dtype)
    if "weight" in wanted:
        dweight = jnp.sum(dy32 * x_hat, axis=tuple(range(x.ndim - 1)))
        gradients["weight"] = dweight.astype(weight.dtype)
    return gradients


def _forward_kernel(x_ref, weight_ref, y_ref, *inverse_rms_ref, eps, weight_offset, block):
    rows = pl.program_id(0) * block[0] + jnp.arange(block[0])
    columns = jnp.arange(block[1])
    tile = (rows[:, None], columns[None, :])
    mask = launch.in_bounds(x_ref.shape, *tile)
    x = triton.load(x_ref.at[tile], mask=mask, other=0.0).astype(jnp.float32)
    weight = _load_weight(weight_ref, columns, weight_offset)

    inverse_rms = jax.lax.rsqrt(jnp.sum(x * x, axis=1) / x_ref.shape[1] + eps)
    y = x * inverse_rms[:, None] * weight[None, :]

    triton.store(y_ref.at[tile], y.astype(y_ref.dtype), mask=mask)
    if inverse_rms_ref:
        triton.store(inverse_rms_ref[0].at[rows], inverse_rms, mask=rows < x_ref.shape[0])


def _backward_kernel(
    dy_ref, x_ref, inverse_rms_ref, weight_ref, *refs, wanted, weight_offset, block, programs
):
    # In front of the outputs may stand one more input: the gradient that is added to dx.
    inputs = len(refs) - len(wanted)
    residual_ref, out = refs[:inputs], dict(zip(wanted, refs[inputs:], strict=True))
    num_rows, width = x_ref.shape
    program = pl.program_id(0)
    columns = jnp.arange(block[1])
    weight = _load_weight(weight_ref, columns, weight_offset)

    def one_block(index, dweight):
        rows = (index * programs + program) * block[0] + jnp.arange(block[0])
        tile = (rows[:, None], columns[None, :])
        mask = launch.in_bounds(x_ref.shape, *tile)
        # Rows and columns that do not exist count as zeros: they add nothing to any sum below.
        dy = triton.load(dy_ref.at[tile], mask=mask, other=0.0).astype(jnp.float32)
        x = triton.load(x_ref.at[tile], mask=mask, other=0.0).astype(jnp.float32)
        inverse_rms = triton.load(inverse_rms_ref.at[rows], mask=rows < num_rows, other=0.0)[:, None]
        x_hat = x * inverse_rms
        if "x" in out:
            scaled = weight[None, :] * dy
            mean = jnp.sum(x_hat * scaled, axis=1, keepdims=True) / width
            dx = inverse_rms * (scaled - x_hat * mean)
            if residual_ref:
                dx += triton.load(residual_ref[0].at[tile], mask=mask, other=0.0).astype(jnp.float32)
            triton.store(out["x"].at[tile], dx.astype(out["x"].dtype), mask=mask)
        return dweight + jnp.sum(dy * x_hat, axis=0) if "weight" in out else dweight

    if "weight" not in out:  # one block a program
        one_block(0, None)
        return
    rounds = launch.cdiv(num_rows, block[0] * programs)
    dweight = jax.lax.fori_loop(0, rounds, one_block, jnp.zeros(block[1], jnp.float32))
    triton.store(out["weight"].at[program, columns], dweight, mask=columns < width)


def _load_weight(weight_ref, columns, weight_offset):
    weight = triton.load(weight_ref.at[columns], mask=columns < weight_ref.shape[0], other=0.0)
    return weight.astype(jnp.float32) + weight_offset


def _block(rows: int, width: int, elements: int) -> tuple[int, int]:
    """(rows, columns) of one program: whole rows, padded to a power of two."""
    columns = launch.next_power_of_2(width)
    return min(max(1, elements // columns), MOST_ROWS, launch.next_power_of_2(rows)), columns


def _forward(x, weight, eps, weight_offset, *, save_inverse_rms):
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    elements, per_thread = tuned.choice("rms_norm_forward", x.dtype, width) or FORWARD
    block = _block(rows, width, elements)
    y = jax.ShapeDtypeStruct((rows, width), x.dtype)
    inverse_rms = jax.ShapeDtypeStruct((rows,), jnp.float32)
    outputs = launch.pallas_call(
        functools.partial(_forward_kernel, eps=eps, weight_offset=weight_offset, block=block),
        name="rms_norm_forward",
        grid=(launch.cdiv(rows, block[0]),),
        out_shape=(y, inverse_rms) if save_inverse_rms else (y,),
        num_warps=launch.warps_for(block[0] * block[1], per_thread=per_thread),
    )(x.reshape(rows, width), weight)
    return outputs[0].reshape(x.shape), *outputs[1:]


def _backward(dy, x, inverse_rms, weight, residual_gradient, wanted, weight_offset):
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    elements, per_thread = tuned.choice("rms_norm_backward", x.dtype, width) or BACKWARD
    block = _block(rows, width, elements)
    programs = launch.cdiv(rows, block[0])
    if "weight" in wanted:
        programs = min(programs, WEIGHT_GRADIENT_PROGRAMS)
    shapes = {
        "x": jax.ShapeDtypeStruct((rows, width), x.dtype),
        "weight": jax.ShapeDtypeStruct((programs, width), jnp.float32),
    }
    added = (
        () if residual_gradient is None or "x" not in wanted else (residual_gradient.reshape(rows, width),)
    )
    outputs = launch.pallas_call(
        functools.partial(
            _backward_kernel, wanted=wanted, weight_offset=weight_offset, block=block, programs=programs
        ),
        name="rms_norm_backward",
        grid=(programs,),
        out_shape=tuple(shapes[name] for name in wanted),
        num_warps=launch.warps_for(block[0] * block[1], per_thread=per_thread),
    )(dy.reshape(rows, width), x.reshape(rows, width), inverse_rms.reshape(rows), weight, *added)
    gradients = dict(zip(wanted, outputs, strict=True))
    if "x" in gradients:
        gradients["x"] = gradients["x"].reshape(x.shape)
    if "weight" in gradients:
        gradients["weight"] = gradients["weight"].sum(axis=0).astype(weight.dtype)
    return gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rms_norm(x, weight, eps, weight_offset):
    return _forward(x, weight, eps, weight_offset, save_inverse_rms=False)[0]


def _rms_norm_forward(x, weight, eps, weight_offset):
    wanted = tuple(name for name, p in (("x", x), ("weight", weight)) if p.perturbed)
    x = x.value
    y, inverse_rms = _forward(x, weight.value, eps, weight_offset, save_inverse_rms=True)
    inverse_rms = checkpoint_name(inverse_rms, "rms_norm_inverse_rms")
    return y, (x, inverse_rms, weight.value, launch.Static(wanted))


def _rms_norm_backward(eps, weight_offset, saved, dy):
    x, inverse_rms, weight, wanted = saved
    gradients = _backward(dy, x, inverse_rms, weight, None, wanted.value, weight_offset)
    return gradients.get("x"), gradients.get("weight")


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward, symbolic_zeros=True)
