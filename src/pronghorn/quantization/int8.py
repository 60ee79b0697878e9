"""INT8 weights as LLM.int8 stores them: one scale a row.

    s_i = max_j |fp16(W_ij)|      q_ij = round(W_ij ((1 / s_i) 127))      W'_ij = (q_ij s_i) (1 / 127)

in fp32, half to even, rounded once to the dtype of the weight. Only the weights: activations stay in 16 bits here, and
no outlier columns are split off, so a product differs from that of LLM.int8 by the rounding of its activations.

Source: Dettmers et al., LLM.int8(), 2022, section 2, https://arxiv.org/abs/2208.07339, and the behaviour of
bitsandbytes 0.50.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.quantization.coded_matrix import CodedMatrix

_OVER_127 = np.float32(7.874015718698502e-3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Array(CodedMatrix):
    """A matrix in 8 bits: a pytree whose leaves may all carry a leading axis, one matrix an entry.

    Attributes:
      codes: int8 `[out, in]`.
      scales: fp32 `[out]`, the largest magnitude of each row.
      dtype_name: of the matrix, such as "bfloat16".
    """

    codes: Any
    scales: Any
    dtype_name: str = dataclasses.field(default="bfloat16", metadata={"static": True})

    def dequantize(self) -> jax.Array:
        """The matrix (or the stack of them)."""
        codes, scales = jnp.asarray(self.codes), jnp.asarray(self.scales)
        return (codes.astype(jnp.float32) * scales[..., None] * _OVER_127).astype(self.dtype)


def quantize_int8(weight: Any) -> Int8Array:
    """An 8-bit copy of a matrix `[out, in]` in bf16, fp16 or fp32; numpy on the host, jax on its device.

    Magnitudes above 65504, which fp16 cannot hold, give infinite scales: check `scales`.
    """
    if isinstance(weight, np.ndarray):
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return _quantize(np, weight)
    return _quantize_on_device(weight)


def empty_like_int8(shape: tuple[int, ...], dtype: Any) -> Int8Array:
    """The `Int8Array` of a matrix of this shape with `jax.ShapeDtypeStruct` leaves: nothing is allocated."""
    rows = math.prod(shape[:-1])
    return Int8Array(
        jax.ShapeDtypeStruct(shape, jnp.int8),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jnp.dtype(dtype).name,
    )


def _quantize(xp: Any, weight: Any) -> Int8Array:
    half = weight.astype(np.float16).astype(np.float32)
    scales = xp.max(xp.abs(half), axis=1)
    # fp16 has no number between 0 and 6e-8, so a reciprocal is a normal number or that of zero.
    factors = xp.where(
        scales > 0, (1 / xp.where(scales > 0, scales, 1)).astype(np.float32) * np.float32(127), 0
    )
    codes = xp.round(half * factors[:, None].astype(np.float32)).astype(np.int8)
    return Int8Array(codes, scales, jnp.dtype(weight.dtype).name)


_quantize_on_device = jax.jit(lambda weight: _quantize(jnp, weight))
