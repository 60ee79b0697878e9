"""Compile for a GPU on a machine that has none: all of XLA runs, but for what it would measure on the GPU.

What a plan tells of a device can so be had before the device is rented. Needs jax's CUDA plugin, and jax 0.11 or later.
Nothing that is compiled so can run here.
"""

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch

# What XLA asks of a device before it compiles for it, as it describes an H100 SXM.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 l2_cache_size: 52428800 device_address_bits: 64
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a" name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.20.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 20 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class _Description:
    text: str
    device_kind: str
    compute_capability: str
    multiprocessors: int
    memory_bytes: int  # what a process may have by default: three quarters of the device


TARGETS = {"h100": _Description(_H100, "NVIDIA H100 80GB HBM3", "9.0", 132, int(0.75 * 84942979072))}


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[launch.Target]:
    """Inside the block programs are lowered and compiled for a device of this name, "h100".

    Raises:
      InputError: no such name, or jax lacks what it takes.
    """
    if name not in TARGETS:
        raise InputError(f"device={name!r} is not known; use one of {', '.join(TARGETS)}.")
    try:
        importlib.import_module("jax_plugins.xla_cuda13")
        from jax.sharding import AbstractDevice
    except ImportError:
        raise InputError(
            f"device={name!r}: compiling for a GPU that is not there takes jax 0.11 or later and its CUDA 13 plugin; "
            "install them with pip install 'pronghorn[cuda]'."
        ) from None
    from jax.experimental import topologies
    from jax.sharding import AbstractMesh, AxisType

    found = TARGETS[name]
    # The plugin would look for a driver while it is registered.
    with mock.patch.dict(os.environ, JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):
        topology: Any = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=found.text
        )
    device = AbstractDevice(device_kind=found.device_kind, num_cores=found.multiprocessors, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    target = launch.Target(
        found.device_kind,
        found.compute_capability,
        found.multiprocessors,
        found.memory_bytes,
        topology.devices[0],
    )
    with launch.lowering_for(target), jax.sharding.use_abstract_mesh(mesh), _cudnn_checks_for(target):
        yield target


@contextlib.contextmanager
def _cudnn_checks_for(target: launch.Target) -> Iterator[None]:
    """jax asks the machine's own GPU whether cuDNN has attention for a head dim: here it is told the target's answer.

    Private to jax: where the question has moved, a head dim above 128 is refused as it is on a machine without a GPU.
    """
    try:
        asked: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    except ImportError:
        asked = None
    if not hasattr(asked, "check_compute_capability"):
        yield
        return

    def numbers(capability: str) -> tuple[int, ...]:
        return tuple(int(part) for part in capability.split("."))

    def at_least(capability: str) -> bool:
        return numbers(target.compute_capability) >= numbers(capability)

    with mock.patch.object(asked, "check_compute_capability", at_least):
        yield
