"""MXFP4 weights as gpt-oss is published in them: a 4-bit float format and one power of two every 32 elements of a row.

    w_k = e2m1(c_k) 2^(s_(k // 32) − 127)        e2m1: a sign, two bits of exponent, one of mantissa: 0, 0.5, .. 4, 6

Codes 8 to 15 are 0 to 7 with a minus, so there are two zeros. A byte holds elements 2 i in its low half and 2 i + 1 in
its high one, the other way round than in NF4. A value has two significant bits, so it is exact in 16 bits wherever
its magnitude is a normal number there; on a device numbers below 2^-126 count as zero. Scale 255 means "not a number".

Such weights are read, never made: their rounding is part of how gpt-oss was trained.

Source: OCP Microscaling Formats (MX) Specification 1.0, 2023, sections 5.3.3, 5.4 and 6.2; Rouhani et al., Microscaling
Data Formats for Deep Learning, 2023, https://arxiv.org/abs/2310.10537.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.quantization.coded_matrix import CodedMatrix

BLOCK = 32
NOT_A_NUMBER = 255
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], np.float32)
# 6 times two to this power is the largest that fp16 holds.
_LARGEST_FP16_SCALE = 127 + 13


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4Array(CodedMatrix):
    """A matrix in MXFP4: a pytree whose leaves may all carry leading axes, one matrix an entry.

    Attributes:
      codes: uint8 `[out, in / 2]`.
      scales: uint8 `[out, in / 32]`, biased exponents.
      dtype_name: of the matrix, such as "bfloat16".
    """

    codes: Any
    scales: Any
    dtype_name: str = dataclasses.field(default="bfloat16", metadata={"static": True})

    @property
    def kind(self) -> str:
        return "mxfp4"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `dequantize` returns."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    def dequantize(self) -> jax.Array:
        """The matrix (or the stack of them)."""
        codes, scales = jnp.asarray(self.codes), jnp.asarray(self.scales).astype(jnp.uint32)
        values = jnp.asarray(E2M1)[jnp.stack([codes & 15, codes >> 4], axis=-1)]
        # The bits of 2^(s - 127) in fp32; the smallest is no normal number.
        bits = jnp.where(scales == 0, jnp.uint32(1 << 22), scales << 23)
        factors = jax.lax.bitcast_convert_type(bits, jnp.float32)
        blocks = values.reshape(*scales.shape, BLOCK) * factors[..., None]
        return blocks.reshape(self.shape).astype(self.dtype)

    def finite(self) -> jax.Array:
        """Whether every value is a finite number of the dtype: bool `[]`."""
        largest = _LARGEST_FP16_SCALE if self.dtype == jnp.float16 else NOT_A_NUMBER - 1
        return jnp.all(self.scales <= largest)


def empty_like_mxfp4(shape: tuple[int, ...], dtype: Any) -> MXFP4Array:
    """The `MXFP4Array` of a matrix (or a stack) of this shape with `jax.ShapeDtypeStruct` leaves."""
    *leading, inner = shape
    return MXFP4Array(
        jax.ShapeDtypeStruct((*leading, inner // 2), jnp.uint8),
        jax.ShapeDtypeStruct((*leading, inner // BLOCK), jnp.uint8),
        jnp.dtype(dtype).name,
    )
