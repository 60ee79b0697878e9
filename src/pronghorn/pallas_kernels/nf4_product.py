"""A few rows times a 4-bit weight, which is read once and never written in 16 bits: what decoding does all day.

With W [out, in] as `nf4_dequantize` has it, its rows whole blocks, T the table and a the scale of a block:

    Y_ro = Σ_j a_oj Σ_k T[c_ojk] x_rjk         k over a block, j over the blocks of a row

A product of few rows takes as long as its weight takes to be read: 4.13 bits an element here, 36.1 where the weight is
dequantised first and multiplied then. Up to `SEPARATE_ROWS` each row is multiplied and added up by itself, in fp32 and
with weights that are not rounded; up to `MOST_ROWS` the weight goes through the tensor cores in the dtype of x, rounded
once as `nf4_dequantize` rounds it. Past that the two-step product wins.

Backward, which decoding does not need, dequantises: dX = dY W. The frozen weight has no gradient.

Source: Dettmers et al., QLoRA, 2023, section 3, https://arxiv.org/abs/2305.14314.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch, tuned
from pronghorn.pallas_kernels.nf4_dequantize import (
    NestedScales,
    load_scales,
    nf4_dequantize,
    nf4_dequantize_reference,
)
from pronghorn.pallas_kernels.tile_operations import ROWS_BY_COLUMNS, ptx, tile_product

SEPARATE_ROWS = 4
MOST_ROWS = 64
# What `tuned` may replace: rows of W a program, elements of each at a time, warps.
SEPARATE_BLOCK = (8, 1024, 4)
TOGETHER_BLOCK = (16, 256, 4)


def nf4_product(
    x: jax.Array,
    codes: jax.Array,
    absmax: jax.Array,
    code_table: jax.Array,
    nested: NestedScales | None = None,
    *,
    shape: tuple[int, int],
    weight_dtype: Any = None,
    dtype: Any = None,
    block_size: int = 64,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """x Wᵀ for a 4-bit W.

    Args:
      x: [..., in]; bf16, fp16 or fp32; at most `MOST_ROWS` rows.
      codes, absmax, code_table, nested, block_size: of W, as in `nf4_dequantize`.
      shape: [out, in] of W; in is a multiple of block_size.
      weight_dtype: what W is rounded to where it is dequantised; that of x by default.
      dtype: of the result; that of x by default.
      implementation: "pallas", "xla" (the oracle), or None: the kernel on a GPU.

    Returns:
      [..., out], summed in fp32.

    Raises:
      InputError: where sizes do not fit each other, or there are too many rows.
    """
    rows = x.size // x.shape[-1] if x.ndim else 0
    if len(shape) != 2 or x.shape[-1:] != (shape[1],) or shape[1] % block_size:
        raise InputError(
            f"nf4_product: weight {shape} must be [out, in] for x of "
            f"{x.shape[-1:]} columns, with rows of whole blocks of "
            f"{block_size}."
        )
    if not 0 < rows <= MOST_ROWS:
        raise InputError(
            f"nf4_product: x has {rows} rows, and 1 to {MOST_ROWS} are taken; dequantise for more."
        )
    weight = (codes, absmax, code_table, nested)
    rounded, dtype = jnp.dtype(weight_dtype or x.dtype), jnp.dtype(dtype or x.dtype)
    if launch.resolve(implementation) == "xla":
        return nf4_product_reference(
            x, *weight, shape=shape, weight_dtype=rounded, dtype=dtype, block_size=block_size
        )
    y = _product(x.reshape(rows, shape[1]), weight, shape, block_size, rounded, dtype)
    return y.reshape(*x.shape[:-1], shape[0])


def nf4_product_reference(
    x: jax.Array,
    codes: jax.Array,
    absmax: jax.Array,
    code_table: jax.Array,
    nested: NestedScales | None = None,
    *,
    shape: tuple[int, int],
    weight_dtype: Any = None,
    dtype: Any = None,
    block_size: int = 64,
) -> jax.Array:
    """The oracle of `nf4_product`: dequantise, then multiply."""
    rounded = jnp.dtype(weight_dtype or x.dtype)
    weight = nf4_dequantize_reference(
        codes, absmax, code_table, nested, shape=shape, dtype=rounded, block_size=block_size
    )
    y = jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(dtype or x.dtype)


def _scales(absmax_ref, nested_refs, outs, blocks, size, per_row):
    """(a [O, J] of some rows of W and some blocks of each, whether they exist, their indices)."""
    exists = (outs[:, None] < size) & (blocks[None, :] < per_row)
    index = outs[:, None] * per_row + blocks[None, :]
    return load_scales(absmax_ref, nested_refs, index, exists), exists, index


def _separate_kernel(
    x_ref, words_ref, absmax_ref, table_ref, *rest, rows, out_rows, blocks_at_a_time, block_size, native
):
    """Every row of x by itself; codes come eight at a time, as int32 words."""
    *nested_refs, y_ref = rest
    size, per_row, words = y_ref.shape[1], x_ref.shape[1] // block_size, block_size // 8
    outs = pl.program_id(0) * out_rows + jnp.arange(out_rows)

    def step(i, sums):
        blocks = i * blocks_at_a_time + jnp.arange(blocks_at_a_time)
        scales, exists, index = _scales(absmax_ref, nested_refs, outs, blocks, size, per_row)
        places = index[:, :, None] * words + jnp.arange(words)[None, None, :]
        packed = triton.load(words_ref.at[places], mask=exists[:, :, None], other=0)
        columns = blocks[:, None] * block_size + 8 * jnp.arange(words)[None, :]
        inside = blocks[:, None] < per_row
        products = [jnp.zeros(packed.shape, jnp.float32)] * rows
        for place in range(8):
            # The bytes of a word from the lowest up; of each the high half first.
            shift = 8 * (place // 2) + (4 if place % 2 == 0 else 0)
            values = triton.load(table_ref.at[(packed >> shift) & 15])
            for row in range(rows):
                x = triton.load(x_ref.at[row, columns + place], mask=inside, other=0.0).astype(jnp.float32)
                products[row] = _multiply_add(values, x[None], products[row], native)
        return tuple(
            total + jnp.sum(product, axis=2) * scales for total, product in zip(sums, products, strict=True)
        )

    start = tuple(jnp.zeros((out_rows, blocks_at_a_time), jnp.float32) for _ in range(rows))
    for row, total in enumerate(jax.lax.fori_loop(0, launch.cdiv(per_row, blocks_at_a_time), step, start)):
        y = jnp.sum(total, axis=1)
        triton.store(y_ref.at[row, outs], y.astype(y_ref.dtype), mask=outs < size)


def _multiply_add(a, b, c, native):
    """a b + c: one instruction, which Triton makes two of if it is not told."""
    if not native:
        return a * b + c
    return ptx("fma.rn.f32 $0, $1, $2, $3;", a, jnp.broadcast_to(b, a.shape), c)


def _together_kernel(
    x_ref,
    codes_ref,
    absmax_ref,
    table_ref,
    *rest,
    padded_rows,
    out_rows,
    blocks_at_a_time,
    block_size,
    native,
):
    """All rows of x through the tensor cores."""
    *nested_refs, y_ref = rest
    rows, size = y_ref.shape
    per_row, half = x_ref.shape[1] // block_size, block_size // 2
    outs = pl.program_id(0) * out_rows + jnp.arange(out_rows)
    width = blocks_at_a_time * block_size
    at = jnp.arange(padded_rows)

    def step(i, total):
        blocks = i * blocks_at_a_time + jnp.arange(blocks_at_a_time)
        scales, exists, index = _scales(absmax_ref, nested_refs, outs, blocks, size, per_row)
        places = index[:, :, None] * half + jnp.arange(half)[None, None, :]
        packed = triton.load(codes_ref.at[places], mask=exists[:, :, None], other=0).astype(jnp.int32)
        high, low = (triton.load(table_ref.at[codes]) for codes in (packed >> 4, packed & 15))
        pairs = jnp.stack([high * scales[:, :, None], low * scales[:, :, None]], axis=-1)
        weight = pairs.reshape(out_rows, width).astype(x_ref.dtype)
        columns = i * width + jnp.arange(width)
        inside = (columns[:, None] < x_ref.shape[1]) & (at[None, :] < rows)
        x = triton.load(x_ref.at[at[None, :], columns[:, None]], mask=inside, other=0.0)
        return total + tile_product(weight, x, ROWS_BY_COLUMNS, native=native)

    start = jnp.zeros((out_rows, padded_rows), jnp.float32)
    total = jax.lax.fori_loop(0, launch.cdiv(per_row, blocks_at_a_time), step, start)
    inside = (outs[:, None] < size) & (at[None, :] < rows)
    triton.store(y_ref.at[at[None, :], outs[:, None]], total.astype(y_ref.dtype), mask=inside)


def _launch(x, weight, shape, block_size, out_dtype):
    codes, absmax, code_table, nested = weight
    rows = x.shape[0]
    separate = rows <= SEPARATE_ROWS
    op = "nf4_product" if separate else "nf4_product_together"
    choice = tuned.choice(op, x.dtype, rows)
    out_rows, width, warps = choice or (SEPARATE_BLOCK if separate else TOGETHER_BLOCK)
    blocks_at_a_time = min(max(1, width // block_size), launch.next_power_of_2(shape[1] // block_size))
    if separate:  # no copy: the same bytes
        codes = jax.lax.bitcast_convert_type(codes.reshape(-1, 4), jnp.int32)
    operands = [x, codes, absmax, code_table]
    if nested is not None:
        operands += [nested.absmax, nested.table, jnp.reshape(nested.offset, (1,))]
    options = {
        "out_rows": out_rows,
        "blocks_at_a_time": blocks_at_a_time,
        "block_size": block_size,
        "native": not launch.interpreting(),
    }
    kernel = (
        functools.partial(_separate_kernel, rows=rows, **options)
        if separate
        else functools.partial(_together_kernel, padded_rows=max(16, launch.next_power_of_2(rows)), **options)
    )
    return launch.pallas_call(
        kernel,
        name="nf4_product",
        grid=(launch.cdiv(shape[0], out_rows),),
        out_shape=jax.ShapeDtypeStruct((rows, shape[0]), out_dtype),
        num_warps=warps,
        num_stages=1,  # with more, Triton would copy the table that values are looked up in through shared memory
    )(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _product(x, weight, shape, block_size, weight_dtype, dtype):
    return _launch(x, weight, shape, block_size, dtype)


def _product_forward(x, weight, shape, block_size, weight_dtype, dtype):
    return _launch(x, weight, shape, block_size, dtype), (weight, launch.Static(x.dtype))


def _product_backward(shape, block_size, weight_dtype, dtype, residuals, dy):
    weight, x_dtype = residuals[0], residuals[1].value
    dense = nf4_dequantize(*weight, shape=shape, dtype=weight_dtype, block_size=block_size).astype(x_dtype)
    dims = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(dy.astype(x_dtype), dense, dims, preferred_element_type=x_dtype), None


_product.defvjp(_product_forward, _product_backward)
