"""Launch parameters that were measured: a few small integers for an op and a size, by device kind.

`tuning/<device kind>.json` holds {"device", "compute_capability", "versions", "choices": {op: {key: [integers]}}}. A
key is "<bits>-bit/<size>": the width of the data type and what the op's tile grows with (head dim, columns, rank),
rounded up to a power of two. What the integers mean stands where an op asks for them. A size nobody measured takes the
nearest measured one's within a factor of four, a device nobody measured those of another with its compute capability,
and else the op's own rule holds. `pronghorn tune` writes the files.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pronghorn.files import write_atomic
from pronghorn.pallas_kernels.launch import next_power_of_2, on_gpu, target

FOLDER = Path(__file__).parent / "tuning"
Choice = tuple[int, ...]

# What a tuner tries: ((op, choice), ...). A user context is part of the key of jax's compile cache.
_candidates = jax.make_user_context(None)


def device_kind_and_capability() -> tuple[str, str]:
    """The default device's name and compute capability; an H100's where a kernel is lowered without a GPU."""
    wanted = target()
    if wanted is not None:
        return wanted.device_kind, wanted.compute_capability
    if not on_gpu():
        return "NVIDIA H100 80GB HBM3", "9.0"
    device = jax.local_devices()[0]
    return device.device_kind, str(getattr(device, "compute_capability", "9.0"))


def multiprocessors() -> int:
    """How many blocks run at once on the default GPU (an H100's 132 where the device does not say)."""
    wanted = target()
    if wanted is not None:
        return wanted.multiprocessors
    return int(getattr(jax.local_devices()[0], "core_count", None) or 132) if on_gpu() else 132


def key(dtype: jax.typing.DTypeLike, size: int) -> str:
    """The key of a size, say "16-bit/128"."""
    return f"{jnp.dtype(dtype).itemsize * 8}-bit/{next_power_of_2(size)}"


def choice(op: str, dtype: jax.typing.DTypeLike, size: int, *, at_least: bool = False) -> Choice | None:
    """What the tuner tries now, else what was measured for this device, else None.

    at_least: a smaller size's choice does not do, since the op's tiles would not fit.
    """
    for name, values in _candidates.value or ():
        if name == op:
            return values
    return measured(*device_kind_and_capability(), op, key(dtype, size), at_least=at_least)


@contextlib.contextmanager
def candidate(op: str, values: Choice) -> Iterator[None]:
    """Launch `op` with `values` in what is traced inside the block."""
    with _candidates((*(_candidates.value or ()), (op, values))):
        yield


def file_name(device_kind: str) -> str:
    """The device's file inside the folder."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


@functools.cache
def read(device_kind: str, capability: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The device's file, or that of a device with its compute capability, or {}."""
    own = folder / file_name(device_kind)
    if own.is_file():
        return json.loads(own.read_text())
    for other in sorted(folder.glob("*.json")):
        content = json.loads(other.read_text())
        if content.get("compute_capability") == capability:
            return content
    return {}


def measured(
    device_kind: str, capability: str, op: str, wanted: str, *, at_least: bool = False, folder: Path = FOLDER
) -> Choice | None:
    """The measured choice for a key, or for the nearest one of its data type within a factor of four."""
    choices = read(device_kind, capability, folder).get("choices", {}).get(op, {})
    bits, size = wanted.split("/")
    steps = {  # from the wanted size up (or down) to each measured one
        found: math.log2(int(found.split("/")[1]) / int(size))
        for found in choices
        if found.split("/")[0] == bits
    }
    near = [found for found, up in steps.items() if (0 if at_least else -2) <= up <= 2]
    # Of two as near, the larger size: its tiles fit the smaller one too.
    best = min(near, key=lambda found: (abs(steps[found]), -steps[found]), default=None)
    return None if best is None else tuple(choices[best])


def write(
    device_kind: str, capability: str, versions: dict[str, str], choices: dict[str, dict[str, Choice]],
    folder: Path = FOLDER,
) -> Path:  # fmt: skip
    """Put `choices` into the device's file, beside what it holds of other ops and keys; returns its path."""
    path = folder / file_name(device_kind)
    held = json.loads(path.read_text())["choices"] if path.is_file() else {}
    merged = {op: {**held.get(op, {}), **choices.get(op, {})} for op in sorted({*held, *choices})}
    lines = [
        f"  {json.dumps(op)}: {{\n"
        + ",\n".join(f"   {json.dumps(k)}: {json.dumps(list(v))}" for k, v in sorted(by_key.items()))
        + "\n  }"
        for op, by_key in merged.items()
    ]
    head = {"device": device_kind, "compute_capability": capability, "versions": versions}
    write_atomic(
        path, json.dumps(head, indent=1)[:-2] + ',\n "choices": {\n' + ",\n".join(lines) + "\n }\n}\n"
    )
    read.cache_clear()
    return path
