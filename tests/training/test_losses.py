import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pronghorn.lora import split
from pronghorn.training import losses
from tests.tolerances import assert_close
from tests.training.small import QUICK_COMPILE, VOCAB, random_batch, small_model


@pytest.fixture(scope="module")
def model():
    return small_model(rank=None)


@pytest.fixture(scope="module")
def loss_of(model):
    graph, trainable, frozen = split(model)
    mean_loss = jax.jit(losses.next_token(graph), compiler_options=QUICK_COMPILE)
    return lambda batch: mean_loss(trainable, frozen, batch)


@pytest.fixture(scope="module")
def logits_of(model):
    graph, state = nnx.split(model)
    run = jax.jit(
        lambda state, ids, positions, segments: nnx.merge(graph, state)(ids, positions, segments),
        compiler_options=QUICK_COMPILE,
    )
    return lambda batch: run(state, batch["input_ids"], batch["positions"], batch["segment_ids"])


def one(batch):
    return {name: jnp.asarray(values[0]) for name, values in batch.items()}


def loss_by_hand(logits, batch):
    """Every term of the sum on its own."""
    logits = np.asarray(logits, np.float64)
    log_probabilities = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    labels, segment_ids = np.asarray(batch["labels"]), np.asarray(batch["segment_ids"])
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if labels[row, t + 1] >= 0 and segment_ids[row, t] == segment_ids[row, t + 1]:
                total -= log_probabilities[row, t, labels[row, t + 1]]
                count += 1
    return total, count


def test_weights_multiply_the_losses_of_their_tokens_and_not_the_count(loss_of):
    batch = one(random_batch(1, 3, 11))
    rows = []
    for row in range(3):
        alone = jnp.where(jnp.arange(3)[:, None] == row, batch["labels"], -100)
        rows.append(float(loss_of(batch | {"labels": alone})[1]["loss_sum"]))
    weights = np.asarray([0.5, 1.0, 3.0], np.float32)
    weighted = batch | {"weights": jnp.broadcast_to(weights[:, None], batch["labels"].shape)}
    aux = loss_of(weighted)[1]
    assert_close(aux["loss_sum"], np.float64(np.dot(weights, rows)), dtype="float32")
    assert int(aux["token_count"]) == int(loss_of(batch)[1]["token_count"])


def test_loss_is_the_sum_over_trained_tokens_inside_of_a_document(loss_of, logits_of):
    batch = one(random_batch(1, 3, 11))
    loss, aux = loss_of(batch)
    total, count = loss_by_hand(logits_of(batch), batch)
    assert int(aux["token_count"]) == count
    assert_close(aux["loss_sum"], np.float64(total), dtype="float32")
    assert_close(loss, np.float64(total / count), dtype="float32")


def test_no_token_is_predicted_across_documents():
    labels = jnp.array([[5, 6, 7, 8, 9]])
    assert losses.shifted_labels(labels, jnp.array([[1, 1, 2, 2, 0]])).tolist() == [[6, -100, 8, -100, -100]]


def test_without_segments_a_row_is_one_document():
    assert losses.shifted_labels(jnp.array([[5, -100, 7]])).tolist() == [[-100, 7, -100]]


def test_packed_loss_equals_unpacked_loss(model):
    random = np.random.default_rng(3)
    documents = [random.integers(0, VOCAB, n).astype(np.int32) for n in (5, 1, 7, 4)]
    graph, trainable, frozen = split(model)
    loss_and_gradient = jax.jit(
        jax.value_and_grad(losses.next_token(graph, reduction="sum"), has_aux=True),
        compiler_options=QUICK_COMPILE,
    )

    def row(parts):
        length = 18
        batch = {
            name: np.zeros((1, length), np.int32)
            for name in ("input_ids", "labels", "segment_ids", "positions")
        }
        batch["labels"][:] = losses.IGNORED
        start = 0
        for number, ids in enumerate(parts, 1):
            here = np.s_[0, start : start + len(ids)]
            batch["input_ids"][here], batch["labels"][here] = ids, ids
            batch["segment_ids"][here], batch["positions"][here] = number, np.arange(len(ids))
            start += len(ids)
        return batch

    (packed, aux), packed_gradient = loss_and_gradient(trainable, frozen, row(documents))
    singles = [loss_and_gradient(trainable, frozen, row([ids])) for ids in documents]
    assert int(aux["token_count"]) == sum(int(a["token_count"]) for (_, a), _ in singles) == 4 + 0 + 6 + 3
    assert_close(packed, sum(np.float64(s) for (s, _), _ in singles), dtype="float32")
    added = jax.tree.map(
        lambda *leaves: sum(np.asarray(x, np.float64) for x in leaves), *(g for _, g in singles)
    )
    for leaf, reference in zip(jax.tree.leaves(packed_gradient), jax.tree.leaves(added), strict=True):
        assert_close(leaf, reference)


def test_a_batch_without_a_trained_token_has_loss_zero(loss_of):
    loss, aux = loss_of(one(random_batch(1, 3, 11, trained=0.0)))
    assert (float(loss), int(aux["token_count"])) == (0.0, 0)


def test_label_smoothing_spreads_its_share_over_the_vocabulary(model, logits_of):
    batch = one(random_batch(1, 3, 11))
    graph, trainable, frozen = split(model)
    smoothed = jax.jit(losses.next_token(graph, label_smoothing=0.2), compiler_options=QUICK_COMPILE)
    loss, _ = smoothed(trainable, frozen, batch)
    targets = losses.shifted_labels(batch["labels"], batch["segment_ids"])
    smooth = 0.8 * jax.nn.one_hot(targets, VOCAB) + 0.2 / VOCAB
    by_hand = -jnp.sum(smooth * jax.nn.log_softmax(logits_of(batch)), -1)[targets >= 0].mean()
    assert_close(loss, by_hand)


def test_evaluation_gives_the_sum_that_training_differentiates():
    graph, trainable, frozen = split(small_model(rank=2, targets=("q_proj", "lm_head")))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    batch = one(random_batch(1, 3, 11))
    evaluate, train = losses.evaluation_sums(graph), losses.next_token(graph, reduction="sum")
    both = jax.jit(
        lambda *split_batch: (evaluate(*split_batch), train(*split_batch)), compiler_options=QUICK_COMPILE
    )
    (loss_sum, count), (expected, aux) = both(trainable, frozen, batch)
    assert_close(loss_sum, expected)
    assert int(count) == int(aux["token_count"])
