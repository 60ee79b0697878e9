"""The one place where kernels are launched and implementations are chosen.

Every Pallas kernel goes through `pallas_call`, so that another backend for an op (Mosaic GPU, jax-triton) is one more
implementation and no caller changes. `resolve` picks the implementation of an op; `kernels` forces one.
"""

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import jax
from jax.experimental import pallas as pl

from pronghorn.errors import InputError

Implementation = Literal["pallas", "xla", "cudnn"]

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("pronghorn_implementation", default=None)
_interpret: contextvars.ContextVar[bool | None] = contextvars.ContextVar("pronghorn_interpret", default=None)


@contextlib.contextmanager
def kernels(implementation: Implementation) -> Iterator[None]:
    """Force one implementation for every op traced inside the block.

    The choice is made while a function is traced: a function that `jax.jit` has already compiled keeps the
    implementation it was compiled with, so enter the block before the first call. An op that lacks the forced
    implementation (only attention has "cudnn") keeps its default.

    Raises:
      InputError: for a name that is no implementation.
    """
    _check(implementation)
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def interpret(enabled: bool) -> Iterator[None]:
    """Run (True) or lower for a GPU (False) the Pallas kernels traced inside; the default is by platform."""
    token = _interpret.set(enabled)
    try:
        yield
    finally:
        _interpret.reset(token)


def _check(implementation: str) -> None:
    if implementation not in get_args(Implementation):
        raise InputError(
            f"implementation={implementation!r} is not known; use one of {', '.join(get_args(Implementation))}."
        )


def resolve(
    implementation: str | None, *, default_gpu: str = "pallas", available: Sequence[str] = ("pallas", "xla")
) -> str:
    """The implementation for one call: the argument, else the forced one, else the measured default of the platform.

    On a machine without a GPU the default is "xla"; "pallas" there runs in interpret mode.
    """
    if implementation is not None:
        _check(implementation)
        if implementation not in available:
            raise InputError(
                f"implementation={implementation!r} does not exist for this op; use one of {', '.join(available)}."
            )
        return implementation
    forced = _forced.get()
    if forced in available:
        return str(forced)
    return default_gpu if on_gpu() else "xla"


def on_gpu() -> bool:
    """Whether the default device is a GPU."""
    return jax.default_backend() in ("gpu", "cuda", "rocm")


def pallas_call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    in_specs: Sequence[pl.BlockSpec] | None = None,
    out_specs: Any = None,
    num_warps: int = 4,
    num_stages: int = 2,
    input_output_aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """`pl.pallas_call` through Triton with explicit warps and stages; interpreted where there is no GPU.

    Args:
      kernel: the kernel body; its static parameters bound with `functools.partial`.
      name: shown in profiles and in the HLO.
      num_warps, num_stages: Triton's launch parameters. They are always passed: without them jax 0.10 would pick
        another backend.
    """
    from jax.experimental.pallas import triton

    interpreted = _interpret.get()
    if interpreted is None:
        interpreted = not on_gpu()
    specs: dict[str, Any] = {}
    if in_specs is not None:
        specs["in_specs"] = in_specs
    if out_specs is not None:
        specs["out_specs"] = out_specs
    call = pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        out_shape=out_shape,
        input_output_aliases=input_output_aliases or {},
        interpret=interpreted,
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        **specs,
    )

    @functools.wraps(kernel)
    def launch(*arguments):
        with warnings.catch_warnings():
            # Deprecated since jax 0.11, and still the only portable way to Triton: the README says so.
            warnings.filterwarnings("ignore", message=".*Triton.*deprecat.*")
            warnings.filterwarnings("ignore", message=".*deprecat.*Triton.*")
            return call(*arguments)

    return launch


def cdiv(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n (n >= 1): the size a Triton value must have."""
    return 1 << max(0, n - 1).bit_length()
