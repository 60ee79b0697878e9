"""Steps are queued without waiting, and a second run finds its step compiled."""

import jax
from jax.experimental.compilation_cache import compilation_cache

from pronghorn.compile_cache import SHORTEST_SECONDS
from pronghorn.data import DataConfig
from pronghorn.training import TrainConfig, Trainer
from pronghorn.training.step import CompiledStep
from tests.training.small import random_documents, small_model, tokenized


def trainer_for(folder, **settings):
    config = TrainConfig(output_dir=str(folder), batch_size=2, save_every=None, **settings)
    return Trainer(
        small_model(), None, tokenized(random_documents(12)), config, data=DataConfig(max_length=16)
    )


def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    """Batches are placed explicitly, and numbers come back for several steps at once, some steps late."""
    events = []
    fetch, dispatch = jax.device_get, CompiledStep.__call__

    def counted_fetch(tree):
        events.append("fetch")
        return fetch(tree)

    def counted_dispatch(self, *arguments):
        events.append("step")
        with jax.transfer_guard("disallow"):
            return dispatch(self, *arguments)

    monkeypatch.setattr("pronghorn.training.metrics._POLL_SECONDS", float("inf"))
    monkeypatch.setattr(jax, "device_get", counted_fetch)
    monkeypatch.setattr(CompiledStep, "__call__", counted_dispatch)
    trainer_for(tmp_path, max_steps=12, log_every=9).train()
    # The first step's numbers are looked at at once; then nothing until nine steps are done and two are under way.
    steps = [place for place, event in enumerate(events) if event == "step"]
    assert len(steps) == 12 and "fetch" not in events[steps[1] : steps[10]]


def test_a_second_run_takes_its_programs_from_the_cache(tmp_path, monkeypatch):
    """Though programs were compiled before the folder was named: the second start compiles no step anew."""
    monkeypatch.setattr("pronghorn.compile_cache.SHORTEST_SECONDS", 0.0)
    cache, before = tmp_path / "cache", jax.config.jax_compilation_cache_dir
    jax.jit(lambda x: x + 1)(1.0)

    def steps():
        return {
            path.name for path in cache.iterdir() if "flat_step" in path.name and "atime" not in path.name
        }

    try:
        trainer_for(tmp_path / "one", compile_cache=str(cache), max_steps=1).train()
        kept = steps()
        assert len(kept) == 1
        jax.clear_caches()
        trainer_for(tmp_path / "two", compile_cache=str(cache), max_steps=1).train()
        assert steps() == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_SECONDS)
        compilation_cache.reset_cache()
