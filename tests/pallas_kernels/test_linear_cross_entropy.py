"""The head and its cross entropy by tiles: against the oracle with all logits, and what it must not compute or hold."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.linear_cross_entropy import (
    default_tile_rows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_token_losses,
)
from tests.lowering import lower_for_h100
from tests.tolerances import assert_close

op = importlib.import_module(
    "pronghorn.pallas_kernels.linear_cross_entropy"
)  # the package has a function so named
IGNORE = -100
EVERYTHING = {"lora_scale": 0.5, "label_smoothing": 0.1, "softcap": 15.0, "logit_scale": 0.7}


def _example(rows=67, vocab_size=1003, width=24, rank=4, dtype="float32", seed=0):
    """(all arrays that have a gradient, labels with every third row ignored)."""
    random = np.random.default_rng(
        seed
    )  # numpy: every eager jax operation would be one more program to compile
    normal = lambda *shape: random.standard_normal(shape, np.float32)  # noqa: E731
    arrays = {
        "hidden": normal(rows, width).astype(jnp.dtype(dtype)),
        "weight": normal(vocab_size, width).astype(jnp.dtype(dtype)),
        "bias": normal(vocab_size).astype(jnp.dtype(dtype)),
        "lora_a": normal(rank, width) / np.float32(width**0.5),
        "lora_b": normal(vocab_size, rank),
        "token_weights": random.random(rows, np.float32),
    }
    labels = random.integers(0, vocab_size, rows, dtype=np.int32)
    labels[2::3] = IGNORE
    return arrays, labels


def _value_and_gradients(arrays, labels, names=None, function=linear_cross_entropy, **options):
    """(loss, gradients of the arrays named, by default all), compiled together."""
    chosen = {name: arrays[name] for name in names or arrays}
    loss = lambda chosen: function(labels=labels, **{**arrays, **chosen}, **options)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(chosen)


def _check_against_oracle(arrays, labels, *, names=None, implementation="pallas", tile_rows=16, **options):
    loss, gradients = _value_and_gradients(
        arrays, labels, names, implementation=implementation, tile_rows=tile_rows, **options
    )
    expected_loss, expected = _value_and_gradients(
        arrays, labels, names, linear_cross_entropy_reference, **options
    )
    assert_close(loss, expected_loss, what="loss", dtype=arrays["hidden"].dtype)
    for name in gradients:
        assert gradients[name].dtype == arrays[name].dtype
        assert_close(gradients[name], expected[name], what=name, dtype=arrays["hidden"].dtype)


def _frozen(arrays, *names):
    return {name: value for name, value in arrays.items() if name in ("hidden", "weight", *names)}


def _avals(jaxpr):
    """Every value a jaxpr computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _avals(inner)


# --------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_loss_and_every_gradient_equal_the_oracle(implementation):
    _check_against_oracle(*_example(), implementation=implementation, **EVERYTHING)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_gradients_equal_the_oracle(dtype):
    _check_against_oracle(*_example(dtype=dtype), lora_scale=0.5)


def test_fewer_rows_than_a_tile():
    arrays, labels = _example(1)
    _check_against_oracle(_frozen(arrays), labels)


@pytest.mark.parametrize("vocab_size", [128256, 151936])
def test_vocabularies_of_real_models(vocab_size):
    arrays, labels = _example(3, vocab_size, width=4)
    _check_against_oracle(_frozen(arrays), labels, names=["hidden"], tile_rows=2)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_a_loss_of_nearly_zero_keeps_its_relative_precision(implementation):
    """A margin of 20 nats, where lse − z_y rounds to zero in fp32; gradients against fp64 too."""
    vocab_size, labels = 37, np.array([5, 9])
    hidden = np.eye(2, 3, dtype=np.float32)
    weight = 0.1 * np.random.default_rng(3).standard_normal((vocab_size, 3), np.float32)
    weight[5, 0] = weight[9, 1] = 20.0
    loss, gradients = _value_and_gradients(
        {"hidden": hidden, "weight": weight}, labels, implementation=implementation
    )
    z = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T
    odds = np.exp(z - z[[0, 1], labels][:, None])
    odds[[0, 1], labels] = 0.0
    total = odds.sum(1, keepdims=True)
    g = odds / (1 + total)
    g[[0, 1], labels] = -(total / (1 + total))[:, 0]
    assert 0 < np.log1p(total).sum() < 1e-6
    assert_close(loss, np.log1p(total).sum(), what="loss")
    assert_close(gradients["weight"], g.T @ np.asarray(hidden, np.float64), what="weight")
    assert_close(gradients["hidden"], g @ np.asarray(weight, np.float64), what="hidden")


