"""Compile a function for an H100 on a machine without one: all of XLA runs, but for what it would measure on the GPU.

Needs jax's CUDA plugin, which a machine without a GPU rarely has: the tests that call this are skipped where it is
missing.
"""

import contextlib
import importlib
from collections.abc import Iterator

import jax
import pytest

from pronghorn.pallas_kernels import launch
from pronghorn.target_device import compiling_for


@contextlib.contextmanager
def h100() -> Iterator[launch.Target]:
    """`compiling_for("h100")`; the test is skipped without jax's CUDA plugin, or with a jax that cannot do it."""
    try:
        importlib.import_module("jax_plugins.xla_cuda13")
        from jax.sharding import AbstractDevice  # noqa: F401  (not in jax 0.10)
    except ImportError:
        pytest.skip("jax's CUDA plugin is not installed, or jax is older than 0.11")
    with compiling_for("h100") as target:
        yield target


def compile_for_h100(function, *arguments, options=None) -> str:
    """The optimised HLO of `function`, kernels included."""
    with h100() as target:
        sharding = jax.sharding.SingleDeviceSharding(target.device)
        places = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
        return jax.jit(lambda *a: function(*a)).lower(*places).compile(compiler_options=options).as_text()
