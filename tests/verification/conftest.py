"""Programs of these tests run once on tiny arrays: on a CPU compile them fast rather than well."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_compiles():
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)
