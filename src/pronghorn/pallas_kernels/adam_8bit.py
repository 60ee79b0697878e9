"""One step of Adam whose moments are kept in 8 bits, read, updated and written in one pass.

With g the gradient times `gradient_scale`, m and v what the codes stand for (blockwise_8bit.py: m with a sign, v
without):

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g²        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

in fp32; u is of these m and v, which are then rounded to codes again, each block by its own new maximum. Nearest, as
bitsandbytes does, but for one thing, in the second moment. The smallest entry of its map is 3.25e-7 of the block's
maximum, and what is below half of that would become 0: from then on the update of that element would be m / eps,
a thousand times too large and more (gradients over four decades in a block of 256: 50 steps of bitsandbytes' rule end
78 % of the way off on average, 30 times at worst). Here a second moment that is not zero never gets the code of zero.
So a denominator may be too large by what the map cannot say, sqrt(3.25e-7) = 0.057 % of the block's largest, and an
update too small; never too large for this reason. And bitsandbytes moves a negative first moment that rounds to zero
on to the smallest negative entry, a positive one not; here both are zero.

Bytes an element: the gradient, 4 of codes (2 read, 2 written), the update, and 16 / 256 of scales.

Sources: Kingma and Ba, Adam, 2015, algorithm 1, https://arxiv.org/abs/1412.6980; Dettmers et al., 8-bit Optimizers via
Block-wise Quantization, 2022, https://arxiv.org/abs/2110.02861.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.blockwise_8bit import (
    ZERO_SIGNED,
    Blockwise,
    decoded,
    dequantize_blockwise_reference,
    encoded,
    launch_by_blocks,
    lookup_table,
    num_blocks,
    quantize_blockwise_reference,
    tile_of_program,
)
from pronghorn.pallas_kernels.exact_division import reciprocals


def adam_8bit(
    gradient: jax.Array,
    first: Blockwise,
    second: Blockwise,
    count: jax.Array,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    gradient_scale: jax.typing.ArrayLike = 1.0,
    applied: jax.typing.ArrayLike = True,
    in_place: bool = True,
    implementation: launch.Implementation | None = None,
) -> tuple[jax.Array, Blockwise, Blockwise]:
    """(update u, first moment, second moment) after one step; u is fp32 and still to be scaled by minus the learning
    rate.

    Args:
      gradient: any shape; bf16, fp16 or fp32.
      first, second: the moments, from the step before; zeros (`zero_moment`) at the start.
      count: int32 scalar, steps including this one.
      beta1, beta2, eps: see above.
      gradient_scale: fp32 scalar that the gradient is multiplied by (one over the tokens, clipping).
      applied: bool scalar; where it is false the moments stay as they are, bit for bit, and u is zero.
      in_place: the kernel changes the moments where they are; False for copies that came from the host's memory, which
        XLA would take the result for.
      implementation: "pallas" or "xla" (the oracle); None takes the kernel on a GPU.
    """
    settings = {"beta1": beta1, "beta2": beta2, "eps": eps}
    if launch.resolve(implementation) == "xla" or gradient.size == 0:
        return adam_8bit_reference(
            gradient, first, second, count, **settings, gradient_scale=gradient_scale, applied=applied
        )
    scalars = jnp.stack(
        [jnp.asarray(gradient_scale, jnp.float32), *_corrections(count, beta1, beta2), jnp.float32(applied)]
    )
    flat = (gradient.size,)
    shapes = [jax.ShapeDtypeStruct(flat, jnp.float32)]
    for moment in (first, second):
        shapes += [
            jax.ShapeDtypeStruct(flat, jnp.uint8),
            jax.ShapeDtypeStruct(moment.absmax.shape, jnp.float32),
        ]
    # Moments change in place; so does a gradient that has the update's dtype.
    aliases = ({3: 1, 4: 2, 5: 3, 6: 4} if in_place else {}) | (
        {2: 0} if gradient.dtype == jnp.float32 else {}
    )
    update, *moments = launch_by_blocks(
        functools.partial(_kernel, **settings, in_place=in_place),
        "adam_8bit",
        gradient.size,
        tuple(shapes),
        aliases,
    )(
        scalars,
        lookup_table(),
        gradient.reshape(-1),
        *(first.codes.reshape(-1), first.absmax),
        *(second.codes.reshape(-1), second.absmax),
    )
    shape = gradient.shape
    return (
        update.reshape(shape),
        Blockwise(moments[0].reshape(shape), moments[1]),
        Blockwise(moments[2].reshape(shape), moments[3]),
    )


def adam_8bit_reference(
    gradient: jax.Array,
    first: Blockwise,
    second: Blockwise,
    count: jax.Array,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    gradient_scale: jax.typing.ArrayLike = 1.0,
    applied: jax.typing.ArrayLike = True,
) -> tuple[jax.Array, Blockwise, Blockwise]:
    """The oracle of `adam_8bit`."""
    g = gradient.astype(jnp.float32) * gradient_scale
    m = beta1 * dequantize_blockwise_reference(first, signed=True) + (1 - beta1) * g
    v = beta2 * dequantize_blockwise_reference(second, signed=False) + (1 - beta2) * g * g
    one, other = _corrections(count, beta1, beta2)
    update = jnp.where(applied, m * one / (jnp.sqrt(v * other) + eps), 0.0)
    new_first = quantize_blockwise_reference(m, signed=True)
    codes, absmax = quantize_blockwise_reference(v, signed=False)
    new_second = Blockwise(jnp.where((codes == 0) & (v > 0), jnp.uint8(1), codes), absmax)
    new, old = (new_first, new_second), (first, second)
    return update, *jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)


def zero_moment(shape: tuple[int, ...], *, signed: bool) -> Blockwise:
    """A moment of zeros: the code of zero, and scales of zero."""
    zero = ZERO_SIGNED if signed else 0
    return Blockwise(jnp.full(shape, zero, jnp.uint8), jnp.zeros(num_blocks(math.prod(shape)), jnp.float32))


def _corrections(count, beta1, beta2):
    """1 / (1 - b1^t) and 1 / (1 - b2^t), fp32."""
    t = jnp.asarray(count, jnp.float32)
    return 1 / (1 - jnp.power(jnp.float32(beta1), t)), 1 / (1 - jnp.power(jnp.float32(beta2), t))


def _kernel(*refs, beta1, beta2, eps, in_place, count, blocks_per_program):
    scalars_ref, table_ref, gradient_ref, first_ref, first_max_ref, second_ref, second_max_ref = refs[:7]
    update_ref, new_first_ref, new_first_max_ref, new_second_ref, new_second_max_ref = refs[7:]
    tile = tile_of_program(count, blocks_per_program)
    applied = scalars_ref[3] != 0.0

    @pl.when(applied)
    def _():
        g = tile.load(gradient_ref).astype(jnp.float32) * scalars_ref[0]
        first_codes = tile.load(first_ref).astype(jnp.int32)
        second_codes = tile.load(second_ref).astype(jnp.int32)
        first_max, second_max = tile.load_scales(first_max_ref), tile.load_scales(second_max_ref)
        old_m = decoded(table_ref, first_codes, signed=True) * first_max[:, None]
        old_v = decoded(table_ref, second_codes, signed=False) * second_max[:, None]
        m = tile.existing(beta1 * old_m + (1 - beta1) * g)
        v = beta2 * old_v + (1 - beta2) * g * g
        tile.store(update_ref, m * scalars_ref[1] / (jnp.sqrt(v * scalars_ref[2]) + eps))

        largest = jnp.max(jnp.abs(m), axis=1)
        tile.store(new_first_ref, encoded(table_ref, m * reciprocals(largest)[:, None], signed=True))
        tile.store_scales(new_first_max_ref, largest)

        largest = jnp.max(v, axis=1)
        codes = encoded(table_ref, v * reciprocals(largest)[:, None], signed=False)
        tile.store(new_second_ref, jnp.maximum(codes, (v > 0).astype(jnp.int32)))
        tile.store_scales(new_second_max_ref, largest)

    # In place, the moments' outputs are their inputs, and there is nothing to write.
    @pl.when(jnp.logical_not(applied))
    def _():
        tile.store(update_ref, jnp.zeros(tile.elements.shape, jnp.float32))
        if not in_place:
            tile.store(new_first_ref, tile.load(first_ref))
            tile.store_scales(new_first_max_ref, tile.load_scales(first_max_ref))
            tile.store(new_second_ref, tile.load(second_ref))
            tile.store_scales(new_second_max_ref, tile.load_scales(second_max_ref))
