"""What quantised weights have in common: each stands for a matrix of some dtype."""

from typing import Any

import jax.numpy as jnp


class CodedMatrix:
    """A matrix held as `codes`, one an element unless a class says otherwise; `dtype_name` is that of the matrix."""

    codes: Any
    dtype_name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `dequantize` returns."""
        return tuple(self.codes.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Of what `dequantize` returns."""
        return jnp.dtype(self.dtype_name)
