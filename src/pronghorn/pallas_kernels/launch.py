"""The one place where kernels are launched and implementations are chosen.

Every Pallas kernel goes through `pallas_call`, so that another backend for an op (Mosaic GPU, jax-triton) is one more
implementation and no caller changes. `resolve` picks the implementation of an op; `kernels` forces one.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal, get_args, overload

import jax
from jax.experimental import pallas as pl

from pronghorn.errors import InputError

Implementation = Literal["pallas", "xla", "cudnn"]

# User contexts, not contextvars: their values are part of the key of jax's trace and compile caches.
_forced = jax.make_user_context(None)
_interpret = jax.make_user_context(None)
_target = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A GPU that is compiled for and need not be there: name, compute capability, multiprocessors, memory in bytes, and
    jax's device."""

    device_kind: str
    compute_capability: str
    multiprocessors: int
    memory_bytes: int
    device: Any


@contextlib.contextmanager
def lowering_for(device: Target) -> Iterator[None]:
    """What is traced and lowered inside is for this device, whatever the machine has."""
    with _target(device):
        yield


def target() -> Target | None:
    """The device of the innermost `lowering_for`; None where programs are for this machine."""
    return _target.value


def choices() -> tuple[Any, ...]:
    """What of this module a program that is traced now depends on; equal tuples give equal programs."""
    return _forced.value, _interpret.value, _target.value, on_gpu()


@contextlib.contextmanager
def kernels(implementation: Implementation) -> Iterator[None]:
    """Force one implementation for every op traced inside the block.

    A function that `jax.jit` has compiled under another choice is traced and compiled anew inside the block, and found
    in the cache again outside it. An explicit `implementation=` argument wins. An op that lacks the forced
    implementation (only attention has "cudnn") keeps its default.

    Raises:
      InputError: for a name that is no implementation.
    """
    _check(implementation)
    with _forced(implementation):
        yield


@contextlib.contextmanager
def interpret(enabled: bool) -> Iterator[None]:
    """Run (True) or lower for a GPU (False) the Pallas kernels traced inside; the default is by platform."""
    with _interpret(enabled):
        yield


def _check(implementation: str) -> None:
    if implementation not in get_args(Implementation):
        raise InputError(
            f"implementation={implementation!r} is not known; use one of {', '.join(get_args(Implementation))}."
        )


def resolve(
    implementation: str | None,
    *,
    default_gpu: str = "pallas",
    default_cpu: str = "xla",
    available: Sequence[str] = ("pallas", "xla"),
) -> str:
    """The implementation for one call: the argument, else the forced one, else the default of the platform.

    "pallas" on a machine without a GPU runs in interpret mode: right, and slow, so `default_cpu` is "xla" for every op
    that launches a kernel.

    Raises:
      InputError: for an argument that is no implementation, or none of this op.
    """
    if implementation is not None:
        _check(implementation)
        if implementation not in available:
            raise InputError(
                f"implementation={implementation!r} does not exist for this op; use one of {', '.join(available)}."
            )
        return implementation
    forced = _forced.value
    if forced in available:
        return str(forced)
    return default_gpu if on_gpu() else default_cpu


def on_gpu() -> bool:
    """Whether arrays land on a GPU by default (`jax.default_device` counts, committed arguments do not)."""
    if target() is not None:
        return True
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # options are attributes made at run time
    platform = getattr(device, "platform", device) or jax.default_backend()
    return platform in ("gpu", "cuda", "rocm")


def interpreting() -> bool:
    """Whether a kernel traced now is interpreted: a kernel with inline PTX needs its plain twin there."""
    return not on_gpu() if _interpret.value is None else bool(_interpret.value)


