"""The tables of bitsandbytes' 4-bit formats, to the bit: fp32 values, little endian, in hex.

The 8-bit maps, which the kernels need as well, are those of `pallas_kernels.dynamic_tables`.

Source: Dettmers et al., QLoRA, 2023, appendix E, https://arxiv.org/abs/2305.14314 (NF4).
"""

import numpy as np

from pronghorn.pallas_kernels.dynamic_tables import (
    DYNAMIC_SIGNED,
    DYNAMIC_SIGNED_MIDPOINTS,
    DYNAMIC_UNSIGNED,
    midpoints,
    table_from_hex,
)

__all__ = [
    "CODE_MIDPOINTS",
    "CODE_ORDER",
    "CODE_TABLES",
    "DYNAMIC_SIGNED",
    "DYNAMIC_SIGNED_MIDPOINTS",
    "DYNAMIC_UNSIGNED",
    "FP4",
    "NF4",
]

# Quantiles of N(0, 1), ascending; a code is an index.
NF4 = table_from_hex(
    "000080bfb13932bf306b06bfa032cabe4da291be3f353dbe7178babd00000000fffaa23de3ca243edd047c3e3a03ad3e"
    "b8a4e13eab07103fb313393f0000803f"
)
# A sign bit, two of exponent and one of mantissa, over 12, in the order of the bit patterns; entry 8 is a second zero.
FP4 = table_from_hex(
    "00000000abaaaa3babaa2a3f0000803fabaaaa3e0000003fabaa2a3e0000803e00000000abaaaabbabaa2abf000080bf"
    "abaaaabe000000bfabaa2abe000080be"
)
CODE_TABLES = {"nf4": NF4, "fp4": FP4}

# Codes from the lowest value to the highest. Of FP4's two zeros, 0 lies below and 8 above.
CODE_ORDER = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8),
}
CODE_MIDPOINTS = {kind: midpoints(table[CODE_ORDER[kind]]) for kind, table in CODE_TABLES.items()}