@pytest.mark.parametrize("token_weight", [1.0, 2.0**-20])
def test_fp16_keeps_gradients_of_logits_near_and_below_its_smallest_number(token_weight):
    """Each of 1,002 probabilities is 1.1e-7, twice fp16's smallest number; a token weight puts them far below it."""
    weight = np.tile(np.float16([[0, 1]]), (1003, 1))
    weight[7] = [16, 0]
    arrays = {"hidden": np.float16([[1, 0]]), "weight": weight}
    arrays["token_weights"] = np.full(1, token_weight, np.float32)
    function = lambda **arguments: linear_cross_entropy(**arguments) / token_weight  # noqa: E731
    _, gradients = _value_and_gradients(arrays, np.array([7]), ["hidden"], function, implementation="pallas")
    others = 1002 * np.exp(-16.0) / (1 + 1002 * np.exp(-16.0))
    assert_close(gradients["hidden"][0, 1], others)


def test_token_losses_are_the_rows_of_the_sum():
    arrays, labels = _example()
    options = {**EVERYTHING, "tile_rows": 16, "implementation": "pallas"}
    token_weights = arrays.pop("token_weights")
    losses = jax.jit(functools.partial(linear_token_losses, **options))(labels=labels, **arrays)
    total = jax.jit(functools.partial(linear_cross_entropy, **options))(
        labels=labels, token_weights=token_weights, **arrays
    )
    assert losses.shape == labels.shape and losses.dtype == jnp.float32
    assert np.all(np.asarray(losses)[2::3] == 0.0)
    assert_close(total, np.sum(losses * token_weights))


def test_the_loss_does_not_depend_on_the_tile():
    arrays, labels = _example()
    results = [_value_and_gradients(arrays, labels, tile_rows=rows, implementation="xla") for rows in (8, 64)]
    jax.tree.map(assert_close, *results)


# ------------------------------------------------------------------------------------------------- rows that are not


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_all_labels_ignored_give_zero_and_zero_gradients(implementation):
    arrays, labels = _example(5)
    loss, gradients = _value_and_gradients(
        arrays, np.full_like(labels, IGNORE), implementation=implementation, **EVERYTHING
    )
    assert loss == 0.0
    for name, gradient in gradients.items():
        assert np.all(np.asarray(gradient) == 0.0), name


def test_one_row_that_counts_among_ignored_ones_equals_that_row_alone():
    arrays, labels = _example(20)
    arrays = _frozen(arrays)
    one = np.full_like(labels, IGNORE)
    one[13] = 7
    loss, gradients = _value_and_gradients(arrays, one, tile_rows=8, implementation="pallas")
    alone = {**arrays, "hidden": arrays["hidden"][13:14]}
    expected_loss, expected = _value_and_gradients(alone, one[13:14], implementation="xla")
    assert_close(loss, expected_loss)
    assert_close(gradients["weight"], expected["weight"])
    assert_close(gradients["hidden"][13], expected["hidden"][0])
    assert not np.any(np.delete(np.asarray(gradients["hidden"]), 13, axis=0))


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_ignored_rows_are_never_multiplied(implementation):
    """Their hidden states are NaN, which any product would spread over the gradient of the weight."""
    arrays, labels = _example(20)
    arrays["hidden"][2::3] = arrays["token_weights"][2::3] = np.nan
    result = _value_and_gradients(arrays, labels, tile_rows=8, implementation=implementation)
    for leaf in jax.tree.leaves(result):
        assert np.all(np.isfinite(leaf))


