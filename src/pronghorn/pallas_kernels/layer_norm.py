"""Layer normalisation of the rows of x, with a bias or without, fused forward and backward.

With m = mean(x), r = 1 / sqrt(mean((x − m)²) + eps) per row, x̂ = (x − m) r and g = weight + weight_offset:

    y  = x̂ g + bias
    dx = r (g dy − mean(g dy) − x̂ mean(x̂ g dy))
    dg = sum over rows of dy x̂
    db = sum over rows of dy

Everything is computed in fp32 and rounded once. Backward reads x and dy once and writes dx; each program adds up its
own rows of dg and db, and the partial sums, one row a program, are added outside: no atomics, so a rerun is bit-exact.

Saved: x itself, m and r (two fp32 a row).
Source: Ba, Kiros and Hinton, Layer Normalization, 2016, equation 4, https://arxiv.org/abs/1607.06450.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch

# Elements of one array a program, elements a thread; as in rms_norm, whose passes these are but for one more sum.
FORWARD = (16384, 64)
BACKWARD = (8192, 32)
MOST_ROWS = 64
# Programs, and so partial sums, of the gradients of weight and bias: see rms_norm.
PARAMETER_GRADIENT_PROGRAMS = 256


def layer_norm(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """(x − mean) / sqrt(variance + eps) · (weight + weight_offset) + bias, over the last axis.

    Args:
      x: [..., d]; bf16, fp16 or fp32.
      weight, bias: [d], any of these dtypes. Each gets a gradient only where it is differentiated.
      eps: added to the variance (the mean of squares, not the unbiased one).
      weight_offset: 1.0 where the checkpoint stores the weight minus one (Nemotron).
      implementation: "pallas", "xla" or None for the platform's default.

    Returns:
      [..., d] in the dtype of x.

    Raises:
      InputError: when weight or bias is not one value a column of x.
    """
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise InputError(
                f"layer_norm: {name} has shape {parameter.shape}, x has {x.shape}; it must be {x.shape[-1:]}."
            )
    if launch.resolve(implementation) == "xla" or x.size == 0:
        return layer_norm_reference(x, weight, bias, eps=eps, weight_offset=weight_offset)
    return _layer_norm(x, weight, bias, float(eps), float(weight_offset))


def layer_norm_reference(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None = None, *, eps: float, weight_offset: float = 0.0
) -> jax.Array:
    """The oracle of `layer_norm`, in plain jax.numpy. Its weight may have more axes, [heads, d]."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = y * (weight.astype(jnp.float32) + weight_offset)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def _forward_kernel(x_ref, weight_ref, *refs, has_bias, eps, weight_offset, block):
    bias_ref, (y_ref, *statistics) = (refs[0], refs[1:]) if has_bias else (None, refs)
    num_rows, width = x_ref.shape
    rows = pl.program_id(0) * block[0] + jnp.arange(block[0])
    columns = jnp.arange(block[1])
    tile = (rows[:, None], columns[None, :])
    mask = launch.in_bounds(x_ref.shape, *tile)
    x = triton.load(x_ref.at[tile], mask=mask, other=0.0).astype(jnp.float32)
    weight = _load(weight_ref, columns) + weight_offset

    mean = jnp.sum(x, axis=1) / width
    centred = jnp.where(mask, x - mean[:, None], 0.0)
    inverse_deviation = jax.lax.rsqrt(jnp.sum(centred * centred, axis=1) / width + eps)
    y = centred * inverse_deviation[:, None] * weight[None, :]
    if bias_ref is not None:
        y += _load(bias_ref, columns)[None, :]

    triton.store(y_ref.at[tile], y.astype(y_ref.dtype), mask=mask)
    for ref, values in zip(statistics, (mean, inverse_deviation), strict=False):
        triton.store(ref.at[rows], values, mask=rows < num_rows)


