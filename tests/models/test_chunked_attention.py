"""Layers that see their own chunk of positions, and what else Llama 4 brought."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.models import DecoderConfig
from pronghorn.models.decoder import chunk_ids
from pronghorn.models.tensor_names import InterleavedTensor
from pronghorn.training.flops import count_flops
from tests.models.reference import forward, random_ids, tiny_decoder
from tests.tolerances import MODEL_LOGITS

CHUNK, TOKENS = 8, 21
CONFIG = DecoderConfig(
    "llama4", 131, 24, 40, 2, 4, 2, 6, 512, layer_kinds=("chunked",) * 2, attention_chunk=CHUNK, unit_heads=True
)  # fmt: skip


def test_the_id_changes_with_the_chunk_of_a_position_and_with_the_segment():
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    config = dataclasses.replace(CONFIG, attention_chunk=2)
    assert np.array_equal(chunk_ids(config, positions, segments), [[0, 0, 1, 1, 2, 2, 3, 3, 4]])
    assert np.array_equal(chunk_ids(config, positions + 1, None), [[0, 1, 1, 2, 3, 4, 4, 5, 5]])
    assert (
        chunk_ids(dataclasses.replace(CONFIG, layer_kinds=(), attention_chunk=None), positions, None) is None
    )


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_a_token_sees_its_own_chunk_and_no_other(layers):
    model, ids = tiny_decoder(CONFIG, layers=layers), random_ids(TOKENS)
    changed = ids.copy()
    changed[0, CHUNK - 1] = (ids[0, CHUNK - 1] + 1) % 131
    moved = np.max(np.abs(forward(model, ids) - forward(model, changed)), axis=-1)[0]
    assert moved[CHUNK - 1] > 1e-3
    assert np.all(np.delete(moved, CHUNK - 1) == 0)
    changed = ids.copy()
    changed[0, CHUNK] = (ids[0, CHUNK] + 1) % 131
    moved = np.max(np.abs(forward(model, ids) - forward(model, changed)), axis=-1)[0]
    assert np.all(moved[CHUNK : 2 * CHUNK] > 1e-5)
    assert np.all(moved[:CHUNK] == 0) and np.all(moved[2 * CHUNK :] == 0)


def test_given_positions_mean_the_chunks_that_they_are_in():
    model, ids = tiny_decoder(CONFIG), random_ids(TOKENS)
    usual = np.arange(TOKENS, dtype=np.int32)[None]
    logits = forward(model, ids)
    assert np.max(np.abs(forward(model, ids, usual) - logits)) <= MODEL_LOGITS
    # The end of one row by itself, from the start of a chunk on.
    tail = forward(model, ids[:, CHUNK:], usual[:, CHUNK:])
    assert np.max(np.abs(tail - logits[:, CHUNK:])) <= MODEL_LOGITS
    short = ids[:, :CHUNK]
    assert np.max(np.abs(forward(model, short) - logits[:, :CHUNK])) <= MODEL_LOGITS


def test_pairs_of_a_chunk_are_counted():
    count = count_flops(CONFIG, {}, {})
    positions = np.arange(TOKENS)
    seen = sum(p % CHUNK + 1 for p in positions)
    assert count.of_batch(positions, np.ones(TOKENS, bool)) == 12 * 4 * 6 * 2 * seen


def test_parts_that_lie_one_after_the_other_are_cut_and_joined_bit_for_bit():
    layout = InterleavedTensor(("gate", "up"), transposed=True, in_turn=False)
    whole = np.random.default_rng(0).standard_normal((3, 4, 10), np.float32)
    gate, up = (layout.cut(whole, place) for place in (0, 1))
    assert np.array_equal(gate, whole[..., :5].swapaxes(1, 2)) and np.array_equal(
        up, whole[..., 5:].swapaxes(1, 2)
    )
    assert layout.part_shape(whole.shape) == gate.shape and layout.file_shape(gate.shape) == whole.shape
    assert layout.join([gate, up]).tobytes() == whole.tobytes()


def test_chunks_without_a_length_are_refused():
    with pytest.raises(ValueError, match="attention_chunk is None"):
        dataclasses.replace(CONFIG, attention_chunk=None)
