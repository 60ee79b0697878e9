"""What kernels do to tiles that Pallas has no word for: exact products of fp32, tiles ahead, a GPU's instructions."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton

ROWS_BY_COLUMNS = ((1,), (0,))  # a b
ROWS_BY_ROWS = ((1,), (1,))  # a bᵀ
COLUMNS_BY_COLUMNS = ((0,), (0,))  # aᵀ b


def tile_product(a: jax.Array, b: jax.Array, contract, *, native: bool) -> jax.Array:
    """2-D product accumulated in fp32. fp32 operands keep fp32's precision, never a single tf32 product's.

    Three tf32 products keep 22 of 24 bits of each operand and run on tensor cores, where Triton's product in true fp32
    takes minutes to compile at head dim 256 and lives in spilled registers.

    Args:
      contract: one of the pairs above.
      native: compiled for a GPU and not interpreted: tf32 products exist.
    """
    precision: lax.PrecisionLike = lax.Precision.DEFAULT
    if a.dtype == jnp.float32:
        precision = lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if native else lax.Precision.HIGHEST
    return lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def ptx(code: str, *arguments: jax.Array) -> jax.Array:
    """PTX for each element of fp32 arguments of one shape; not for interpreted kernels."""
    (result,) = triton.elementwise_inline_asm(
        code,
        args=list(arguments),
        constraints="=f" + ",f" * len(arguments),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arguments[0].shape, jnp.float32)],
    )
    return result


def over_tiles(rounds: int, load, work, start, ahead: bool | int):
    """work(index, load(index), sums) -> sums, one after the other; `ahead` loads a tile while another is worked on."""
    if not ahead or not rounds:
        return lax.fori_loop(0, rounds, lambda index, sums: work(index, load(index), sums), start)

    def one(index, carry):
        sums, tiles = carry
        following = load(jnp.minimum(index + 1, rounds - 1))
        return work(index, tiles, sums), following

    return lax.fori_loop(0, rounds, one, (start, load(0)))[0]
