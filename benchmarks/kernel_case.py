"""What a benchmark case is, and what the files of cases share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

BF16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
      function: of the arguments; differentiated in the first `wrt` of them where `gradient`.
      work: FLOPs or bytes that the op needs, by `unit` ("TFLOP/s" or "TB/s").
      extra: more fields for its row.
    """

    op: str
    name: str
    direction: str
    implementation: str
    function: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    work: float
    unit: str
    gradient: bool = False
    wrt: int = 0
    extra: tuple[tuple[str, Any], ...] = ()

    def row(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "case": self.name,
            "direction": self.direction,
            "implementation": self.implementation,
            "unit": self.unit,
            **dict(self.extra),
        }


def normal(seed: int, shape, dtype=BF16, factor: float = 1.0) -> jax.Array:
    return (factor * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)


def tokamax_has(name: str) -> bool:
    try:
        import tokamax
    except ImportError:  # not installed, or without what it imports itself
        return False
    return hasattr(tokamax, name)
