"""Dependencies that make XLA compute one thing before another.

Its scheduler sees data alone: `jax.lax.optimization_barrier` holds off its simplifications and is gone by the time it
schedules. So an array can be made to depend on others through bits that are zero, which XLA does not know.
"""

from typing import Any

import jax
import jax.numpy as jnp


def zero_after(arrays: Any) -> jax.Array:
    """uint32 zero, there no sooner than every array of the pytree is computed."""
    zero = jax.lax.optimization_barrier(jnp.uint32(0))
    found = zero
    for array in jax.tree.leaves(arrays):
        first = array[(0,) * array.ndim].astype(jnp.float32)
        found |= jax.lax.bitcast_convert_type(first, jnp.uint32) & zero
    return found


def same_after(zero: jax.Array, array: jax.Array) -> jax.Array:
    """`array` of floats or unsigned integers, bit for bit, there no sooner than `zero`: one pass over it."""
    bits = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    same = jax.lax.bitcast_convert_type(array, bits) ^ zero.astype(bits)
    return jax.lax.bitcast_convert_type(same, array.dtype)
