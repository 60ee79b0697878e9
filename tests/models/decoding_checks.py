"""What decoding and packing have to give whatever a layer keeps of the tokens before; `close` is the caller's."""

import numpy as np

from tests.models.reference import compiled, forward


def check_packed_document(model, ids, close):
    """A document behind another in one row gives what it gives alone."""
    packed = compiled(lambda built, row, segments: built(row, segment_ids=segments), model)
    segments = np.repeat([[0, 1]], 2, axis=0).repeat([13, 17], axis=1)
    close(np.asarray(packed(ids, segments))[:, 13:], forward(model, ids[:, 13:]))


def check_pieces_and_restart(model, ids, close):
    """Padded pieces, single tokens and a row that starts anew equal full passes."""
    step = compiled(lambda built, row, cache, positions: built.decode(row, cache, positions), model)
    expected = forward(model, ids)
    # Row 0 has 7 tokens in front of its padding, row 1 has 9 behind its own, then one each at a time.
    at = np.full((2, 10), -1)
    at[0, :7], at[1, 1:] = np.arange(7), np.arange(9)
    padded = np.take_along_axis(ids, np.maximum(at, 0), axis=1)
    logits, cache = step(padded, model.init_cache(2, 30), at)
    close(logits[0, :7], expected[0, :7])
    close(logits[1, 1:], expected[1, :9])
    for ahead in range(3):
        at = np.array([[7 + ahead], [9 + ahead]])
        logits, cache = step(np.take_along_axis(ids, at, axis=1), cache, at)
        close(logits[:, 0], np.take_along_axis(expected, at[..., None], axis=1)[:, 0])
    logits, _ = step(ids[:, :10], cache, np.repeat(np.arange(10)[None], 2, axis=0))
    close(logits, expected[:, :10])
