"""The one table of tolerances. A failing comparison is a bug to find, never a number to raise.

`KERNEL` compares a fast implementation with its oracle, both rounded to the dtype: about four units in the last place
of the dtype, relative to the largest magnitude of the reference (kernels add up in another order).
`MODEL` compares whole models with transformers or PEFT in fp32.
"""

import jax.numpy as jnp
import numpy as np

KERNEL = {"float32": 2e-5, "bfloat16": 1.6e-2, "float16": 2e-3}
MODEL_LOGITS = 1e-4  # largest absolute difference of logits, fp32
MODEL_GRADIENT = 1e-4  # norm of the difference over norm of the reference, each parameter, fp32


def relative_error(actual, expected) -> float:
    """max|a - e| / max|e| in fp64; an all-zero reference asks for exact zeros. NaN counts as infinite."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == e.shape, (a.shape, e.shape)
    difference = np.max(np.abs(a - e), initial=0.0)
    scale = np.max(np.abs(e), initial=0.0)
    if np.isnan(difference) or np.isnan(scale):
        return float("inf")
    return float(difference if scale == 0 else difference / scale)


def assert_close(actual, expected, *, dtype=None, tolerance=None, what="") -> None:
    """Assert that `relative_error` is within KERNEL[dtype] (default: the dtype of `actual`) or `tolerance`."""
    limit = KERNEL[jnp.dtype(dtype or actual.dtype).name] if tolerance is None else tolerance
    error = relative_error(actual, expected)
    assert error <= limit, f"{what}: relative error {error:.3e} over {limit:.1e}"
