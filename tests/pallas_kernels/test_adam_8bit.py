"""Adam's and Lion's step on 8-bit moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.pallas_kernels.adam_8bit import adam_8bit, zero_moment
from pronghorn.pallas_kernels.blockwise_8bit import dequantize_blockwise
from pronghorn.pallas_kernels.lion_8bit import lion_8bit
from tests.lowering import lower_for_h100
from tests.tolerances import KERNEL, assert_close

SETTINGS = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6}


@functools.partial(jax.jit, static_argnames=("implementation", "in_place"))
def adam(gradient, first, second, count, scale=1.0, applied=True, *, implementation=None, in_place=True):
    return adam_8bit(
        *(gradient, first, second, count),
        **SETTINGS,
        gradient_scale=scale,
        applied=applied,
        in_place=in_place,
        implementation=implementation,
    )


@functools.partial(jax.jit, static_argnames=("implementation", "in_place"))
def lion(gradient, moment, scale=1.0, applied=True, *, implementation=None, in_place=True):
    options = {
        "gradient_scale": scale,
        "applied": applied,
        "in_place": in_place,
        "implementation": implementation,
    }
    return lion_8bit(gradient, moment, beta1=0.9, beta2=0.99, **options)


def zeros(shape):
    return zero_moment(shape, signed=True), zero_moment(shape, signed=False)


def gradients(shape, dtype="float32", *, steps=3, seed=0):
    """Normal numbers whose size differs by two decades along the last axis."""
    random = np.random.default_rng(seed)
    size = 10.0 ** np.linspace(-2, 0, shape[-1])
    return [jnp.asarray(random.standard_normal(shape) * size, dtype) for _ in range(steps)]


def assert_codes_close(actual, expected):
    """Equal, but for values that stand between two codes: compilers round b m + (1 - b) g once or twice."""
    assert_close(actual.absmax, expected.absmax)
    distance = np.abs(np.asarray(actual.codes, np.int32) - np.asarray(expected.codes))
    assert distance.max() <= 1 and np.mean(distance) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kernels_take_the_steps_of_their_oracles(dtype):
    shape = (3, 259) if dtype == "float32" else (7,)
    kernel, oracle = zeros(shape), zeros(shape)
    moments = {name: zero_moment(shape, signed=True) for name in ("pallas", "xla")}
    for count, gradient in enumerate(gradients(shape, dtype), start=1):
        ours, *kernel = adam(gradient, *kernel, count, 0.5, implementation="pallas")
        expected, *oracle = adam(gradient, *oracle, count, 0.5, implementation="xla")
        assert_close(ours, expected)
        for actual, wanted in zip(kernel, oracle, strict=True):
            assert_codes_close(actual, wanted)
        ours, moments["pallas"] = lion(gradient, moments["pallas"], 0.5, implementation="pallas")
        expected, moments["xla"] = lion(gradient, moments["xla"], 0.5, implementation="xla")
        assert np.mean(np.asarray(ours) != np.asarray(expected)) < 1e-3
        assert_codes_close(moments["pallas"], moments["xla"])


@pytest.mark.parametrize(
    "options",
    [
        {"implementation": "xla"},
        {"implementation": "pallas"},
        {"implementation": "pallas", "in_place": False},
    ],
)
def test_a_step_that_is_not_applied_changes_no_bit(options):
    shape = (3, 259)
    first, second = zeros(shape)
    gradient, poison = gradients(shape, steps=1)[0], jnp.full(shape, jnp.nan)
    _, first, second = adam(gradient, first, second, 1, **options)
    update, *after = adam(poison, first, second, 2, 1.0, False, **options)
    assert np.all(np.asarray(update) == 0)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves((first, second)), strict=True):
        assert np.array_equal(new, old)
    _, moment = lion(gradient, first, **options)
    update, after = lion(poison, moment, 1.0, False, **options)
    assert np.all(np.asarray(update) == 0)
    assert all(np.array_equal(new, old) for new, old in zip(after, moment, strict=True))


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_the_first_step_is_that_of_adam_and_a_gradient_of_zero_moves_nothing(implementation):
    gradient = jnp.linspace(-1, 1, 257).at[3].set(0.0)
    update, first, second = adam(gradient, *zeros((257,)), 1, implementation=implementation)
    assert_close(update, gradient / (jnp.abs(gradient) + 1e-6), dtype="float32")
    assert float(update[3]) == 0 and int(first.codes[3]) == 127 and int(second.codes[3]) == 0


def test_a_second_moment_that_is_not_zero_never_becomes_zero():
    """bitsandbytes' rule would give m / eps; ours a denominator of the map's smallest entry."""
    gradient = jnp.full((256,), 1e-5).at[0].set(1.0)
    first, second = zeros((256,))
    for count in range(1, 20):
        update, first, second = adam(gradient, first, second, count, implementation="xla")
    assert int(second.codes[1:].min()) == int(second.codes[1:].max()) == 1
    assert np.all(np.asarray(dequantize_blockwise(second, signed=False)) > 0)
    # Without the floor: 1e-5 / 1e-6. True Adam: 1.
    assert float(jnp.max(update)) <= 1 + KERNEL["float32"]


def test_moments_take_two_bytes_and_a_fraction_an_element():
    shape = (576, 1536)
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves(zeros(shape)))
    assert taken / (576 * 1536) <= 2.04


@pytest.mark.parametrize("shape", [(64, 256), (7, 33)])
def test_lowers_for_an_h100(shape):
    first, second = zeros(shape)

    def both(gradient, first, second):
        update, first, second = adam_8bit(
            gradient, first, second, jnp.int32(3), **SETTINGS, implementation="pallas"
        )
        return lion_8bit(update, first, beta1=0.9, beta2=0.99, implementation="pallas"), second

    text = lower_for_h100(both, jnp.zeros(shape, jnp.bfloat16), first, second)
    assert "adam_8bit" in text and "lion_8bit" in text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_take_the_steps_of_their_oracles_on_a_gpu(dtype):
    for shape in ((1536, 576), (1023, 77), (5,)):
        kernel, oracle = zeros(shape), zeros(shape)
        for count, gradient in enumerate(gradients(shape, dtype), start=1):
            ours, *kernel = adam(gradient, *kernel, count, 0.5, implementation="pallas")
            expected, *oracle = adam(gradient, *oracle, count, 0.5, implementation="xla")
            assert_close(ours, expected)
            for actual, wanted in zip(kernel, oracle, strict=True):
                assert_codes_close(actual, wanted)
            signs, moment = lion(gradient, oracle[0], 0.5, implementation="pallas")
            expected, wanted = lion(gradient, oracle[0], 0.5, implementation="xla")
            assert jnp.mean(signs != expected) < 1e-3
            assert_codes_close(moment, wanted)
            kernel = oracle  # a code that differs by one is another start of the next step
        poison = jnp.full(shape, jnp.nan, dtype)
        update, *after = adam(poison, *kernel, 9, 1.0, False, implementation="pallas")
        assert jnp.all(update == 0)
        pairs = zip(jax.tree.leaves(after), jax.tree.leaves(kernel), strict=True)
        assert all(jnp.array_equal(new, old) for new, old in pairs)
