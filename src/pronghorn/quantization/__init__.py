"""Weights in fewer bits, as pytrees with `.shape`, `.dtype` and `.dequantize()`."""

from pronghorn.quantization.fp8 import FP8Array, quantize_fp8
from pronghorn.quantization.int8 import Int8Array, quantize_int8
from pronghorn.quantization.mxfp4 import MXFP4Array
from pronghorn.quantization.nf4 import NF4Array, quantize_4bit
from pronghorn.quantization.quantize_model import (
    QuantizationConfig,
    is_quantized,
    quantize,
    read_quantization,
)

__all__ = [
    "FP8Array",
    "Int8Array",
    "MXFP4Array",
    "NF4Array",
    "QuantizationConfig",
    "is_quantized",
    "quantize",
    "quantize_4bit",
    "quantize_fp8",
    "quantize_int8",
    "read_quantization",
]
