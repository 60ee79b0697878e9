"""`doctor` tells what the machine has and fails when a kernel is wrong."""

import json

import jax
import jax.numpy as jnp
import pytest

from pronghorn import pallas_kernels
from pronghorn.verification import doctor
from tests.cli.conftest import invoke


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    path = tmp_path_factory.mktemp("doctor") / "doctor.json"
    return invoke("doctor", "--json", path), json.loads(path.read_text())


def test_every_kernel_is_right_on_this_machine(examined):
    finished, numbers = examined
    assert finished.code == 0 and numbers["passed"], finished.out
    assert all(check["error"] <= doctor.LIMIT[numbers["dtype"]] for check in numbers["kernels"].values())


def test_no_op_of_the_package_is_left_out(examined):
    ops = {name.removeprefix("apply_") for name in pallas_kernels.__all__}
    # a type; a switch; the forward half of linear_cross_entropy
    ops -= {"LinearWeights", "kernels", "linear_token_losses"}
    assert ops <= set(examined[1]["kernels"])


def test_devices_and_versions_are_told(examined):
    finished, numbers = examined
    assert numbers["device_count"] == len(jax.devices())
    assert numbers["versions"]["jax"] == jax.__version__ and jax.__version__ in finished.out
    assert jax.devices()[0].device_kind in finished.out


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x * 1.05, lambda x: x.at[0].set(jnp.nan), lambda x: x + 0.1 * jax.lax.stop_gradient(x)],
)
def test_wrong_kernel_is_named_and_the_command_exits_1(monkeypatch, tmp_path, wrong):
    """Wrong everywhere, not a number in one place, and right nowhere but in the gradient."""

    def op(implementation, x):
        return jnp.sin(wrong(x)) if implementation == "pallas" else jnp.sin(x)

    monkeypatch.setattr(doctor, "_cases", lambda dtype: {"sine": (op, [jnp.ones(7, dtype)], "pallas")})
    finished = invoke("doctor", "--json", tmp_path / "doctor.json")
    numbers = json.loads((tmp_path / "doctor.json").read_text())
    assert finished.code == 1 and not numbers["passed"] and not numbers["kernels"]["sine"]["passed"]
    assert any(line.startswith("sine") and "WRONG" in line for line in finished.out.splitlines())


def test_wrong_gradient_alone_is_found():
    @jax.custom_vjp
    def wrong(x):
        return jnp.sin(x)

    wrong.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g,))
    error = doctor._largest_error(
        lambda i, x: wrong(x) if i == "pallas" else jnp.sin(x), [jnp.ones(7)], "pallas"
    )
    assert error > 0.4
