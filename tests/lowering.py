"""Lower a function for an H100 on a machine without one: Triton's front end runs, its compiler does not."""

import jax
from jax.sharding import AbstractMesh

from pronghorn.pallas_kernels import launch


def lower_for_h100(function, *arguments) -> str:
    """Trace `function` and lower it for CUDA; returns the StableHLO text. Raises whatever the lowering raises."""
    with launch.interpret(False):
        # A fresh function object: a cached trace might hold interpreted kernels.
        fresh = jax.jit(lambda *a: function(*a))
        if jax.__version_info__ >= (0, 11):
            from jax.sharding import AbstractDevice, AxisType

            device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
            mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
            with jax.sharding.use_abstract_mesh(mesh):
                return fresh.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        return fresh.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def lower_defaults_for_h100(function, *arguments) -> str:
    """`lower_for_h100` with what an op takes on an H100 where nothing is asked for."""
    target = launch.Target("NVIDIA H100 80GB HBM3", "9.0", 132, 80 << 30, None)
    with launch.lowering_for(target):
        return lower_for_h100(function, *arguments)
