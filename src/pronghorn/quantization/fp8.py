"""FP8 weights: an 8-bit float format (e4m3) and fp32 scales, multiplied in FP8 where the device can.

    s = 2^k, the smallest for which max|W| / s <= 448       Wq = e4m3(W / s)       W' = s Wq

One scale serves a whole tensor: a float format keeps its precision under a scale that is too large, down to 2^-14 of
the largest value. Scales a row, or a block of 128 x 128 as in published checkpoints, are there as well. Ours are powers
of two, so that W' is exact in 16 bits; those of a checkpoint are what they are.

In a product activations are rounded too, to e4m3, and gradients to e4m3 or e5m2: see `pallas_kernels/fp8_product`.
Weights with scales a block are dequantised in front of a product of 16-bit arrays: that saves memory, not time.

Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022, https://arxiv.org/abs/2209.05433.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.pallas_kernels.fp8_product import dequantize, fp8_times, fp8_times_transposed
from pronghorn.pallas_kernels.fp8_quantize import (
    BLOCK,
    fp8_quantize,
    power_of_two_scale,
    round_to_fp8,
    spread,
)
from pronghorn.quantization.coded_matrix import CodedMatrix

Scales = Literal["tensor", "row", "block"]
Gradients = Literal["e4m3", "e5m2", "unrounded"]
Activations = Literal["e4m3", "unrounded"]
CODE_DTYPE = jnp.dtype(jnp.float8_e4m3fn)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP8Array(CodedMatrix):
    """A matrix in FP8: a pytree whose leaves may all carry a leading axis, one matrix an entry.

    Attributes:
      codes: float8_e4m3fn `[out, in]`.
      scales: fp32 `[]`, `[out]`, or `[ceil(out / 128), ceil(in / 128)]`.
      dtype_name: of the matrix, such as "bfloat16".
      gradients: what a gradient is rounded to where it is multiplied with the matrix: "e4m3", "e5m2", or "unrounded"
        for a product in 16 bits with the dequantised matrix.
      activations: the same of what is multiplied with it in forward: "e4m3" or "unrounded".
    """

    codes: Any
    scales: Any
    dtype_name: str = dataclasses.field(default="bfloat16", metadata={"static": True})
    gradients: Gradients = dataclasses.field(default="e4m3", metadata={"static": True})
    activations: Activations = dataclasses.field(default="e4m3", metadata={"static": True})

    @property
    def kind(self) -> str:
        return "fp8"

    def dequantize(self) -> jax.Array:
        """The matrix (or the stack of them)."""
        if self.codes.ndim > 2:
            return jax.vmap(FP8Array.dequantize)(self)
        codes, scales = jnp.asarray(self.codes), jnp.asarray(self.scales)
        if scales.ndim == 2:
            return (codes.astype(jnp.float32) * spread(scales, codes.shape)).astype(self.dtype)
        return dequantize(codes, scales, self.dtype)

    def times_transposed(self, x: jax.Array, dtype: Any, largest: jax.Array | None = None) -> jax.Array:
        """x [..., in] Wᵀ -> [..., out] in `dtype`; `largest` as in `fp8_times_transposed`."""
        if self.scales.ndim == 2 or self.activations == "unrounded":
            return _dot(x, self.dequantize().astype(x.dtype), 1, dtype)
        return fp8_times_transposed(
            x,
            self.codes,
            self.scales,
            gradient_format=self._gradient_format,
            dtype=dtype,
            largest=largest,
        )

    def times(self, y: jax.Array, dtype: Any, largest: jax.Array | None = None) -> jax.Array:
        """y [..., out] W -> [..., in] in `dtype`: what a gradient is multiplied with."""
        if self.scales.ndim == 2 or self.gradients == "unrounded":
            return _dot(y, self.dequantize().astype(y.dtype), 0, dtype)
        return fp8_times(y, self.codes, self.scales, format=self.gradients, dtype=dtype, largest=largest)

    @property
    def _gradient_format(self) -> Any:
        return None if self.gradients == "unrounded" else self.gradients


def unrounded(value: Any) -> Any:
    """An FP8 weight whose products are those of its dequantised matrix; anything else as it is."""
    if isinstance(value, FP8Array):
        return dataclasses.replace(value, gradients="unrounded", activations="unrounded")
    return value


def quantize_fp8(weight: Any, *, scales: Scales = "tensor", **products: Any) -> FP8Array:
    """An FP8 copy of a matrix `[out, in]` in bf16, fp16 or fp32; numpy on the host, jax on its device.

    `products` are the `gradients` and `activations` of `FP8Array`. A value that is not finite makes a scale NaN: check
    `scales`.
    """
    if isinstance(weight, np.ndarray):
        with np.errstate(invalid="ignore", over="ignore"):
            codes, factors = _quantize_on_host(weight, scales)
    else:
        codes, factors = _quantize_on_device(weight, scales)
    return FP8Array(codes, factors, jnp.dtype(weight.dtype).name, **products)


def empty_like_fp8(
    shape: tuple[int, ...], dtype: Any, *, scales: Scales = "tensor", **products: Any
) -> FP8Array:
    """The `FP8Array` of a matrix of this shape with `jax.ShapeDtypeStruct` leaves: nothing is allocated."""
    blocks = tuple(-(-size // BLOCK) for size in shape)
    of_scales = {"tensor": (), "row": shape[:1], "block": blocks}[scales]
    return FP8Array(
        jax.ShapeDtypeStruct(shape, CODE_DTYPE),
        jax.ShapeDtypeStruct(of_scales, jnp.float32),
        jnp.dtype(dtype).name,
        **products,
    )


def _quantize_on_host(weight: np.ndarray, scales: Scales) -> tuple[Any, Any]:
    wide = weight.astype(np.float32)
    magnitudes = np.abs(wide)
    if scales == "tensor":
        largest: Any = np.max(magnitudes)
    elif scales == "row":
        largest = np.max(magnitudes, axis=1)
    else:
        rows, columns = (-(-size // BLOCK) for size in weight.shape)
        padding = [
            (0, count * BLOCK - size) for count, size in zip((rows, columns), weight.shape, strict=True)
        ]
        largest = np.max(np.pad(magnitudes, padding).reshape(rows, BLOCK, columns, BLOCK), axis=(1, 3))
    factors, inverses = power_of_two_scale(largest, "e4m3")
    if scales == "row":
        inverses = inverses[:, None]
    elif scales == "block":
        inverses = spread(inverses, weight.shape)
    return (wide * inverses).astype(CODE_DTYPE), factors


@functools.partial(jax.jit, static_argnums=1)
def _quantize_on_device(weight: jax.Array, scales: Scales) -> tuple[jax.Array, jax.Array]:
    return round_to_fp8(weight) if scales == "tensor" else fp8_quantize(weight, scales)


def _dot(x: jax.Array, weight: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """x [..., k] times a matrix, contracted over one axis of it."""
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, preferred_element_type=dtype)