def test_the_number_of_tiles_follows_from_the_rows_that_count(monkeypatch):
    arrays, labels = _example(64)
    weight, counted = arrays["weight"], []

    def counting(static, head, hidden, *rest):
        jax.debug.callback(lambda: counted.append(1))
        return original(static, head, hidden, *rest)

    original = op._tile_gradients
    monkeypatch.setattr(op, "_tile_gradients", counting)
    gradient = jax.jit(
        jax.grad(lambda hidden, labels: linear_cross_entropy(hidden, weight, labels, tile_rows=8))
    )
    for valid, tiles in [(64, 8), (17, 3), (8, 1), (0, 0)]:
        counted.clear()
        some = np.where(np.arange(64) < valid, np.abs(labels), IGNORE)[::-1]
        jax.block_until_ready(gradient(arrays["hidden"], some))
        jax.effects_barrier()
        assert len(counted) == tiles


@pytest.mark.parametrize("counted", [64, 17])
def test_a_gpu_s_loop_of_fixed_length_and_its_loop_for_fewer_rows_equal_the_oracle(counted):
    arrays, labels = _example(64, 301)
    labels = np.where(np.arange(64) < counted, np.abs(labels), IGNORE)[::-1]
    with launch.interpret(False):  # "xla" runs no kernel that would need a GPU
        _check_against_oracle(arrays, labels, implementation="xla", names=["hidden", "weight"])


def test_a_label_outside_the_vocabulary_is_nan_in_its_row_only():
    arrays, _ = _example(4, 301)
    labels = np.array([4, 301, -1, 300])
    loss, gradients = _value_and_gradients(
        _frozen(arrays), labels, ["hidden"], tile_rows=4, implementation="pallas"
    )
    assert np.isnan(loss)
    assert np.array_equal(np.isnan(gradients["hidden"]).any(1), [False, True, True, False])


def test_no_rows_give_a_loss_of_zero():
    arrays, labels = _example(0)
    loss, gradients = _value_and_gradients(arrays, labels)
    assert loss == 0.0 and not np.any(gradients["weight"])


# ------------------------------------------------------------------------------------- what is not computed, not held


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_frozen_weight_gets_no_cotangent(checkpointed):
    """No fp32 value of the weight's shape anywhere in the program, which has one where the weight is trained."""
    arrays, labels = _example(dtype="bfloat16")

    def shapes(*names):
        def loss(chosen):
            def call(chosen):
                return linear_cross_entropy(
                    labels=labels, **{**_frozen(arrays, "lora_a", "lora_b"), **chosen}
                )

            return (jax.checkpoint(call) if checkpointed else call)(chosen)

        jaxpr = jax.make_jaxpr(jax.jit(jax.grad(loss)))({name: arrays[name] for name in names})
        return {(aval.shape, str(aval.dtype)) for aval in _avals(jaxpr.jaxpr)}

    weight, lora_a, lora_b = ((1003, 24), "float32"), ((4, 24), "float32"), ((1003, 4), "float32")
    assert {weight, lora_a, lora_b}.isdisjoint(shapes("hidden"))
    assert {lora_a, lora_b} <= shapes("hidden", "lora_a", "lora_b")
    assert weight in shapes("hidden", "weight")


def test_a_loss_without_a_gradient_computes_no_gradient():
    arrays, labels = _example(dtype="bfloat16")
    loss = lambda arrays: linear_cross_entropy(labels=labels, **arrays)  # noqa: E731

    def shapes(function):
        jaxpr = jax.make_jaxpr(function)(_frozen(arrays)).jaxpr
        return {(aval.shape, str(aval.dtype)) for aval in _avals(jaxpr)}

    assert ((67, 24), "bfloat16") not in shapes(loss)
    assert ((67, 24), "bfloat16") in shapes(jax.grad(loss))


