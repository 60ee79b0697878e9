"""Compile a function for an H100 on a machine without one: all of XLA runs, but for what it would measure on the GPU.

Needs jax's CUDA plugin, which a machine without a GPU rarely has: the tests that call this are skipped where it is
missing.
"""

import importlib
import os
from unittest import mock

import jax
import pytest
from jax.sharding import AbstractMesh, SingleDeviceSharding

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


def compile_for_h100(function, *arguments, options=None) -> str:
    """The optimised HLO of `function`, kernels included; the test is skipped without jax's CUDA plugin."""
    try:
        importlib.import_module("jax_plugins.xla_cuda13")
    except ImportError:
        pytest.skip("jax's CUDA plugin is not installed")
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice  # not in jax 0.10, for which no plugin compiles without a GPU

    # The plugin would look for a driver while it is registered.
    with mock.patch.dict(os.environ, JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=_H100
        )
    sharding = SingleDeviceSharding(topology.devices[0])
    places = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with launch.interpret(False), jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(lambda *a: function(*a)).trace(*places).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options=options).as_text()
