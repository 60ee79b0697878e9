"""bitsandbytes on the CPU, as the tests compare with it."""

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tensor(array: np.ndarray):
    """A torch tensor with the same bits."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def quantize_4bit(array: np.ndarray, kind: str, nested: bool, block_size: int = 64):
    """(packed codes, QuantState)."""
    import bitsandbytes.functional as F

    return F.quantize_4bit(tensor(array), quant_type=kind, compress_statistics=nested, blocksize=block_size)


def dequantize_4bit(codes, state) -> np.ndarray:
    """fp32 copy of the dequantised weight."""
    import bitsandbytes.functional as F

    return F.dequantize_4bit(codes, state).float().numpy()


def weight(shape: tuple[int, ...], dtype: str, *, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (noise * scale).astype(np.float32).astype(DTYPES[dtype])