class _Quantized:
    """A weight of one scale a row, as the library's quantised arrays look from here."""

    def __init__(self, codes, scales):
        self.codes, self.scales, self.shape = codes, scales, codes.shape

    def dequantize(self):
        return jnp.asarray(self.codes, jnp.float32) * self.scales[:, None]


def test_a_quantised_weight_is_dequantised_and_frozen():
    arrays, labels = _example()
    codes, scales = np.round(10 * arrays["weight"]).astype(np.int8), np.full(1003, 0.1, np.float32)

    def loss(hidden, scales):
        return linear_cross_entropy(hidden, _Quantized(codes, scales), labels)

    gradient, scale_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(arrays["hidden"], scales)
    dense = {"hidden": arrays["hidden"], "weight": codes * np.float32(0.1)}
    assert_close(gradient, _value_and_gradients(dense, labels, ["hidden"])[1]["hidden"])
    assert not np.any(scale_gradient)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_no_program_holds_the_logits_of_all_rows(implementation):
    rows, vocab_size, tile_rows = 512, 1003, 8
    arrays, labels = _example(rows, vocab_size, width=8)

    def loss(arrays, function, **options):
        return function(labels=labels, **arrays, **options)

    def largest(function, **options):
        gradient = jax.jit(jax.grad(functools.partial(loss, function=function, **options)))
        values = max(aval.size for aval in _avals(jax.make_jaxpr(gradient)(arrays).jaxpr))
        return values, gradient.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    values, temporary = largest(linear_cross_entropy, tile_rows=tile_rows, implementation=implementation)
    assert values < rows * vocab_size / 10
    if (
        jax.default_backend() == "gpu"
    ):  # cuBLAS's workspace alone is larger; the last test of this file measures there
        return
    assert temporary < rows * vocab_size * 4 / 2
    if implementation == "xla":  # and the measure sees all logits where they are
        values, temporary = largest(linear_cross_entropy_reference)
        assert values >= rows * vocab_size and temporary >= rows * vocab_size * 4


@pytest.mark.parametrize(("on_gpu", "budget", "multiple"), [(True, 640 * 2**20, 128), (False, 32 * 2**20, 8)])
def test_the_default_tile_stays_within_its_budget(monkeypatch, on_gpu, budget, multiple):
    monkeypatch.setattr(op.launch, "on_gpu", lambda: on_gpu)
    for vocab_size in (1003, 49152, 128256, 262144):
        rows = default_tile_rows(10**6, vocab_size)
        assert rows % multiple == 0 and budget / 2 < rows * vocab_size * 4 <= budget
    assert default_tile_rows(67, 1003) == -(-67 // multiple) * multiple
    assert default_tile_rows(10**6, 128256, about=2560) == (2048 if on_gpu else 64)


@pytest.mark.parametrize(
    ("vocab_size", "rows"), [(128256, 1024), (151936, 1024), (201088, 512), (262144, 512)]
)
def test_the_default_tiles_of_a_row_of_4096_are_full(monkeypatch, vocab_size, rows):
    """Six tiles of 768 rows would multiply an eighth more."""
    monkeypatch.setattr(op.launch, "on_gpu", lambda: True)
    assert default_tile_rows(4096, vocab_size) == rows


# ------------------------------------------------------------------------------------------------------ transformations


def test_the_sum_over_micro_batches_under_scan_and_checkpoint_equals_one_batch():
    arrays, labels = _example(60)
    arrays = _frozen(arrays, "lora_a", "lora_b")
    others = {name: value for name, value in arrays.items() if name != "hidden"}

    def micro(others, hidden, labels):
        return linear_cross_entropy(hidden, labels=labels, tile_rows=8, implementation="pallas", **others)

    @jax.jit
    def scanned(others):
        def body(carry, batch):
            value = jax.value_and_grad(jax.checkpoint(micro))(others, *batch)
            return jax.tree.map(jnp.add, carry, value), None

        start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, others))
        batches = (arrays["hidden"].reshape(4, 15, -1), labels.reshape(4, 15))
        return jax.lax.scan(body, start, batches)[0]

    expected = _value_and_gradients(arrays, labels, list(others), implementation="xla")
    jax.tree.map(assert_close, scanned(others), expected)