def pallas_call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    in_specs: Sequence[pl.BlockSpec | None] | None = None,
    out_specs: Any = None,
    num_warps: int = 4,
    num_stages: int = 2,
    input_output_aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """`pl.pallas_call` through Triton with explicit warps and stages; interpreted where there is no GPU.

    Args:
      kernel: the kernel body; its static parameters bound with `functools.partial`.
      name: shown in profiles and in the HLO.
      grid: programs along each axis; static.
      out_shape: one `jax.ShapeDtypeStruct`, or a sequence of them.
      in_specs, out_specs: block specifications; without them every reference is the whole array.
      num_warps, num_stages: Triton's launch parameters. They are always passed: without them jax 0.10 would pick
        another backend.
      input_output_aliases: input index -> index of the output that may take its memory.
    """
    interpreted = interpreting()
    if not interpreted:
        # Deprecated since jax 0.11, and still the only portable way to Triton: the README says so. The warning comes
        # while the caller's program is lowered, long after this call: only a standing filter reaches it.
        warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
    specs: dict[str, Any] = {}
    if in_specs is not None:
        specs["in_specs"] = in_specs
    if out_specs is not None:
        specs["out_specs"] = out_specs
    options: dict[str, Any] = {
        "name": name,
        "grid": grid,
        "out_shape": out_shape if isinstance(out_shape, jax.ShapeDtypeStruct) else tuple(out_shape),
        "input_output_aliases": tuple((input_output_aliases or {}).items()),
        "interpret": interpreted,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    if specs or not isinstance(kernel, functools.partial):
        return _launcher(kernel, specs, **options)
    return _known_launcher(kernel.func, _Typed(kernel.args), _Typed(kernel.keywords), tuple(options.items()))


def _launcher(
    kernel: Callable[..., None],
    specs: dict[str, Any],
    *,
    input_output_aliases: tuple[tuple[int, int], ...],
    num_warps: int,
    num_stages: int,
    **options: Any,
) -> Callable[..., Any]:
    from jax.experimental.pallas import triton

    return pl.pallas_call(
        kernel,
        input_output_aliases=dict(input_output_aliases),
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        **options,
        **specs,
    )


@functools.lru_cache(maxsize=1024)
def _known_launcher(
    function: Callable[..., None],
    arguments: "_Typed",
    keywords: "_Typed",
    options: tuple[tuple[str, Any], ...],
) -> Callable[..., Any]:
    """The very same callable for the same launch: jax then traces and lowers a kernel of 32 layers once, not 32 times
    (an 8B step of unrolled layers: 9.2 -> 2.3 s of tracing and lowering)."""
    kernel = functools.partial(function, *arguments.value, **keywords.value)
    return _launcher(kernel, {}, **dict(options))


class _Typed:
    """Parameters of a kernel as part of a key. Types count: 1, 1.0 and True are equal, and are not the same kernel."""

    def __init__(self, value: Any):
        self.value = value
        self._key = _types(value)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Typed) and self._key == other._key


def _types(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((name, _types(value[name])) for name in sorted(value))
    if isinstance(value, tuple):
        return type(value), tuple(map(_types, value))
    return type(value), value


def in_bounds(shape: Sequence[int], *indices: jax.Array) -> jax.Array:
    """The mask of the elements `array[indices]` that exist: every index below its extent, broadcast together.

    A block that does not divide the array reads and writes past its end on a GPU (before jax 0.12), and a value's size
    must be a power of two: so kernels index whole arrays by hand and pass this mask to every load and store.
    """
    mask = indices[0] < shape[0]
    for index, extent in zip(indices[1:], shape[1:], strict=True):
        mask = mask & (index < extent)
    return mask


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A hashable value that rides along a custom_vjp's residuals without becoming an array."""

    value: Hashable


def perturbed(tree: Any) -> bool:
    """Whether anything in one argument of a `symbolic_zeros` forward rule is differentiated."""
    return any(leaf.perturbed for leaf in jax.tree.leaves(tree))


@overload
def cdiv(a: int, b: int) -> int: ...


@overload
def cdiv(a: jax.Array, b: int) -> jax.Array: ...


def cdiv(a, b):
    """ceil(a / b)."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n (n >= 1): the size a Triton value must have."""
    return 1 << max(0, n - 1).bit_length()


def warps_for(elements: int, *, per_thread: int = 32, most: int = 16) -> int:
    """Warps for a program that holds `elements` values, about `per_thread` a thread: a power of two up to `most`."""
    return max(1, min(most, next_power_of_2(cdiv(elements, 32 * per_thread))))
