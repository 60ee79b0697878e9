"""Cross entropy of logits: the kernel against the oracle, and both against fp64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import cross_entropy_kernels, tuned
from pronghorn.pallas_kernels.cross_entropy import cross_entropy
from tests.lowering import lower_for_h100
from tests.tolerances import assert_close

IGNORE = -100
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 3.0, "logit_scale": 0.5},
    {"label_smoothing": 0.2, "softcap": 5.0, "logit_scale": 1.5},
]


def _example(rows, vocab_size, dtype="float32", seed=0):
    """Logits of a spread like a model's, labels with every third row ignored, and a cotangent."""
    random = np.random.default_rng(
        seed
    )  # numpy: every eager jax operation would be one more program to compile
    labels = random.integers(0, vocab_size, rows, dtype=np.int32)
    labels[2::3] = IGNORE
    logits = 4.0 * random.standard_normal((rows, vocab_size), np.float32)
    return logits.astype(jnp.dtype(dtype)), labels, random.standard_normal(rows, np.float32)


def _loss_and_gradient(logits, labels, cotangent, **options):
    """(losses, the logits' gradient), compiled together."""

    @jax.jit
    def both(logits):
        losses, pull_back = jax.vjp(lambda x: cross_entropy(x, labels, **options), logits)
        return losses, pull_back(cotangent)[0]

    return both(logits)


def _losses(logits, labels, **options):
    return jax.jit(functools.partial(cross_entropy, **options))(logits, labels)


def _losses_fp64(logits, labels, label_smoothing=0.0, softcap=None, logit_scale=1.0):
    z = np.asarray(logits, np.float64) * logit_scale
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
    z = z - z[np.arange(len(z)), labels][:, None]  # relative to the label: nothing cancels
    others = np.exp(z)
    others[np.arange(len(z)), labels] = 0.0
    return np.log1p(others.sum(1)) - label_smoothing * z.mean(1)


def _check_against_oracle(rows, vocab_size, dtype, options):
    example = _example(rows, vocab_size, dtype)
    losses, gradient = _loss_and_gradient(*example, implementation="pallas", **options)
    expected_losses, expected_gradient = _loss_and_gradient(*example, implementation="xla", **options)
    assert losses.dtype == jnp.float32 and gradient.dtype == example[0].dtype
    assert_close(
        losses, expected_losses, what="losses"
    )  # fp32 arithmetic from the same logits, whatever their dtype
    assert_close(gradient, expected_gradient, what="gradient")


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_kernel_equals_the_oracle_forward_and_backward(options):
    _check_against_oracle(5, 1003, "float32", options)


@pytest.mark.parametrize(
    ("rows", "vocab_size", "dtype"),
    [
        (1, 128, "float16"),
        (3, 7, "float32"),
        (67, 1003, "float32"),
        (67, 1003, "bfloat16"),
        (2, 5000, "float16"),
    ],
)
def test_odd_shapes_and_every_dtype(rows, vocab_size, dtype):
    _check_against_oracle(rows, vocab_size, dtype, {})


@pytest.mark.parametrize("vocab_size", [128256, 151936])
def test_vocabularies_of_real_models(vocab_size):
    _check_against_oracle(3, vocab_size, "bfloat16", {})


@pytest.mark.parametrize("vocab_size", [100, 512, 1000])
@pytest.mark.parametrize("tile", [(128, 1, 1, 0), (128, 1, 0, 256), (128, 1, 1, 256), (128, 1, 1, 4096)])
def test_every_way_to_walk_a_row_gives_the_same(tile, vocab_size):
    rows, options = 5, cross_entropy_kernels.LossOptions(label_smoothing=0.1)
    logits, labels, cotangent = _example(rows, vocab_size)
    labels = np.abs(labels) % vocab_size

    def both():
        run = functools.partial(cross_entropy_kernels.loss_and_gradient, options=options, dtype=jnp.float32)
        return jax.jit(lambda *arguments: run(*arguments))(logits, labels, cotangent)

    with tuned.candidate("cross_entropy_loss_and_gradient", (128, 1)):
        expected = both()
    with tuned.candidate("cross_entropy_loss_and_gradient", tile):
        found = both()
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]], ids=str)
def test_losses_equal_fp64(implementation, options):
    logits, labels, _ = _example(6, 301)
    labels = np.abs(labels)
    losses = _losses(logits, labels, implementation=implementation, **options)
    assert_close(losses, _losses_fp64(logits, labels, **options))


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_a_loss_of_nearly_zero_keeps_its_relative_precision(implementation):
    """At a margin of 20 nats lse − z_y is 0 in fp32, and so would the label's gradient be."""
    logits = 0.1 * np.random.default_rng(1).standard_normal((1, 77), np.float32)
    logits[0, 5] = 20.0
    labels = np.array([5])
    losses, gradient = _loss_and_gradient(
        logits, labels, np.ones(1, np.float32), implementation=implementation
    )
    expected = _losses_fp64(logits, np.array([5]))
    assert 0.0 < expected[0] < 1e-6
    assert_close(losses, expected, what="loss")
    assert_close(gradient[:, 5], np.expm1(-expected), what="the label's gradient")


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_ignored_rows_give_exact_zeros_even_where_logits_are_not_finite(implementation):
    logits, labels, cotangent = _example(6, 301)
    logits[2], logits[5] = np.nan, np.inf
    losses, gradient = _loss_and_gradient(logits, labels, cotangent, implementation=implementation)
    assert np.all(np.asarray(losses)[2::3] == 0.0) and np.all(np.asarray(gradient)[2::3] == 0.0)
    assert np.all(np.isfinite(losses)) and np.all(np.isfinite(gradient))