def test_the_upstream_factor_scales_every_gradient():
    arrays, labels = _example(9)
    loss, gradients = _value_and_gradients(arrays, labels)
    third = lambda **arguments: jnp.square(linear_cross_entropy(**arguments)) / 3  # noqa: E731
    _, scaled = _value_and_gradients(arrays, labels, function=third)
    jax.tree.map(lambda a, b: assert_close(a, b * (2 * loss / 3)), scaled, gradients)


def test_bad_arguments_are_refused_in_words():
    arrays, labels = _example(4, 9, width=3, rank=2)
    for change in [
        {"labels": labels[:3]},
        {"labels": labels.astype(np.float32)},
        {"hidden": arrays["hidden"][:, :2]},
        {"hidden": arrays["hidden"][None]},
        {"bias": arrays["bias"][:5]},
        {"lora_a": None},
        {"lora_b": arrays["lora_b"][:, :1]},
        {"token_weights": arrays["token_weights"][:1]},
        {"label_smoothing": -0.1},
        {"tile_rows": 0},
    ]:
        with pytest.raises(InputError):
            linear_cross_entropy(**{**arrays, "labels": labels, **change})


# ------------------------------------------------------------------------------------------------------------- the GPU


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(128256, "bfloat16"), (151936, "float32"), (1003, "float16")]
)
def test_lowers_for_an_h100(vocab_size, dtype):
    def gradient(hidden, weight, labels):
        def loss(hidden):
            return linear_cross_entropy(
                hidden, weight, labels, tile_rows=1024, softcap=30.0, implementation="pallas"
            )

        return jax.grad(loss)(hidden), linear_token_losses(hidden, weight, labels, implementation="pallas")

    shape = jax.ShapeDtypeStruct
    text = lower_for_h100(
        gradient, shape((4096, 2048), dtype), shape((vocab_size, 2048), dtype), shape((4096,), jnp.int32)
    )
    assert "cross_entropy_loss_and_gradient" in text and "cross_entropy_forward" in text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("vocab_size", [128256, 151936, 49152, 100003, 1003])
def test_on_a_gpu_every_gradient_equals_the_oracle(vocab_size, dtype):
    arrays, labels = _example(203, vocab_size, width=64, dtype=dtype)
    arrays["weight"] = arrays["weight"] / 8
    _check_against_oracle(arrays, labels, tile_rows=64, **EVERYTHING)


@pytest.mark.gpu
def test_on_a_gpu_two_runs_are_equal_bit_for_bit():
    arrays, labels = _example(203, 49152, width=64, dtype="bfloat16")
    first, second = (_value_and_gradients(arrays, labels, tile_rows=64) for _ in range(2))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), first, second)


@pytest.mark.gpu
def test_on_a_gpu_the_default_tile_keeps_memory_far_below_all_logits():
    rows, vocab_size, width = 8192, 128256, 256
    shape = jax.ShapeDtypeStruct
    loss = lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels)  # noqa: E731
    compiled = jax.jit(jax.grad(loss)).lower(
        shape((rows, width), jnp.bfloat16),
        shape((vocab_size, width), jnp.bfloat16),
        shape((rows,), jnp.int32),
    )
    # An fp32 tile, its bf16 gradient, and little else; all logits would be 4.2 GB in fp32 alone.
    assert compiled.compile().memory_analysis().temp_size_in_bytes < 2 * op.TILE_BYTES_GPU
