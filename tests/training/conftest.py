import jax
import pytest

from tests.training.resumable import make_trainer, outcome


@pytest.fixture(scope="package", autouse=True)
def _compiled_programs_are_kept(tmp_path_factory):
    """Runs with equal programs compile once: the runs of a resume test, for example."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


@pytest.fixture(scope="package")
def uninterrupted(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("whole") / "run")
    with jax.default_matmul_precision("highest"):
        return outcome(trainer, trainer.train())
