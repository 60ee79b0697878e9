"""Where compiled programs are kept between runs."""

from pathlib import Path

SHORTEST_SECONDS = (
    0.1  # what compiles faster is not kept; loading weights takes dozens of programs of half a second
)


def keep_programs_in(folder: str | Path) -> None:
    """Keep and find compiled programs in this folder from now on, whatever was compiled before.

    JAX decides once, at a process's first compilation, whether and where it keeps programs; a folder that is set later
    is not looked at. So it is made to decide again.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_SECONDS)
    compilation_cache.reset_cache()
