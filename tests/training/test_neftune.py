import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.models.decoder import embedding_noise


def test_noise_is_uniform_within_the_limit_of_each_documents_length():
    """alpha / sqrt(L d) with L the tokens of the document, whatever else is in its row."""
    segment_ids = jnp.asarray([[1] * 4 + [2] * 12 + [0] * 16])
    noise = np.asarray(embedding_noise(jax.random.key(0), 5.0, (1, 32, 64), segment_ids))[0]
    for part, length in ((noise[:4], 4), (noise[4:16], 12)):
        limit = 5.0 / np.sqrt(length * 64)
        assert 0.95 * limit < np.abs(part).max() <= limit
        assert abs(part.std() - limit / np.sqrt(3)) < 0.1 * limit


def test_a_row_is_one_document_where_there_are_no_segments():
    noise = np.asarray(embedding_noise(jax.random.key(0), 2.0, (2, 8, 16), None))
    limit = 2.0 / np.sqrt(8 * 16)
    assert 0.95 * limit < np.abs(noise).max() <= limit and noise.shape == (2, 8, 16)
