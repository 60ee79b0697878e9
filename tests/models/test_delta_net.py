"""Gated delta nets in a decoder: packing leaks nothing, and decoding takes padding, restarts and stacked layers."""

import numpy as np

from pronghorn.models import DecoderConfig
from tests.models.reference import compiled, forward, random_ids, tiny_decoder
from tests.tolerances import MODEL_LOGITS

CONFIG = DecoderConfig(
    "qwen3_5", 131, 24, 40, 3, 2, 1, 8, 512, qk_norm=True, attention_gate=True, norm_weight_offset=1.0,
    rms_norm_eps=1e-3, layer_kinds=("linear", "linear", "full"), conv_width=4, linear_key_heads=1, linear_value_heads=2,
    linear_key_dim=8, linear_value_dim=6,
)  # fmt: skip
IDS = random_ids(30, batch=2)
MODEL = tiny_decoder(CONFIG, layers="scanned")


def close(actual, expected):
    assert np.std(expected) > 0.1
    assert np.max(np.abs(np.asarray(actual) - np.asarray(expected))) <= MODEL_LOGITS


def test_a_packed_document_is_the_document_alone():
    packed = compiled(lambda model, ids, segments: model(ids, segment_ids=segments), MODEL)
    segments = np.repeat([[0, 1]], 2, axis=0).repeat([13, 17], axis=1)
    close(np.asarray(packed(IDS, segments))[:, 13:], forward(MODEL, IDS[:, 13:]))


def test_padded_pieces_single_tokens_and_a_row_that_starts_anew_equal_full_passes():
    step = compiled(lambda model, ids, cache, positions: model.decode(ids, cache, positions), MODEL)
    expected = forward(MODEL, IDS)
    # Row 0 has 7 tokens in front of its padding, row 1 has 9 behind its own, then one each at a time.
    at = np.full((2, 10), -1)
    at[0, :7], at[1, 1:] = np.arange(7), np.arange(9)
    ids = np.take_along_axis(IDS, np.maximum(at, 0), axis=1)
    logits, cache = step(ids, MODEL.init_cache(2, 30), at)
    close(logits[0, :7], expected[0, :7])
    close(logits[1, 1:], expected[1, :9])
    for ahead in range(3):
        at = np.array([[7 + ahead], [9 + ahead]])
        logits, cache = step(np.take_along_axis(IDS, at, axis=1), cache, at)
        close(logits[:, 0], np.take_along_axis(expected, at[..., None], axis=1)[:, 0])
    logits, _ = step(IDS[:, :10], cache, np.repeat(np.arange(10)[None], 2, axis=0))
    close(logits, expected[:, :10])
