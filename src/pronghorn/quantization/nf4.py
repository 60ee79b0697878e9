"""NF4 and FP4 as bitsandbytes stores them, bit for bit, with their scales in 32 bits or in 8 ("double quantisation").

A weight is read row by row in blocks of b elements. With T the sorted table of 16 values and t its 15 midpoints:

    a = max |w|      x = clip(w / a, -1, 1)      code = number of t below x      w' = T[code] a
    o = mean(a)      m = max |a - o| over 256    scale code = number of midpoints of D below (a - o) / m

Quotients are products with the rounded reciprocal, as there; only a last, partial block is divided. Two codes share a
byte, the first in the high bits. The 8-bit scales follow the rule of bitsandbytes on a GPU; its CPU code looks values
up on a grid of 65,536 points and departs from its own GPU code in up to 0.2 % of them, by one.

The same function runs on numpy and on jax arrays, with the same codes. On a device numbers below 2^-126 count as zero,
so a block whose largest element is below about 1e-35, or above 8e37 where its reciprocal is such a number, may have
other codes there.

Sources: Dettmers et al., QLoRA, 2023, section 3, https://arxiv.org/abs/2305.14314, and the behaviour of bitsandbytes
0.50.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.exact_division import SMALLEST_NORMAL, over_scales
from pronghorn.pallas_kernels.nf4_dequantize import (
    NESTED_BLOCK,
    CodedWeight,
    NestedScales,
    nf4_dequantize,
    nf4_dequantize_stacked,
)
from pronghorn.pallas_kernels.nf4_product import MOST_ROWS, nf4_product
from pronghorn.quantization.coded_matrix import CodedMatrix
from pronghorn.quantization.tables import (
    CODE_MIDPOINTS,
    CODE_ORDER,
    CODE_TABLES,
    DYNAMIC_SIGNED,
    DYNAMIC_SIGNED_MIDPOINTS,
)

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4Array(CodedMatrix):
    """A matrix in 4 bits: a pytree whose leaves may all carry a leading axis, one matrix an entry, for `lax.scan`.

    Attributes:
      codes: uint8 `[ceil(n / 2)]`.
      absmax: fp32 `[blocks]`, or uint8 where scales are nested.
      nested_absmax: fp32 `[ceil(blocks / 256)]`, or None.
      nested_table: fp32 `[256]`, or None. A file brings its own.
      nested_offset: fp32 `[]`, or None.
      matrix_shape: of one matrix, n elements.
      dtype_name: of the matrix, such as "bfloat16".
      kind: "nf4" or "fp4".
      block_size: elements a scale.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any = None
    nested_table: Any = None
    nested_offset: Any = None
    matrix_shape: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    dtype_name: str = dataclasses.field(default="bfloat16", metadata={"static": True})
    kind: str = dataclasses.field(default="nf4", metadata={"static": True})
    block_size: int = dataclasses.field(default=DEFAULT_BLOCK, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `dequantize` returns."""
        return (*self.codes.shape[:-1], *self.matrix_shape)

    @property
    def nested(self) -> bool:
        """Whether scales are kept in 8 bits."""
        return self.nested_absmax is not None

    def dequantize(self) -> jax.Array:
        """The matrix (or the stack of them), each value rounded once from fp32."""
        if self.codes.ndim > 1:
            return jax.vmap(NF4Array.dequantize)(self)
        return nf4_dequantize(
            *self._parts(), shape=self.matrix_shape, dtype=self.dtype, block_size=self.block_size
        )

    def dequantize_above(self, *others: "NF4Array") -> jax.Array:
        """This matrix `[out, in]` and below it those of `others`, alike, as one `[n out, in]`; or the stack of such."""
        arrays = (self, *others)
        if self.codes.ndim > 1:
            return jax.vmap(NF4Array.dequantize_above)(*arrays)
        out, inner = self.matrix_shape
        return nf4_dequantize_stacked(
            [array._parts() for array in arrays],
            shape=self.matrix_shape,
            dtype=self.dtype,
            block_size=self.block_size,
        ).reshape(len(arrays) * out, inner)

    def product(self, x: jax.Array, dtype: Any) -> jax.Array:
        """x [..., in] Wᵀ: few rows by a kernel that reads the codes, more by a matrix that is dequantised first."""
        rows = math.prod(x.shape[:-1])
        out, inner = self.matrix_shape
        if not 0 < rows <= MOST_ROWS or inner % self.block_size or x.dtype != self.dtype:
            weight = self.dequantize().astype(x.dtype)
            dims = (((x.ndim - 1,), (1,)), ((), ()))
            return jax.lax.dot_general(x, weight, dims, preferred_element_type=dtype)
        return nf4_product(x, *self._parts(), shape=(out, inner), dtype=dtype, block_size=self.block_size)

    def _parts(self) -> CodedWeight:
        """codes, absmax, table and nested scales, as the kernels take them."""
        nested = None
        if self.nested:
            nested = NestedScales(
                jnp.asarray(self.nested_absmax),
                jnp.asarray(self.nested_table),
                jnp.asarray(self.nested_offset),
            )
        table = jnp.asarray(CODE_TABLES[self.kind])
        return CodedWeight(jnp.asarray(self.codes), jnp.asarray(self.absmax), table, nested)


def quantize_4bit(
    weight: Any, *, kind: str = "nf4", nested: bool = True, block_size: int = DEFAULT_BLOCK
) -> NF4Array:
    """A 4-bit copy of a weight.

    Args:
      weight: of any shape; bf16, fp16 or fp32. A numpy array is quantised on the host, a jax array on its device.
      kind: "nf4" or "fp4".
      nested: keep the scales in 8 bits.
      block_size: one of `BLOCK_SIZES`.

    Raises:
      InputError: an unknown kind or block size.
    """
    if kind not in CODE_TABLES:
        raise InputError(f"quantization kind {kind!r} is not known; use one of {', '.join(CODE_TABLES)}.")
    if block_size not in BLOCK_SIZES:
        raise InputError(
            f"block_size={block_size} is not known; use one of {', '.join(map(str, BLOCK_SIZES))}."
        )
    if isinstance(weight, np.ndarray):
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return _quantize(np, weight, kind, nested, block_size)
    return _quantize_on_device(weight, kind, nested, block_size)


def empty_like_4bit(
    shape: tuple[int, ...],
    dtype: Any,
    *,
    kind: str = "nf4",
    nested: bool = True,
    block_size: int = DEFAULT_BLOCK,
) -> NF4Array:
    """The `NF4Array` of a weight of this shape with `jax.ShapeDtypeStruct` leaves: nothing is allocated."""
    blocks = math.ceil(math.prod(shape) / block_size)
    leaves: dict[str, Any] = {"absmax": jax.ShapeDtypeStruct((blocks,), jnp.float32)}
    if nested:
        leaves = {
            "absmax": jax.ShapeDtypeStruct((blocks,), jnp.uint8),
            "nested_absmax": jax.ShapeDtypeStruct((math.ceil(blocks / NESTED_BLOCK),), jnp.float32),
            "nested_table": jax.ShapeDtypeStruct((256,), jnp.float32),
            "nested_offset": jax.ShapeDtypeStruct((), jnp.float32),
        }
    codes = jax.ShapeDtypeStruct((math.ceil(math.prod(shape) / 2),), jnp.uint8)
    return NF4Array(codes, **leaves, **_static(shape, dtype, kind, block_size))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize_on_device(weight, kind, nested, block_size):
    return _quantize(jnp, weight, kind, nested, block_size)


def _static(shape, dtype, kind, block_size) -> dict[str, Any]:
    return {
        "matrix_shape": tuple(shape),
        "dtype_name": jnp.dtype(dtype).name,
        "kind": kind,
        "block_size": block_size,
    }


def _quantize(xp: Any, weight: Any, kind: str, nested: bool, block_size: int) -> NF4Array:
    """The rule; `xp` is numpy or jax.numpy."""
    flat = weight.reshape(-1).astype(np.float32)
    whole = flat.size // block_size * block_size
    blocks = flat[:whole].reshape(-1, block_size)
    absmax = xp.max(xp.abs(blocks), axis=1)
    scaled = _over_scales(xp, blocks, absmax).reshape(-1)
    if whole < flat.size:
        # A block of zeros at the end is the one whose scale bitsandbytes raises above zero.
        last = xp.maximum(xp.max(xp.abs(flat[whole:])), np.float32(1e-38))
        quotients = xp.clip(xp.where(last < SMALLEST_NORMAL, 0, flat[whole:] / last), -1, 1)
        absmax = xp.concatenate([absmax, last[None]])
        scaled = xp.concatenate([scaled, quotients.astype(np.float32)])
    if scaled.size % 2:
        scaled = xp.pad(scaled, (0, 1))
    codes = _rank(xp, CODE_MIDPOINTS[kind], scaled)
    if kind != "nf4":
        codes = xp.asarray(CODE_ORDER[kind])[codes]
    scales = _nest(xp, absmax) if nested else {"absmax": absmax}
    return NF4Array(
        (codes[0::2] << 4) | codes[1::2], **scales, **_static(weight.shape, weight.dtype, kind, block_size)
    )


def _nest(xp: Any, absmax: Any) -> dict[str, Any]:
    """fp32 scales `[blocks]` in 8 bits, the GPU's rule."""
    offset = _mean(xp, absmax)
    centred = absmax - offset
    count = absmax.shape[0]
    padded = xp.pad(centred, (0, -count % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    maxima = xp.max(xp.abs(padded), axis=1)
    scaled = _over_scales(xp, padded, maxima).reshape(-1)[:count]
    return {
        "absmax": _rank(xp, DYNAMIC_SIGNED_MIDPOINTS, scaled),
        "nested_absmax": maxima,
        "nested_table": xp.asarray(DYNAMIC_SIGNED),
        "nested_offset": offset,
    }


def _rank(xp: Any, bounds: np.ndarray, x: Any) -> Any:
    """uint8: how many of the ascending bounds lie below x."""
    if xp is np:
        return np.searchsorted(bounds, x, side="left").astype(np.uint8)
    if len(bounds) > 32:
        return jnp.searchsorted(bounds, x, side="left").astype(jnp.uint8)
    return functools.reduce(
        lambda rank, bound: rank + (x > bound).astype(jnp.uint8), bounds, jnp.zeros(x.shape, jnp.uint8)
    )


def _over_scales(xp: Any, blocks: Any, scales: Any) -> Any:
    """`[blocks, b]` times the rounded reciprocals of `[blocks]`, which is how bitsandbytes divides, within [-1, 1]."""
    if xp is np:
        return np.clip(blocks * (np.float32(1) / np.maximum(scales, np.float32(1e-38)))[:, None], -1, 1)
    return over_scales(blocks, scales)


def _mean(xp: Any, x: Any) -> Any:
    """fp32 mean, as if summed exactly: what every library comes within a unit in the last place of."""
    count = x.shape[0]
    if xp is np:
        return np.float32(np.mean(x, dtype=np.float64))
    high, low = x, jnp.zeros_like(x)
    while high.shape[0] > 1:
        if high.shape[0] % 2:
            high, low = jnp.pad(high, (0, 1)), jnp.pad(low, (0, 1))
        one, other = high[0::2], high[1::2]
        total = one + other
        part = total - one  # Knuth's two-sum: what the addition rounded away
        error = (one - (total - part)) + (other - part)
        high, low = total, low[0::2] + low[1::2] + error
    return (high[0] + low[0]) / count
