"""Compile a function for an H100 on a machine without one: all of XLA runs, but for what it would measure on the GPU.

Needs jax's CUDA plugin, which a machine without a GPU rarely has: the tests that call this are skipped where it is
missing.
"""

import contextlib
from collections.abc import Iterator

import jax
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.target_device import compiling_for


@contextlib.contextmanager
def h100() -> Iterator[launch.Target]:
    """`compiling_for("h100")`; the test is skipped without jax's CUDA plugin, or with a jax that cannot do it."""
    with contextlib.ExitStack() as stack:
        try:
            target = stack.enter_context(compiling_for("h100"))
        except InputError as error:
            pytest.skip(str(error))
        yield target


def compile_for_h100(function, *arguments, options=None) -> str:
    """The optimised HLO of `function`, kernels included."""
    with h100() as target:
        sharding = jax.sharding.SingleDeviceSharding(target.device)
        places = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
        return jax.jit(lambda *a: function(*a)).lower(*places).compile(compiler_options=options).as_text()
