"""Decoding with a cache gives the logits of one full forward pass."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.models import Decoder, DecoderConfig, RopeConfig
from tests.models.reference import compiled, forward, random_ids, tiny_decoder
from tests.tolerances import MODEL_LOGITS

CONFIG = DecoderConfig(
    "qwen3", 131, 48, 80, 3, 6, 2, 10, 512, qk_norm=True, qkv_bias=True, sliding_window=5,
    layer_kinds=("sliding", "full", "sliding"),
)  # fmt: skip
LONGROPE = RopeConfig(
    kind="longrope",
    factor=4.0,
    original_max_position_embeddings=16,
    short_factor=(1.0, 1.1, 1.2, 1.3, 1.4),
    long_factor=(1.0, 2.0, 3.0, 4.0, 5.0),
)
DYNAMIC = RopeConfig(kind="dynamic", factor=3.0, original_max_position_embeddings=16)


def build(layers: str = "unrolled", **changes) -> Decoder:
    return tiny_decoder(dataclasses.replace(CONFIG, **changes), layers=layers)


def stepper(model: Decoder):
    return compiled(lambda built, ids, cache, positions: built.decode(ids, cache, positions), model)


def decode_in_pieces(model: Decoder, ids: np.ndarray, pieces: list[int], max_length: int) -> np.ndarray:
    step, cache, start, logits = stepper(model), model.init_cache(len(ids), max_length), 0, []
    for size in pieces:
        positions = np.broadcast_to(np.arange(start, start + size), (len(ids), size))
        piece, cache = step(ids[:, start : start + size], cache, positions)
        logits.append(piece)
        start += size
    assert start == ids.shape[1]
    return np.concatenate(logits, axis=1)


def close(actual, expected) -> None:
    assert np.std(expected) > 0.3
    assert np.max(np.abs(np.asarray(actual) - np.asarray(expected))) <= MODEL_LOGITS


def check_rows_of_different_lengths(model):
    """Rows of different lengths equal each row alone."""
    ids, lengths = random_ids(14, batch=3), [9, 4, 6]
    step, cache = stepper(model), model.init_cache(3, 16)
    positions = np.where(np.arange(9) < np.array(lengths)[:, None], np.arange(9), -1)
    first, cache = step(ids[:, :9], cache, positions)
    rows = [[np.asarray(first[i, : lengths[i]])] for i in range(3)]
    for offset in range(5):
        at = np.array(lengths)[:, None] + offset
        logits, cache = step(np.take_along_axis(ids, at, axis=1), cache, at)
        for i in range(3):
            rows[i].append(np.asarray(logits[i]))
    full = forward(model, ids)  # causal: what follows in a row changes nothing
    for i, length in enumerate(lengths):
        close(np.concatenate(rows[i]), full[i, : length + 5])


def check_later_padding(model):
    """Padding to the right, at later positions, is overwritten before it is seen."""
    ids = random_ids(12)
    step, cache = stepper(model), model.init_cache(1, 12)
    padded = np.concatenate([ids[:, :6], np.zeros((1, 3), np.int32)], axis=1)
    first, cache = step(padded, cache, np.arange(9)[None])
    logits = [first[:, :6]]
    for at in range(6, 12):
        piece, cache = step(ids[:, at : at + 1], cache, np.array([[at]]))
        logits.append(piece)
    close(np.concatenate(logits, axis=1), forward(model, ids))


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_token_by_token_equals_the_full_forward_pass(layers):
    model, ids = build(layers), random_ids(23, batch=2)
    close(decode_in_pieces(model, ids, [1] * 23, max_length=29), forward(model, ids))


def test_a_prefill_and_steps_equal_the_full_forward_pass():
    model, ids = (
        build(attention_softcap=2.0, attention_sinks=True, logit_softcap=5.0),
        random_ids(23, batch=2),
    )
    for layer in model.segments[0].layers:
        layer.self_attn.sinks.set_value(jnp.linspace(-1.0, 2.0, 6))
    close(decode_in_pieces(model, ids, [11, 1, 1, 7, 1, 1, 1], max_length=23), forward(model, ids))


def test_rows_of_different_lengths_equal_each_row_alone():
    check_rows_of_different_lengths(build())


def test_padding_to_the_right_at_later_positions_is_overwritten_before_it_is_seen():
    check_later_padding(build())


def test_dynamic_frequencies_equal_the_full_pass_within_the_context_and_in_a_prefill_beyond():
    model, ids = build(rope=DYNAMIC), random_ids(24)
    close(decode_in_pieces(model, ids[:, :16], [14, 1, 1], max_length=24), forward(model, ids[:, :16]))
    close(decode_in_pieces(model, ids, [24], max_length=24), forward(model, ids))


def test_longrope_equals_the_full_pass_beyond_the_original_context():
    model, ids = build(rope=LONGROPE), random_ids(24)
    close(decode_in_pieces(model, ids, [20, 1, 1, 1, 1], max_length=30), forward(model, ids))


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_keys_from_before_the_switch_are_rotated_as_after_it(rope):
    # One layer: no hidden state depends on the frequencies, so crossing the switch is exact.
    model, ids = build("scanned", rope=rope, num_layers=1, layer_kinds=("full",)), random_ids(24)
    logits = decode_in_pieces(model, ids, [10, 6, 1, 1, 1, 1, 1, 1, 1, 1], max_length=30)
    full = forward(model, ids)
    close(logits[:, -1:], full[:, -1:])
    assert np.max(np.abs(np.asarray(forward(model, ids[:, :16])) - full[:, :16])) > 100 * MODEL_LOGITS, (
        "the switch matters"
    )


def test_a_window_forgets_and_a_full_layer_does_not():
    ids = random_ids(12)
    other = ids.copy()
    other[0, 0] = (ids[0, 0] + 1) % 131
    for kind, forgets in (("sliding", True), ("full", False)):
        model = build(num_layers=1, layer_kinds=(kind,))
        a, b = (decode_in_pieces(model, tokens, [12], max_length=12)[0, 5:] for tokens in (ids, other))
        assert (np.max(np.abs(a - b)) == 0) == forgets


def test_a_position_past_the_cache_is_refused():
    model = build()
    with pytest.raises(InputError, match="max_length=4"):
        model.decode(jnp.zeros((1, 5), jnp.int32), model.init_cache(1, 4), jnp.arange(5)[None])