def test_an_ignore_index_inside_the_vocabulary_is_ignored():
    logits, _, _ = _example(3, 301)
    losses = _losses(logits, np.array([0, 1, 0]), ignore_index=0, implementation="pallas")
    assert losses[0] == losses[2] == 0.0 and losses[1] > 0.0


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_a_label_outside_the_vocabulary_is_nan_in_its_row_only(implementation):
    logits, _, cotangent = _example(5, 301)
    labels = np.array([4, 301, 300, -1, 2**30])
    losses, gradient = _loss_and_gradient(logits, labels, cotangent, implementation=implementation)
    assert np.array_equal(np.isnan(losses), [False, True, False, True, True])
    assert np.array_equal(np.isnan(gradient).any(1), [False, True, False, True, True])


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_columns_of_minus_infinity_do_not_count(implementation):
    logits, labels, cotangent = _example(4, 301)
    labels = np.minimum(labels, 150)
    masked = np.where(np.arange(301) < 151, logits, -np.inf)
    losses, gradient = _loss_and_gradient(masked, labels, cotangent, implementation=implementation)
    expected, expected_gradient = _loss_and_gradient(logits[:, :151], labels, cotangent, implementation="xla")
    assert_close(losses, expected)
    assert_close(gradient[:, :151], expected_gradient)
    assert np.all(np.asarray(gradient)[:, 151:] == 0.0)


def test_a_nan_in_the_logits_reaches_the_loss():
    logits, labels, _ = _example(1, 301)
    logits, labels = logits.repeat(2, 0), labels.repeat(2)
    logits[:, 299] = np.nan, np.inf
    assert np.isnan(_losses(logits, labels, implementation="pallas")).all()


def test_leading_dimensions_jit_scan_checkpoint_and_vmap():
    logits, labels, _ = _example(6, 301)
    logits, labels = logits.reshape(2, 3, 301), labels.reshape(2, 3)
    loss = functools.partial(cross_entropy, implementation="pallas")

    def scanned(logits):
        def body(total, row):
            return total + jnp.sum(jax.checkpoint(loss)(*row) ** 2), None

        return jax.lax.scan(body, 0.0, (logits, labels))[0]

    def direct(logits, function):
        return jnp.sum(function(logits, labels) ** 2)

    oracle = functools.partial(cross_entropy, implementation="xla")
    expected = jax.jit(jax.grad(lambda x: direct(x, oracle)))(logits)
    assert_close(jax.jit(jax.grad(scanned))(logits), expected, what="scan of checkpoint")
    assert_close(jax.jit(jax.grad(lambda x: direct(x, loss)))(logits), expected, what="leading dimensions")
    assert_close(jax.jit(jax.grad(lambda x: direct(x, jax.vmap(loss))))(logits), expected, what="vmap")


def test_no_rows_give_no_losses():
    assert cross_entropy(jnp.zeros((0, 7)), jnp.zeros((0,), jnp.int32), implementation="pallas").shape == (0,)


def test_bad_arguments_are_refused_in_words():
    logits, labels = jnp.zeros((2, 5)), jnp.zeros((2,), jnp.int32)
    for arguments, options in [
        ((logits, labels[:1]), {}),
        ((logits, labels.astype(jnp.float32)), {}),
        ((logits, labels), {"label_smoothing": 1.0}),
        ((logits, labels), {"softcap": 0.0}),
        ((logits, labels), {"implementation": "cudnn"}),
    ]:
        with pytest.raises(InputError):
            cross_entropy(*arguments, **options)


@pytest.mark.parametrize(
    ("rows", "vocab_size", "dtype"),
    [(4096, 128256, "float32"), (32768, 151936, "bfloat16"), (67, 1003, "float16")],
)
def test_lowers_for_an_h100(rows, vocab_size, dtype):
    """The second shape is past 4 GiB: its offsets are 64-bit."""

    def gradient(logits, labels):
        options = {"label_smoothing": 0.1, "softcap": 30.0}
        return jax.grad(lambda x: jnp.sum(cross_entropy(x, labels, implementation="pallas", **options)))(
            logits
        )

    text = lower_for_h100(
        gradient, jax.ShapeDtypeStruct((rows, vocab_size), dtype), jax.ShapeDtypeStruct((rows,), jnp.int32)
    )
    assert text.count("cross_entropy_forward") and text.count("cross_entropy_backward")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("vocab_size", "options"),
    [
        *((size, OPTIONS[-1]) for size in (128256, 151936, 49152, 100003)),
        *((1003, options) for options in OPTIONS),
    ],
    ids=str,
)
def test_on_a_gpu_at_full_size(vocab_size, options, dtype):
    _check_against_oracle(131, vocab_size, dtype, options)


@pytest.mark.gpu
def test_on_a_gpu_past_4_gib():
    """The last rows of logits whose offsets need 64 bits equal the same rows alone."""
    rows, vocab_size = 17000, 128256
    tail = _example(7, vocab_size, "bfloat16")
    logits = jnp.zeros((rows, vocab_size), jnp.bfloat16).at[-7:].set(tail[0])
    labels = jnp.zeros((rows,), jnp.int32).at[-7:].set(tail[1])
    cotangent = jnp.ones((rows,)).at[-7:].set(tail[2])
    losses, gradient = _loss_and_gradient(logits, labels, cotangent, implementation="pallas")
    expected_losses, expected_gradient = _loss_and_gradient(*tail, implementation="xla")
    assert_close(losses[-7:], expected_losses)
    assert_close(gradient[-7:], expected_gradient)
