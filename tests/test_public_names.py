"""The public names exist, and importing the package loads nothing heavy."""

import subprocess
import sys

import pronghorn


def test_every_public_name_can_be_imported():
    for name in pronghorn.__all__:
        assert getattr(pronghorn, name) is not None
    assert sorted(pronghorn.__all__) == list(pronghorn.__all__)


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, pronghorn; "
        "print([m for m in ('jax', 'torch', 'transformers', 'datasets', 'peft', 'orbax') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_a_name_that_does_not_exist_is_an_attribute_error():
    assert not hasattr(pronghorn, "lode")
