"""A 4-bit weight back to 16 bits in one pass over memory, the 8-bit scales of its blocks included.

A weight of n elements, row by row, in blocks of `block_size` b. Byte i holds the codes of elements 2 i (high four bits)
and 2 i + 1 (low four bits); T is the table of 16 values, a_j the scale of block j:

    w_k = T[c_k] a_(k // b)                                        in fp32, rounded once to the dtype asked for
    a_j = absmax_j                                                 scales kept in fp32, or
    a_j = D[absmax_j] m_(j // 256) + o                             in 8 bits: table D, maxima m, one offset o

the arithmetic of bitsandbytes, to the bit. The product of a_j is rounded before o is added, as there: the compiler must
not make one fused multiply-add of the two. A frozen weight has no gradient, so this op has none.

Weights that are multiplied as one are written into one array to begin with: stacked afterwards, they would be copied.

Source: Dettmers et al., QLoRA, 2023, section 3, https://arxiv.org/abs/2305.14314.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch, tuned

NESTED_BLOCK = 256
# What `tuned` may replace: elements a program, elements a thread. With 8 a thread (4 bytes in, 16 bytes out) loads and
# stores are coalesced in one layout; more a thread, and values take a detour through shared memory between the two.
BLOCK = (2048, 8)


class NestedScales(NamedTuple):
    """Scales that are codes themselves.

    Attributes:
      absmax: fp32 [ceil(blocks / 256)], m.
      table: fp32 [256], D.
      offset: fp32 [], o.
    """

    absmax: Any
    table: Any
    offset: Any


class CodedWeight(NamedTuple):
    """One weight, as `nf4_dequantize` takes it."""

    codes: jax.Array
    absmax: jax.Array
    code_table: jax.Array
    nested: NestedScales | None = None


def nf4_dequantize(
    codes: jax.Array,
    absmax: jax.Array,
    code_table: jax.Array,
    nested: NestedScales | None = None,
    *,
    shape: tuple[int, ...],
    dtype: Any,
    block_size: int = 64,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """The weight that 4-bit codes stand for.

    Args:
      codes: uint8 [ceil(n / 2)], two codes a byte.
      absmax: fp32 [ceil(n / block_size)], or uint8 where `nested` is given.
      code_table: fp32 [16], of NF4, FP4 or any other code.
      nested: what 8-bit absmax mean.
      shape: of the weight, n elements.
      dtype: bf16, fp16 or fp32.
      block_size: a power of two.
      implementation: "pallas" or "xla" (the oracle); None takes the kernel on a GPU.

    Raises:
      InputError: where sizes do not fit each other.
    """
    coded = CodedWeight(codes, absmax, code_table, nested)
    return nf4_dequantize_stacked(
        (coded,), shape=shape, dtype=dtype, block_size=block_size, implementation=implementation
    ).reshape(shape)


def nf4_dequantize_stacked(
    weights: Sequence[CodedWeight],
    *,
    shape: tuple[int, ...],
    dtype: Any,
    block_size: int = 64,
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """The weights [n, *shape] that n sets of 4-bit codes stand for, in one launch; each as `nf4_dequantize` has it.

    Args:
      weights: n of them, all with nested scales or none.
      shape, dtype, block_size, implementation: as in `nf4_dequantize`, of each.

    Raises:
      InputError: where sizes do not fit each other.
    """
    for coded in weights:
        _check(coded, shape, block_size)
    if launch.resolve(implementation) == "xla":
        return jnp.stack(
            [
                nf4_dequantize_reference(*coded, shape=shape, dtype=dtype, block_size=block_size)
                for coded in weights
            ]
        )
    return _launch(weights, shape, jnp.dtype(dtype), block_size)


def _check(coded, shape, block_size):
    codes, absmax, _, nested = coded
    count = math.prod(shape)
    blocks = launch.cdiv(count, block_size)
    if block_size < 2 or block_size & (block_size - 1):
        raise InputError(f"nf4_dequantize: block_size={block_size} must be a power of two.")
    if codes.shape != (launch.cdiv(count, 2),) or absmax.shape != (blocks,):
        raise InputError(
            f"nf4_dequantize: codes {codes.shape} and absmax {absmax.shape} must be ({launch.cdiv(count, 2)},) and "
            f"({blocks},) for a weight {shape} in blocks of {block_size}."
        )
    if nested is not None and nested.absmax.shape != (launch.cdiv(blocks, NESTED_BLOCK),):
        raise InputError(
            f"nf4_dequantize: nested absmax {nested.absmax.shape} must be ({launch.cdiv(blocks, NESTED_BLOCK)},) for "
            f"{blocks} blocks."
        )


def nf4_dequantize_reference(
    codes: jax.Array,
    absmax: jax.Array,
    code_table: jax.Array,
    nested: NestedScales | None = None,
    *,
    shape: tuple[int, ...],
    dtype: Any,
    block_size: int = 64,
) -> jax.Array:
    """The oracle of `nf4_dequantize`: the formula in jax.numpy."""
    count, blocks = math.prod(shape), absmax.shape[0]
    scales = block_scales(absmax, nested)
    values = code_table[jnp.stack([codes >> 4, codes & 15], axis=-1)].reshape(-1)[:count]
    values = jnp.pad(values, (0, blocks * block_size - count)).reshape(blocks, block_size)
    return (values * scales[:, None]).reshape(-1)[:count].reshape(shape).astype(dtype)


def block_scales(absmax: jax.Array, nested: NestedScales | None) -> jax.Array:
    """a, fp32 [blocks]."""
    if nested is None:
        return absmax.astype(jnp.float32)
    maxima = jnp.repeat(
        nested.absmax, NESTED_BLOCK, total_repeat_length=NESTED_BLOCK * nested.absmax.shape[0]
    )
    return _plus_offset(nested.table[absmax], maxima[: absmax.shape[0]], nested.offset)


def _plus_offset(values, maxima, offset):
    """values maxima + offset, each rounded.

    A maximum has no sign, which no compiler knows: with its sign bit worked into the last bit of the product there is
    nothing left to fuse.
    """
    bits = jax.lax.bitcast_convert_type(values * maxima, jnp.uint32)
    sign = jax.lax.bitcast_convert_type(maxima, jnp.uint32) >> 31
    return jax.lax.bitcast_convert_type(bits | sign, jnp.float32) + offset


def load_scales(absmax_ref, nested_refs, blocks, exists):
    """Inside of a kernel: a of these blocks, fp32; `nested_refs` are m, D and o, or nothing."""
    if not nested_refs:
        return triton.load(absmax_ref.at[blocks], mask=exists, other=0.0)
    maxima_ref, scale_table_ref, offset_ref = nested_refs
    codes = triton.load(absmax_ref.at[blocks], mask=exists, other=0).astype(jnp.int32)
    maxima = triton.load(maxima_ref.at[blocks >> 8], mask=exists, other=0.0)
    return _plus_offset(triton.load(scale_table_ref.at[codes]), maxima, offset_ref[0])


def _kernel(*refs, block_size, blocks_per_program, programs, count, weights):
    *inputs, out_ref = refs
    fields, program = len(inputs) // weights, pl.program_id(0)

    def from_weight(place):
        """What the programs of this weight and of those behind it do, by branches of one choice: ptxas takes no more
        registers then than for one weight, and a quarter more for conditions beside each other."""

        def this():
            blocks = (program - place * programs) * blocks_per_program + jnp.arange(blocks_per_program)
            operands = inputs[place * fields : (place + 1) * fields]
            _weight(operands, out_ref, blocks, place * count, block_size=block_size, count=count)

        if place + 1 == weights:
            this()
        else:
            jax.lax.cond(program < (place + 1) * programs, this, lambda: from_weight(place + 1))

    from_weight(0)


def _weight(inputs, out_ref, blocks, first, *, block_size, count):
    """These blocks of one weight, whose elements are written from `first` on."""
    codes_ref, absmax_ref, code_table_ref, *nested_refs = inputs
    scales = load_scales(absmax_ref, nested_refs, blocks, blocks < absmax_ref.shape[0])

    places = blocks[:, None] * (block_size // 2) + jnp.arange(block_size // 2)[None, :]
    packed = triton.load(codes_ref.at[places], mask=places < codes_ref.shape[0], other=0).astype(jnp.int32)
    high = triton.load(code_table_ref.at[packed >> 4]) * scales[:, None]
    low = triton.load(code_table_ref.at[packed & 15]) * scales[:, None]
    values = jnp.stack([high, low], axis=-1).reshape(blocks.shape[0], block_size)
    elements = blocks[:, None] * block_size + jnp.arange(block_size)[None, :]
    triton.store(out_ref.at[first + elements], values.astype(out_ref.dtype), mask=elements < count)


def _launch(weights, shape, dtype, block_size):
    count, blocks = math.prod(shape), weights[0].absmax.shape[0]
    elements, per_thread = tuned.choice("nf4_dequantize", dtype, block_size) or BLOCK
    blocks_per_program = min(max(1, elements // block_size), launch.next_power_of_2(blocks))
    programs = launch.cdiv(blocks, blocks_per_program)
    operands = []
    for codes, absmax, code_table, nested in weights:
        operands += [codes, absmax, code_table]
        if nested is not None:
            operands += [nested.absmax, nested.table, jnp.reshape(nested.offset, (1,))]
    flat = launch.pallas_call(
        functools.partial(
            _kernel,
            block_size=block_size,
            blocks_per_program=blocks_per_program,
            programs=programs,
            count=count,
            weights=len(weights),
        ),
        name="nf4_dequantize",
        grid=(len(weights) * programs,),
        out_shape=jax.ShapeDtypeStruct((len(weights) * count,), dtype),
        num_warps=launch.warps_for(blocks_per_program * block_size, per_thread=per_thread),
    )(*operands)
    return flat.reshape(len(weights), *shape)
