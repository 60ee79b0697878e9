"""Tests marked `gpu` run where there is an NVIDIA GPU and are deselected elsewhere."""

import jax
import pytest

from tests.quick_compiles import set_flags

set_flags()


def pytest_collection_modifyitems(config, items):
    if jax.default_backend() == "gpu":
        return
    gpu = [item for item in items if "gpu" in item.keywords]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if "gpu" not in item.keywords]


@pytest.fixture(scope="session", autouse=True)
def _quick_compiles():
    """Programs of the tests run a few times on tiny arrays: on a CPU they are compiled fast rather than well."""
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _exact_products():
    """fp32 products in fp32: a GPU's default would be tf32."""
    with jax.default_matmul_precision("highest"):
        yield
