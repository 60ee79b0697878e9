"""Held-out loss, forgetting and KL, against plain numpy over whole logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pronghorn.data import general_text
from pronghorn.data.general_text import general_text_rows, passages
from pronghorn.errors import InputError
from pronghorn.evaluation import forgetting, heldout_loss, kl_divergence
from pronghorn.lora import split
from pronghorn.models.config import DecoderConfig
from pronghorn.models.decoder import Decoder
from tests.tolerances import MODEL_LOGITS

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=64,
)


def _model(seed, config=CONFIG):
    random = np.random.default_rng(seed)
    graph, state = nnx.split(Decoder.abstract(config, dtype=jnp.float32))
    return nnx.merge(
        graph, jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), state)
    )


def _batch(seed, rows=2, length=11):
    """Two documents and padding in each row; some tokens are not in the loss."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 37, (rows, length)).astype(np.int32)
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 2] * rows, np.int32)
    positions = np.array([[*range(4), *range(5), 0, 1]] * rows, np.int32)
    labels = np.where((random.random(ids.shape) < 0.6) & (segments > 0), ids, -100).astype(np.int32)
    return {"input_ids": ids, "labels": labels, "segment_ids": segments, "positions": positions}


def _log_probabilities(model, batch):
    logits = np.asarray(
        model(batch["input_ids"], jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"])),
        np.float64,
    )
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def _losses(model, batch):
    """Every trained token's loss, one by one."""
    log, found = _log_probabilities(model, batch), []
    rows, length = batch["input_ids"].shape
    for row in range(rows):
        for t in range(length - 1):
            label = batch["labels"][row, t + 1]
            if label != -100 and batch["segment_ids"][row, t] == batch["segment_ids"][row, t + 1]:
                found.append(-log[row, t, label])
    return found


@pytest.fixture(scope="module")
def model():
    return _model(0)


def test_the_loss_weighs_tokens_and_not_batches(model):
    batches = [_batch(1), _batch(2)]
    batches[1]["labels"][0] = -100  # one batch has far fewer trained tokens
    found = heldout_loss(model, batches)
    losses = _losses(model, batches[0]) + _losses(model, batches[1])
    assert found["tokens"] == len(losses)
    assert abs(found["loss"] - np.mean(losses)) <= MODEL_LOGITS
    assert found["perplexity"] == np.exp(found["loss"])


def test_a_split_model_and_micro_batches_and_a_loader_give_the_same(model):
    batches = [_batch(1), _batch(2)]
    expected = heldout_loss(model, batches)
    stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    class Loader:
        def __len__(self):
            return 1

        def batch_at(self, step):
            return stacked

    assert heldout_loss(split(model), batches) == expected
    assert heldout_loss(model, [stacked]) == expected
    assert heldout_loss(model, Loader()) == expected


def test_a_set_without_a_trained_token_is_refused(model):
    batch = _batch(1) | {"labels": np.full((2, 11), -100, np.int32)}
    with pytest.raises(InputError, match="no token in the loss"):
        heldout_loss(model, [batch])
    with pytest.raises(InputError, match="no token in the loss"):
        heldout_loss(model, [])


def test_forgetting_is_the_increase_over_the_same_tokens():
    assert forgetting({"loss": 2.0, "tokens": 5}, {"loss": 2.5, "tokens": 5}) == 0.5
    with pytest.raises(ValueError, match="5 and 6"):
        forgetting({"loss": 2.0, "tokens": 5}, {"loss": 2.5, "tokens": 6})


def _expected_kl(a, b, batches):
    divergences, agrees = [], []
    for batch in batches:
        log_a, log_b = _log_probabilities(a, batch), _log_probabilities(b, batch)
        real = batch["segment_ids"] != 0
        divergences.append(np.sum(np.exp(log_a) * (log_a - log_b), axis=-1)[real])
        agrees.append((log_a.argmax(-1) == log_b.argmax(-1))[real])
    return np.concatenate(divergences), np.concatenate(agrees)


def test_kl_is_that_of_the_whole_logits_without_padding(model):
    other, batches = _model(5), [_batch(1), _batch(2)]
    divergences, agrees = _expected_kl(model, other, batches)
    found = kl_divergence(model, other, batches)
    assert found.positions == divergences.size == 36
    np.testing.assert_allclose(
        [found.mean, found.p99, found.maximum],
        [divergences.mean(), np.quantile(divergences, 0.99), divergences.max()],
        atol=MODEL_LOGITS,
    )
    assert found.top1_agreement == agrees.mean() < 1


def test_kl_does_not_depend_on_the_tile(model):
    other, batches = _model(5), [_batch(1)]
    one, whole = (kl_divergence(model, other, batches, tile_rows=rows) for rows in (5, 64))
    assert one.top1_agreement == whole.top1_agreement
    assert abs(one.mean - whole.mean) <= 1e-6 and abs(one.maximum - whole.maximum) <= 1e-6


def test_kl_of_a_model_to_itself_is_zero(model):
    found = kl_divergence(model, split(model), [_batch(3)])
    assert (found.mean, found.maximum, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_models_of_different_vocabularies_are_not_compared(model):
    other = _model(1, dataclasses.replace(CONFIG, vocab_size=38))
    with pytest.raises(InputError, match="37 and 38"):
        kl_divergence(model, other, [_batch(1)])


def test_general_text_is_several_titled_passages_of_prose():
    found = passages()
    assert len(found) >= 5 and all(passage.title and len(passage.text) > 300 for passage in found)
    assert found[1].text.startswith("Four score and seven years ago")
    assert [row["text"] for row in general_text_rows()] == [passage.text for passage in found]
    text = general_text.general_text()
    assert text.isascii() and 2000 < len(text) < 6000 and "# " not in text
