"""One step of Lion whose moment is kept in 8 bits, read, updated and written in one pass.

With g the gradient times `gradient_scale` and m what the codes stand for (blockwise_8bit.py, the map with a sign):

    u = sign(b1 m + (1 - b1) g)        m <- b2 m + (1 - b2) g

in fp32, m rounded to codes again, each block by its own new maximum. Where a moment has rounded to zero only the new
gradient decides the sign, as it does for bitsandbytes (which moves a negative one on to the smallest negative entry).

Bytes an element: the gradient, 2 of codes (1 read, 1 written), the update, and 8 / 256 of scales.

Sources: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, program 1, https://arxiv.org/abs/2302.06675;
Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, https://arxiv.org/abs/2110.02861.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.blockwise_8bit import (
    Blockwise,
    decoded,
    dequantize_blockwise_reference,
    encoded,
    launch_by_blocks,
    lookup_table,
    quantize_blockwise_reference,
    tile_of_program,
)
from pronghorn.pallas_kernels.exact_division import reciprocals


def lion_8bit(
    gradient: jax.Array,
    moment: Blockwise,
    *,
    beta1: float,
    beta2: float,
    gradient_scale: jax.typing.ArrayLike = 1.0,
    applied: jax.typing.ArrayLike = True,
    in_place: bool = True,
    implementation: launch.Implementation | None = None,
) -> tuple[jax.Array, Blockwise]:
    """(update u, moment) after one step; u is fp32 and still to be scaled by minus the learning rate.

    Args:
      gradient: any shape; bf16, fp16 or fp32.
      moment: from the step before; zeros (`zero_moment`) at the start.
      beta1, beta2: see above.
      gradient_scale: fp32 scalar that the gradient is multiplied by.
      applied: bool scalar; where it is false the moment stays as it is, bit for bit, and u is zero.
      in_place: the kernel changes the moment where they are; False for copies that came from the host's memory, which
        XLA would take the result for.
      implementation: "pallas" or "xla" (the oracle); None takes the kernel on a GPU.
    """
    settings = {"beta1": beta1, "beta2": beta2}
    if launch.resolve(implementation) == "xla" or gradient.size == 0:
        return lion_8bit_reference(
            gradient, moment, **settings, gradient_scale=gradient_scale, applied=applied
        )
    scalars = jnp.stack([jnp.asarray(gradient_scale, jnp.float32), jnp.float32(applied)])
    flat = (gradient.size,)
    update, codes, absmax = launch_by_blocks(
        functools.partial(_kernel, **settings, in_place=in_place),
        "lion_8bit",
        gradient.size,
        (
            jax.ShapeDtypeStruct(flat, jnp.float32),
            jax.ShapeDtypeStruct(flat, jnp.uint8),
            jax.ShapeDtypeStruct(moment.absmax.shape, jnp.float32),
        ),
        ({3: 1, 4: 2} if in_place else {}) | ({2: 0} if gradient.dtype == jnp.float32 else {}),
    )(scalars, lookup_table(), gradient.reshape(-1), moment.codes.reshape(-1), moment.absmax)
    return update.reshape(gradient.shape), Blockwise(codes.reshape(gradient.shape), absmax)


def lion_8bit_reference(
    gradient: jax.Array,
    moment: Blockwise,
    *,
    beta1: float,
    beta2: float,
    gradient_scale: jax.typing.ArrayLike = 1.0,
    applied: jax.typing.ArrayLike = True,
) -> tuple[jax.Array, Blockwise]:
    """The oracle of `lion_8bit`."""
    g = gradient.astype(jnp.float32) * gradient_scale
    old = dequantize_blockwise_reference(moment)
    update = jnp.where(applied, jnp.sign(beta1 * old + (1 - beta1) * g), 0.0)
    new = quantize_blockwise_reference(beta2 * old + (1 - beta2) * g)
    return update, jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, moment)


def _kernel(*refs, beta1, beta2, in_place, count, blocks_per_program):
    scalars_ref, table_ref, gradient_ref, codes_ref, absmax_ref = refs[:5]
    update_ref, new_codes_ref, new_absmax_ref = refs[5:]
    tile = tile_of_program(count, blocks_per_program)
    applied = scalars_ref[1] != 0.0

    @pl.when(applied)
    def _():
        g = tile.load(gradient_ref).astype(jnp.float32) * scalars_ref[0]
        codes = tile.load(codes_ref).astype(jnp.int32)
        old = decoded(table_ref, codes, signed=True) * tile.load_scales(absmax_ref)[:, None]
        direction = beta1 * old + (1 - beta1) * g
        sign = (direction > 0).astype(jnp.float32) - (direction < 0).astype(jnp.float32)
        tile.store(update_ref, sign)
        m = tile.existing(beta2 * old + (1 - beta2) * g)
        largest = jnp.max(jnp.abs(m), axis=1)
        tile.store(new_codes_ref, encoded(table_ref, m * reciprocals(largest)[:, None], signed=True))
        tile.store_scales(new_absmax_ref, largest)

    # In place, the moments' outputs are their inputs, and there is nothing to write.
    @pl.when(jnp.logical_not(applied))
    def _():
        tile.store(update_ref, jnp.zeros(tile.elements.shape, jnp.float32))
        if not in_place:
            tile.store(new_codes_ref, tile.load(codes_ref))
            tile.store_scales(new_absmax_ref, tile.load_scales(absmax_ref))
