"""Gated delta nets in a decoder: packing leaks nothing, and decoding takes padding, restarts and stacked layers."""

import numpy as np

from pronghorn.models import DecoderConfig
from tests.models.decoding_checks import check_packed_document, check_pieces_and_restart
from tests.models.reference import random_ids, tiny_decoder
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
    check_packed_document(MODEL, IDS, close)


def test_padded_pieces_single_tokens_and_a_row_that_starts_anew_equal_full_passes():
    check_pieces_and_restart(MODEL, IDS, close)
