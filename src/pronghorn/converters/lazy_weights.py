"""Weights as a decoder takes them, read, cast and quantised one at a time."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.converters.read_ahead import ReadAhead
from pronghorn.errors import InputError
from pronghorn.quantization import QuantizationConfig, is_quantized, quantize
from pronghorn.quantization.quantize_model import QuantizedArray


class LazyWeights(Mapping[str, Any]):
    """`{our name: array or quantised weight}`, read (and quantised on the device) as each is asked for."""

    def __init__(
        self,
        files: ReadAhead,
        table: Mapping[str, Any],
        dtype: str | None,
        forms: Mapping[str, QuantizedArray],
        ways: Mapping[str, QuantizationConfig],
        as_stored: frozenset[str] = frozenset(),
    ):
        self._files = files
        self._table = table
        self._on_device: deque[Any] = deque()
        self._forms = forms
        self._ways = ways
        self._as_stored = as_stored  # names that no dtype is for
        self._dtype = None if dtype is None else np.dtype(jnp.dtype(dtype))

    def __getitem__(self, name: str) -> Any:
        array = self._files.read(name)
        if is_quantized(array):
            return dataclasses.replace(array, dtype_name=self._forms[name].dtype_name)
        if self._dtype is not None and name not in self._as_stored:
            array = cast(array, self._dtype, name)
        if name in self._ways:
            # Copies and quantisers are queued, not waited for; but no more than three 16-bit copies may be there.
            self._on_device.append(quantize(jnp.asarray(array), self._ways[name]))
            if len(self._on_device) > 2:
                jax.block_until_ready(self._on_device.popleft())
            return self._on_device[-1]
        return array

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`array` in `dtype`; a finite value that float16 cannot hold is refused instead of becoming infinite."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype == np.float16 and np.isinf(result).any() and not np.isinf(array).any():
        raise InputError(
            f"{name} has values beyond 65504, which float16 cannot hold; use bfloat16 or float32."
        )
    return result
