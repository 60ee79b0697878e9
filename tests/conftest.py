"""Tests marked `gpu` run where there is an NVIDIA GPU and are deselected elsewhere."""

import jax
import pytest


def pytest_collection_modifyitems(config, items):
    if jax.default_backend() == "gpu":
        return
    gpu = [item for item in items if "gpu" in item.keywords]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if "gpu" not in item.keywords]


@pytest.fixture(autouse=True)
def _exact_products():
    """fp32 products in fp32: a GPU's default would be tf32."""
    with jax.default_matmul_precision("highest"):
        yield
