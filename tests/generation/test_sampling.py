"""Choosing tokens: what is kept, and how often each is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.generation.sampling import Sampling, choose, keep_likely, row_keys, step_keys

# probabilities .5 .25 .125 .0625 .0625, out of order
PROBABILITIES = np.array([0.0625, 0.5, 0.125, 0.25, 0.0625])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))


def _kept(top_k, top_p):
    return np.flatnonzero(np.isfinite(np.asarray(keep_likely(LOGITS, top_k, top_p)))).tolist()


def test_top_k_keeps_the_k_likeliest():
    assert _kept(1, 1.0) == [1]
    assert _kept(3, 1.0) == [1, 2, 3]
    assert _kept(0, 1.0) == _kept(5, 1.0) == _kept(99, 1.0) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_fewest_that_reach_the_probability():
    assert _kept(0, 0.4) == [1]
    assert _kept(0, 0.51) == [1, 3]
    assert _kept(0, 0.76) == [1, 2, 3]
    assert _kept(0, 1e-9) == [1]


def test_top_p_counts_within_the_top_k():
    # of the top two, .5 is two thirds: alone enough for 0.6, which of all it is not
    assert _kept(2, 0.6) == [1]
    assert _kept(0, 0.6) == [1, 3]


def test_equal_logits_stay_or_go_together():
    assert _kept(4, 1.0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("top_k, top_p", [(0, 0.9), (7, 1.0), (20, 0.5), (1, 0.3), (0, 1.0)])
def test_what_is_kept_is_what_transformers_keeps(top_k, top_p):
    torch = pytest.importorskip("torch")
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(0, 3, (5, 97)).astype(np.float32)
    expected = torch.from_numpy(logits.copy())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    np.testing.assert_array_equal(
        np.asarray(keep_likely(jnp.asarray(logits), top_k, top_p)), expected.numpy()
    )


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(temperature=1.0), PROBABILITIES),
        (Sampling(temperature=0.5), PROBABILITIES**2 / np.sum(PROBABILITIES**2)),
        (Sampling(temperature=1.0, top_k=2), np.array([0, 2, 0, 1, 0]) / 3),
        (Sampling(temperature=1.0, top_p=0.8), np.array([0, 4, 1, 2, 0]) / 7),
    ],
    ids=["all", "cold", "top_k", "top_p"],
)
def test_tokens_are_drawn_with_their_probabilities(sampling, expected):
    rows = 20000
    logits = jnp.broadcast_to(LOGITS, (rows, 5))
    drawn = choose(logits, row_keys(1, 0, rows), sampling.arrays(), sampling.mode)
    found = np.bincount(np.asarray(drawn), minlength=5) / rows
    # five standard deviations of a frequency out of 20,000
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(0.25 / rows))
    assert np.all(found[expected == 0] == 0)


def test_temperature_zero_takes_the_likeliest_whatever_else_is_asked():
    sampling = Sampling(temperature=0.0, top_p=0.5, top_k=3)
    assert sampling.mode == "greedy"
    keys = row_keys(0, 0, 1)
    assert choose(LOGITS[None], keys, sampling.arrays(), sampling.mode).tolist() == [1]


def test_keys_differ_between_rows_and_between_steps_and_not_between_runs():
    keys = row_keys(3, 0, 4)
    all_keys = [*step_keys(keys, 0), *step_keys(keys, 1), *row_keys(4, 0, 4)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in all_keys}) == len(all_keys)
    again = jax.random.key_data(row_keys(3, 2, 2))
    np.testing.assert_array_equal(jax.random.key_data(keys)[2:], again)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"seed": -1},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(InputError) as caught:
        Sampling(**options)
    assert next(iter(options)) in str(caught.value)
