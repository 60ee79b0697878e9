"""What a model knows and how two models differ: held-out loss, forgetting, KL divergence.

    loss = Σ_t -log p(y_t) / T                over the trained tokens of all batches, T their number
    KL(a‖b) at a position = Σ_v p_a(v) (log p_a(v) - log p_b(v))

Both weigh every token the same, however it was batched. Neither holds the logits of a batch: losses come from
`linear_token_losses`, and the KL goes over the hidden states a few hundred positions at a time.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.errors import InputError
from pronghorn.lora import merge, split
from pronghorn.training.losses import Batch, evaluation_sums

Split = tuple[Any, Any, Any]


def heldout_loss(model: Any, batches: Any) -> dict[str, float]:
    """Mean loss of a model over the trained tokens of a set.

    Args:
      model: a Decoder, or `(graph, trainable, frozen)` as `split` returns it.
      batches: a `Loader`, or an iterable of batches whose arrays are `[..., batch, seq]`; batches of one shape are
        one compiled program.

    Returns:
      "loss" in nats a token, "tokens" (how many it is over), "perplexity" = exp(loss).

    Raises:
      InputError: no batch has a trained token.
    """
    graph, trainable, frozen = _split(model)
    loss_sum, count = 0.0, 0
    for batch in _rows(batches):
        found = _sums(graph, trainable, frozen, batch)
        loss_sum, count = loss_sum + float(found[0]), count + int(found[1])
    if count == 0:
        raise InputError("the evaluation set has no token in the loss; check its rows and data.loss_on.")
    loss = loss_sum / count
    return {"loss": loss, "tokens": count, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def forgetting(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """How much worse a text has become, in nats a token: positive when it was forgotten.

    Args:
      before, after: results of `heldout_loss` on the same batches.
    """
    if before["tokens"] != after["tokens"]:
        raise ValueError(f"losses over {before['tokens']} and {after['tokens']} tokens cannot be compared")
    return after["loss"] - before["loss"]


@dataclasses.dataclass(frozen=True)
class KLDivergence:
    """KL(a‖b) in nats over the positions of a set.

    Attributes:
      mean, p99, maximum: of the positions' divergences.
      top1_agreement: share of positions at which both models prefer the same token.
      positions: how many there are.
    """

    mean: float
    p99: float
    maximum: float
    top1_agreement: float
    positions: int


def kl_divergence(model_a: Any, model_b: Any, batches: Any, *, tile_rows: int = 256) -> KLDivergence:
    """How far the predictions of model_b are from those of model_a, at every position that is not padding.

    Args:
      model_a: the reference; a Decoder or `(graph, trainable, frozen)`.
      model_b: the other one.
      batches: as for `heldout_loss`; `segment_ids` of 0 are padding.
      tile_rows: positions whose logits exist at a time, of both models.

    Raises:
      InputError: the vocabularies differ, or there is no position.
    """
    a, b = _split(model_a), _split(model_b)
    sizes = [merge(*parts).config.vocab_size for parts in (a, b)]
    if sizes[0] != sizes[1]:
        raise InputError(f"models with vocabularies of {sizes[0]} and {sizes[1]} cannot be compared.")
    divergences, agreements = [], []
    for batch in _rows(batches):
        real = np.asarray(batch.get("segment_ids", np.ones_like(batch["input_ids"]))).reshape(-1) != 0
        divergence, agrees = _position_kl(a[0], b[0], a[1:], b[1:], batch, tile_rows=tile_rows)
        divergences.append(np.asarray(divergence, np.float64)[real])
        agreements.append(np.asarray(agrees)[real])
    values = np.concatenate(divergences) if divergences else np.zeros(0)
    if values.size == 0:
        raise InputError("there is no token to compare the models on; check the rows.")
    return KLDivergence(
        mean=float(values.mean()),
        p99=float(np.quantile(values, 0.99)),
        maximum=float(values.max()),
        top1_agreement=float(np.concatenate(agreements).mean()),
        positions=int(values.size),
    )


def _split(model: Any) -> Split:
    return model if isinstance(model, tuple) else split(model)


def _rows(batches: Any) -> Iterator[Batch]:
    """Batches of `[batch, seq]` arrays out of a Loader, or out of batches with micro-batches in front."""
    stream: Iterable[Batch] = batches
    if hasattr(batches, "batch_at"):
        stream = (batches.batch_at(step) for step in range(len(batches)))
    for batch in stream:
        shape = np.shape(batch["input_ids"])
        micro = {name: np.reshape(values, (-1, *shape[-2:])) for name, values in batch.items()}
        for index in range(len(micro["input_ids"])):
            yield {name: values[index] for name, values in micro.items()}


# jitted here and not in the functions, so that before and after a training are one program
@functools.partial(jax.jit, static_argnames="graph")
def _sums(graph: Any, trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return evaluation_sums(graph)(trainable, frozen, batch)


@functools.partial(jax.jit, static_argnames=("graph_a", "graph_b", "tile_rows"))
def _position_kl(
    graph_a: Any, graph_b: Any, leaves_a: Any, leaves_b: Any, batch: Batch, *, tile_rows: int
) -> tuple[jax.Array, jax.Array]:
    """KL fp32 and agreement bool, both `[batch * seq]`."""
    models = merge(graph_a, *leaves_a), merge(graph_b, *leaves_b)
    inputs = batch["input_ids"], batch.get("positions"), batch.get("segment_ids")
    hidden = [model.hidden_states(*inputs) for model in models]
    count = math.prod(hidden[0].shape[:-1])
    tiles = -(-count // tile_rows)
    padding = tiles * tile_rows - count
    tiled = [
        jnp.pad(x.reshape(count, -1), ((0, padding), (0, 0))).reshape(tiles, tile_rows, x.shape[-1])
        for x in hidden
    ]

    def one_tile(rows: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        log_a, log_b = (jax.nn.log_softmax(model.logits(x)) for model, x in zip(models, rows, strict=True))
        # a token of probability 0 in both adds nothing; 0 * inf would be NaN
        terms = jnp.where(log_a == -jnp.inf, 0.0, jnp.exp(log_a) * (log_a - log_b))
        return jnp.sum(terms, axis=-1), jnp.argmax(log_a, axis=-1) == jnp.argmax(log_b, axis=-1)

    divergence, agrees = jax.lax.map(one_tile, (tiled[0], tiled[1]))
    return divergence.reshape(-1)[:count], agrees.reshape(-1)[:count]
