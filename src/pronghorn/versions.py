"""Versions of what decides a number, for reports and run folders."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "pronghorn",
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "torch",
    "peft",
)


def installed_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """{package: version} of those that are installed, and of Python."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