def _backward_kernel(
    dy_ref, x_ref, mean_ref, inverse_ref, weight_ref, *refs, wanted, weight_offset, block, programs
):
    out = dict(zip(wanted, refs, strict=True))
    num_rows, width = x_ref.shape
    program = pl.program_id(0)
    columns = jnp.arange(block[1])
    weight = _load(weight_ref, columns) + weight_offset
    summed = [name for name in ("weight", "bias") if name in out]

    def one_block(index, sums):
        rows = (index * programs + program) * block[0] + jnp.arange(block[0])
        tile = (rows[:, None], columns[None, :])
        mask = launch.in_bounds(x_ref.shape, *tile)
        # Rows and columns that do not exist count as zeros: they add nothing to any sum below.
        dy = triton.load(dy_ref.at[tile], mask=mask, other=0.0).astype(jnp.float32)
        x = triton.load(x_ref.at[tile], mask=mask, other=0.0).astype(jnp.float32)
        mean = triton.load(mean_ref.at[rows], mask=rows < num_rows, other=0.0)[:, None]
        inverse = triton.load(inverse_ref.at[rows], mask=rows < num_rows, other=0.0)[:, None]
        x_hat = jnp.where(mask, (x - mean) * inverse, 0.0)
        if "x" in out:
            scaled = jnp.where(mask, weight[None, :] * dy, 0.0)
            along = jnp.sum(x_hat * scaled, axis=1, keepdims=True) / width
            dx = inverse * (scaled - jnp.sum(scaled, axis=1, keepdims=True) / width - x_hat * along)
            triton.store(out["x"].at[tile], dx.astype(out["x"].dtype), mask=mask)
        added = {"weight": dy * x_hat, "bias": dy}
        return tuple(total + jnp.sum(added[name], axis=0) for name, total in zip(summed, sums, strict=True))

    zeros = tuple(jnp.zeros(block[1], jnp.float32) for _ in summed)
    if not summed:  # one block a program
        one_block(0, zeros)
        return
    rounds = launch.cdiv(num_rows, block[0] * programs)
    sums = jax.lax.fori_loop(0, rounds, one_block, zeros)
    for name, total in zip(summed, sums, strict=True):
        triton.store(out[name].at[program, columns], total, mask=columns < width)


def _load(ref, columns):
    return triton.load(ref.at[columns], mask=columns < ref.shape[0], other=0.0).astype(jnp.float32)


def _block(rows: int, width: int, elements: int) -> tuple[int, int]:
    """(rows, columns) of one program: whole rows, padded to a power of two."""
    columns = launch.next_power_of_2(width)
    return min(max(1, elements // columns), MOST_ROWS, launch.next_power_of_2(rows)), columns


def _forward(x, weight, bias, eps, weight_offset, *, save_statistics):
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    elements, per_thread = FORWARD
    block = _block(rows, width, elements)
    statistic = jax.ShapeDtypeStruct((rows,), jnp.float32)
    outputs = launch.pallas_call(
        functools.partial(
            _forward_kernel, has_bias=bias is not None, eps=eps, weight_offset=weight_offset, block=block
        ),
        name="layer_norm_forward",
        grid=(launch.cdiv(rows, block[0]),),
        out_shape=(jax.ShapeDtypeStruct((rows, width), x.dtype), *[statistic] * (2 * save_statistics)),
        num_warps=launch.warps_for(block[0] * block[1], per_thread=per_thread),
    )(x.reshape(rows, width), weight, *([] if bias is None else [bias]))
    return outputs[0].reshape(x.shape), *outputs[1:]


def _backward(dy, x, mean, inverse_deviation, weight, bias, wanted, weight_offset):
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    elements, per_thread = BACKWARD
    block = _block(rows, width, elements)
    programs = launch.cdiv(rows, block[0])
    if set(wanted) - {"x"}:
        programs = min(programs, PARAMETER_GRADIENT_PROGRAMS)
    partial = jax.ShapeDtypeStruct((programs, width), jnp.float32)
    shapes = {"x": jax.ShapeDtypeStruct((rows, width), x.dtype), "weight": partial, "bias": partial}
    outputs = launch.pallas_call(
        functools.partial(
            _backward_kernel, wanted=wanted, weight_offset=weight_offset, block=block, programs=programs
        ),
        name="layer_norm_backward",
        grid=(programs,),
        out_shape=tuple(shapes[name] for name in wanted),
        num_warps=launch.warps_for(block[0] * block[1], per_thread=per_thread),
    )(dy.reshape(rows, width), x.reshape(rows, width), mean, inverse_deviation, weight)
    gradients = dict(zip(wanted, outputs, strict=True))
    for name, parameter in (("weight", weight), ("bias", bias)):
        if name in gradients:
            gradients[name] = gradients[name].sum(axis=0).astype(parameter.dtype)
    if "x" in gradients:
        gradients["x"] = gradients["x"].reshape(x.shape)
    return gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x, weight, bias, eps, weight_offset):
    return _forward(x, weight, bias, eps, weight_offset, save_statistics=False)[0]


def _layer_norm_forward(x, weight, bias, eps, weight_offset):
    named = (("x", x), ("weight", weight), ("bias", bias))
    wanted = tuple(name for name, p in named if p is not None and p.perturbed)
    x, weight, bias = (None if p is None else p.value for p in (x, weight, bias))
    y, mean, inverse_deviation = _forward(x, weight, bias, eps, weight_offset, save_statistics=True)
    return y, (x, mean, inverse_deviation, weight, bias, launch.Static(wanted))


def _layer_norm_backward(eps, weight_offset, saved, dy):
    x, mean, inverse_deviation, weight, bias, wanted = saved
    gradients = _backward(dy, x, mean, inverse_deviation, weight, bias, wanted.value, weight_offset)
    return gradients.get("x"), gradients.get("weight"), gradients.get("bias")


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward, symbolic_zeros=True)
