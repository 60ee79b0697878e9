"""Blocks divided by their scales with the same bits on every device, in jax.numpy and inside a kernel alike.

A GPU's own quotient may be two units in the last place off, and which code a value gets hangs on its last bit. With
a = m 2^e, m in [1, 2), Newton steps r + r (1 - m r) mend the reciprocal of m, where 1 - m r is exact: m and r are cut
into halves of twelve bits, whose products need no rounding, so no fused multiply-add changes them. The power of two
goes on the block, exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np

SMALLEST_NORMAL = np.float32(2.0**-126)
LARGEST_INVERTED = np.float32(2.0**126)


def over_scales(blocks: jax.Array, scales: jax.Array) -> jax.Array:
    """`[blocks, b]` times the rounded reciprocals of `[blocks]`, within [-1, 1]; fp32.

    Scales are not negative. One below 2^-126 counts as zero, and its block becomes zeros.
    """
    power, r = _reciprocal_factors(scales)
    return jnp.clip(blocks * power[:, None] * r[:, None], -1.0, 1.0)


def reciprocals(scales: jax.Array) -> jax.Array:
    """The rounded reciprocals of fp32 scales that are not negative; 0 for one that is below 2^-126 or above 2^126."""
    power, r = _reciprocal_factors(scales)
    return jnp.where(scales <= LARGEST_INVERTED, power * r, 0.0)


def _reciprocal_factors(scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A power of two and a number near one, whose product is the reciprocal."""
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    exponent = (bits >> 23).astype(jnp.int32)
    m = jax.lax.bitcast_convert_type((bits & np.uint32(0x007FFFFF)) | np.uint32(0x3F800000), jnp.float32)
    r = _mended_reciprocal(m, _mended_reciprocal(m, 1 / m))
    # Of the largest exponent the power would fall below the normal numbers; a factor of two goes to r instead.
    r = jnp.where(exponent == 254, r / 2, r)
    power_bits = (jnp.maximum(254 - exponent, 1) << 23).astype(jnp.uint32)
    power = jax.lax.bitcast_convert_type(power_bits, jnp.float32)
    return jnp.where(scales < SMALLEST_NORMAL, 0.0, power), r


def _mended_reciprocal(m: jax.Array, r: jax.Array) -> jax.Array:
    (m1, m2), (r1, r2) = _halves(m), _halves(r)
    return r + r * ((((1 - m1 * r1) - m1 * r2) - m2 * r1) - m2 * r2)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFFF000)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high
