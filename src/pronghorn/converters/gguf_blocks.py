"""GGUF block formats decoded to fp32, vectorised over blocks.

A quantised row is a run of blocks; a block holds `elements` values in `nbytes` bytes, little endian. The formats and
their arithmetic are those of ggml (`ggml-common.h`, `ggml-quants.c`); every decoder multiplies and adds in the same
order in fp32, so the result is equal to ggml's to the bit.

    Q4_0   x = d (q - 8)            Q4_1   x = d q + m             32 values, 4-bit q, fp16 d and m
    Q5_0   x = d (q - 16)           Q5_1   x = d q + m             32 values, 5-bit q
    Q8_0   x = d q                                                 32 values, int8 q
    Q4_K   x = (d s) q - (dmin m)   Q5_K   the same                256 values in 8 groups, 6-bit s and m
    Q6_K   x = (d s) (q - 32)                                      256 values in 16 groups, int8 s
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """How one ggml type is stored: `elements` values in `nbytes` bytes, and the decoder of `[n, nbytes]` uint8."""

    name: str
    elements: int
    nbytes: int
    decode: Callable[[np.ndarray], np.ndarray]


def _half(columns: np.ndarray) -> np.ndarray:
    """`[n, 2 k]` bytes as `[n, k]` fp16, widened to fp32."""
    return np.ascontiguousarray(columns).view("<f2").astype(np.float32)


def _nibbles(columns: np.ndarray) -> np.ndarray:
    """`[n, k]` bytes to `[n, 2 k]`: all low nibbles first, then all high ones."""
    return np.concatenate([columns & 0x0F, columns >> 4], axis=1)


def _high_bits(columns: np.ndarray) -> np.ndarray:
    """The fifth bits of Q5_0 and Q5_1: `[n, 4]` bytes, bit j of the little-endian word belongs to value j."""
    return np.unpackbits(columns, axis=1, bitorder="little") << 4


def _decode_f32(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32, copy=False)


def _decode_f16(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks)


def _decode_bf16(blocks: np.ndarray) -> np.ndarray:
    # bf16 is the upper half of an fp32
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    q = _nibbles(blocks[:, 2:]).astype(np.float32) - 8
    return _half(blocks[:, :2]) * q


def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    q = _nibbles(blocks[:, 4:]).astype(np.float32)
    return _half(blocks[:, :2]) * q + _half(blocks[:, 2:4])


def _decode_q5_0(blocks: np.ndarray) -> np.ndarray:
    q = (_nibbles(blocks[:, 6:]) | _high_bits(blocks[:, 2:6])).astype(np.float32) - 16
    return _half(blocks[:, :2]) * q


def _decode_q5_1(blocks: np.ndarray) -> np.ndarray:
    q = (_nibbles(blocks[:, 8:]) | _high_bits(blocks[:, 4:8])).astype(np.float32)
    return _half(blocks[:, :2]) * q + _half(blocks[:, 2:4])


def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks[:, :2])


def _k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minima of Q4_K and Q5_K, 6 bits each in 12 bytes.

    Groups 0-3 lie in the low six bits of bytes 0-3 (scale) and 4-7 (minimum). Groups 4-7 have their low four bits in
    the nibbles of bytes 8-11 and their upper two in the spare bits of bytes 0-3 and 4-7.
    """
    first, second, low = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 0x3F, (low & 0x0F) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 0x3F, (low >> 4) | (second >> 6 << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_values(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(d s) q - (dmin m) for `q` `[n, 8, 32]`; d, dmin and the packed scales are the first 16 bytes."""
    scales, minima = _k_scales(blocks[:, 4:16])
    steps = _half(blocks[:, 0:2]) * scales
    offsets = _half(blocks[:, 2:4]) * minima
    return (steps[:, :, None] * q.astype(np.float32) - offsets[:, :, None]).reshape(len(blocks), 256)


def _paired_nibbles(columns: np.ndarray) -> np.ndarray:
    """`[n, 128]` bytes to `[n, 8, 32]`: each 32 bytes give one group of low nibbles, then one of high ones."""
    groups = columns.reshape(len(columns), 4, 1, 32)
    return np.concatenate([groups & 0x0F, groups >> 4], axis=2).reshape(len(columns), 8, 32)


def _decode_q4_k(blocks: np.ndarray) -> np.ndarray:
    return _k_values(blocks, _paired_nibbles(blocks[:, 16:144]))


def _decode_q5_k(blocks: np.ndarray) -> np.ndarray:
    # bit k of high byte l is the fifth bit of value l of group k
    high = blocks[:, 16:48].reshape(len(blocks), 1, 32) >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    return _k_values(blocks, _paired_nibbles(blocks[:, 48:176]) | ((high & 1) << 4))


def _decode_q6_k(blocks: np.ndarray) -> np.ndarray:
    n = len(blocks)
    packed = blocks[:, 0:128].reshape(n, 2, 1, 64)
    low = np.concatenate([packed & 0x0F, packed >> 4], axis=2).reshape(n, 8, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = ((blocks[:, 128:192].reshape(n, 2, 1, 32) >> shifts) & 3).reshape(n, 8, 32)
    q = (low | (high << 4)).astype(np.float32) - 32
    steps = _half(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (steps[:, :, None] * q.reshape(n, 16, 16)).reshape(n, 256)


# ggml type number -> format
FORMATS: dict[int, BlockFormat] = {
    0: BlockFormat("F32", 1, 4, _decode_f32),
    1: BlockFormat("F16", 1, 2, _decode_f16),
    2: BlockFormat("Q4_0", 32, 18, _decode_q4_0),
    3: BlockFormat("Q4_1", 32, 20, _decode_q4_1),
    6: BlockFormat("Q5_0", 32, 22, _decode_q5_0),
    7: BlockFormat("Q5_1", 32, 24, _decode_q5_1),
    8: BlockFormat("Q8_0", 32, 34, _decode_q8_0),
    12: BlockFormat("Q4_K", 256, 144, _decode_q4_k),
    13: BlockFormat("Q5_K", 256, 176, _decode_q5_k),
    14: BlockFormat("Q6_K", 256, 210, _decode_q6_k),
    30: BlockFormat("BF16", 1, 2, _decode_bf16),
}

# the other types a file can name, so that a refusal can say which it was
OTHER_TYPE_NAMES: dict[int, str] = {
    10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def dequantize(data: np.ndarray, ggml_type: int) -> np.ndarray:
    """Decode whole blocks.

    Args:
      data: uint8, `[..., row_bytes]`, each row a whole number of blocks.
      ggml_type: a key of `FORMATS`.

    Returns:
      fp32 `[..., row_bytes / nbytes * elements]`.
    """
    block = FORMATS[ggml_type]
    values = block.decode(data.reshape(-1, block.nbytes))
    return values.reshape(*data.shape[:-1], data.shape[-1] // block.nbytes * block.elements)
