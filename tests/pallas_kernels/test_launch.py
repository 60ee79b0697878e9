"""The choice of implementations and the launch helper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

import pronghorn.pallas_kernels.launch as launch
from pronghorn.errors import InputError
from tests.lowering import lower_for_h100


def add_one_kernel(x_ref, out_ref, *, block):
    index = pl.program_id(0) * block + jnp.arange(block)
    mask = launch.in_bounds(x_ref.shape, index)
    triton.store(out_ref.at[index], triton.load(x_ref.at[index], mask=mask, other=0.0) + 1, mask=mask)


def add_one(x):
    return launch.pallas_call(
        functools.partial(add_one_kernel, block=4),
        name="add_one",
        grid=(launch.cdiv(x.size, 4),),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    )(x)


def test_an_argument_beats_the_forced_choice():
    with launch.kernels("xla"):
        assert launch.resolve("pallas") == "pallas"


def test_the_forced_choice_beats_the_default():
    with launch.kernels("pallas"):
        assert launch.resolve(None, default_gpu="xla") == "pallas"


def test_an_op_without_the_forced_choice_keeps_its_default():
    with launch.kernels("cudnn"):
        assert launch.resolve(None, default_gpu="xla") == "xla"


def test_the_default_follows_the_default_device():
    with jax.default_device(jax.devices("cpu")[0]):
        assert launch.resolve(None) == "xla"
        assert launch.resolve(None, default_cpu="pallas") == "pallas"


def test_the_inner_choice_wins_and_the_outer_returns():
    with launch.kernels("pallas"):
        with pytest.raises(RuntimeError), launch.kernels("xla"):
            assert launch.resolve(None) == "xla"
            raise RuntimeError
        assert launch.resolve(None) == "pallas"


@pytest.mark.parametrize("name", ["triton", "", "PALLAS"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(InputError, match="use one of pallas, xla, cudnn"):
        launch.resolve(name)
    with pytest.raises(InputError, match="use one of"), launch.kernels(name):
        pass


def test_a_name_the_op_lacks_is_refused():
    with pytest.raises(InputError, match="does not exist for this op"):
        launch.resolve("cudnn")


def test_a_compiled_function_is_traced_again_under_another_choice():
    traces = []

    @jax.jit
    def choice(x):
        traces.append(launch.resolve(None))
        return x

    with launch.kernels("pallas"):
        choice(1.0)
    with launch.kernels("xla"):
        choice(1.0)
    with launch.kernels("pallas"):
        choice(1.0)
    assert traces == ["pallas", "xla"]


def test_a_kernel_masks_what_its_last_block_lacks():
    np.testing.assert_array_equal(jax.jit(add_one)(jnp.arange(10.0)), np.arange(10.0) + 1)


def test_a_kernel_interpreted_before_can_be_lowered_for_a_gpu():
    function = jax.jit(add_one)
    function(jnp.zeros(6))
    assert "add_one" in lower_for_h100(function, jax.ShapeDtypeStruct((6,), jnp.float32))


def test_a_kernel_launched_twice_is_traced_once():
    traced = []

    def kernel(x_ref, out_ref, *, value):
        traced.append(value)
        out_ref[...] = x_ref[...] + value

    def add(x, value):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return launch.pallas_call(
            functools.partial(kernel, value=value), name="add", grid=(1,), out_shape=shape
        )(x)

    jaxpr = jax.make_jaxpr(lambda x: add(add(x, 2), 2))(jnp.ones(4))
    assert traced == [2]
    calls = [equation for equation in jaxpr.jaxpr.eqns if equation.primitive.name == "pallas_call"]
    assert len(calls) == 2
    assert calls[0].params["jaxpr"] is calls[1].params["jaxpr"]


def test_parameters_that_are_equal_and_of_other_types_are_other_kernels():
    seen = []

    def kernel(x_ref, out_ref, *, values):
        seen.append(values)
        out_ref[...] = x_ref[...]

    for values in ((1, 2), (1.0, 2), (True, 2)):
        launch.pallas_call(
            functools.partial(kernel, values=values),
            name="copy",
            grid=(1,),
            out_shape=jax.ShapeDtypeStruct((4,), jnp.float32),
        )(jnp.ones(4))
    assert [type(values[0]) for values in seen] == [int, float, bool]


def test_a_static_value_survives_jit_as_itself():
    assert jax.jit(lambda s: s)(launch.Static(("x", 1))).value == ("x", 1)


@pytest.mark.parametrize("n, power", [(1, 1), (2, 2), (3, 4), (576, 1024), (1024, 1024), (1025, 2048)])
def test_next_power_of_2(n, power):
    assert launch.next_power_of_2(n) == power


@pytest.mark.parametrize("a, b, quotient", [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_cdiv(a, b, quotient):
    assert launch.cdiv(a, b) == quotient


@pytest.mark.parametrize("elements, warps", [(1, 1), (1024, 1), (1025, 2), (4096, 4), (1 << 20, 16)])
def test_warps_are_a_power_of_two_within_limits(elements, warps):
    assert launch.warps_for(elements) == warps
