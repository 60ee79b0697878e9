"""The next-token loss as a sum over trained tokens and their count.

  L = sum_t w_t CE(logits_t, labels_{t+1}),   w_t = 0 where labels_{t+1} = -100 or t+1 is not in the segment of t

and elsewhere w_t is the weight that the batch gives to token t+1, or 1. The count is of the tokens that are not masked,
whatever their weights: a row of weight 2 pulls twice as hard.

A mixture of experts may add its load-balancing loss (`models/balance.py`), times a coefficient and the count, so that
over micro-batches it is averaged by their tokens.

Labels are aligned with `input_ids`; the shift is here. Sums and counts, not means, are what micro-batches add up, so
that k micro-batches equal one large batch whatever their token counts are. The head's product and the cross entropy
are one op (`linear_cross_entropy`): the logits of a whole batch never exist.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pronghorn.lora import merge
from pronghorn.pallas_kernels.linear_cross_entropy import linear_cross_entropy, linear_token_losses

IGNORED = -100

Batch = Mapping[str, Any]
LossFunction = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def shifted_labels(labels: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Targets of each position: the next position's label, -100 at the end and where the next segment starts.

    Args:
      labels: int32 `[batch, seq]`, aligned with the input ids, -100 where not trained.
      segment_ids: int32 `[batch, seq]`, or None where every row is one document.

    Returns:
      int32 `[batch, seq]`.
    """
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    if segment_ids is not None:
        same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (0, 1)))
        targets = jnp.where(same, targets, IGNORED)
    return targets


def _shifted_weights(batch: Batch) -> jax.Array | None:
    """fp32 `[batch * seq]`: of each position the weight of its target, the next token; None where all are 1."""
    if "weights" not in batch:
        return None
    return jnp.pad(jnp.asarray(batch["weights"])[:, 1:], ((0, 0), (0, 1)), constant_values=1.0).reshape(-1)


def step_batch(batch: Batch, packing: bool) -> dict[str, Any]:
    """What a compiled step takes of a loader's batch: everything, or no segment ids where a row is one document.

    Such a row's padding comes after all that attention may look at, and has no label. Without segments to keep apart
    attention can use the fastest kernel there is.
    """
    return {name: values for name, values in batch.items() if packing or name != "segment_ids"}


def loss_sum_and_count(
    model: Any,
    batch: Batch,
    *,
    label_smoothing: float = 0.0,
    memory_policy: str = "keep",
    mlp_tile_tokens: int | None = None,
    head_tile_rows: int | None = None,
    neftune_alpha: float = 0.0,
    router_aux_loss_coef: float | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Summed loss of one micro-batch, how many tokens it is over, and terms of it; differentiable.

    Args:
      model: a Decoder.
      batch: `input_ids` and `labels`, int32 `[batch, seq]`; `segment_ids` and `positions` where rows are packed;
        `weights`, fp32 `[batch, seq]` and aligned with the labels, where rows have weights.
      label_smoothing: share of the target's probability spread over the vocabulary.
      memory_policy, mlp_tile_tokens, head_tile_rows, neftune_alpha, router_aux_loss_coef: see `TrainConfig`.
      dropout_key: turns the adapters' dropout and the noise on.

    Returns:
      (fp32 scalar, int32 scalar, {"balance_loss_sum": fp32 scalar} or nothing): the third is of the load-balancing
      loss, without its coefficient.

    Raises:
      InputError: a load-balancing loss is asked for, and the model has none.
    """
    coefficient = _balance_coefficient(model.config.experts, router_aux_loss_coef)
    hidden, targets, balance = _hidden_and_targets(
        model,
        batch,
        balanced=coefficient > 0,
        memory_policy=memory_policy,
        mlp_tile_tokens=mlp_tile_tokens,
        neftune_alpha=neftune_alpha,
        dropout_key=dropout_key,
    )
    weight, bias, lora_a, lora_b, lora_scale = model.head()
    loss_sum = linear_cross_entropy(
        hidden,
        weight,
        targets,
        token_weights=_shifted_weights(batch),
        bias=bias,
        lora_a=lora_a,
        lora_b=lora_b,
        lora_scale=lora_scale,
        label_smoothing=label_smoothing,
        softcap=model.config.logit_softcap,
        logit_scale=model.config.logit_scale,
        tile_rows=head_tile_rows,
    )
    count = jnp.sum(targets != IGNORED, dtype=jnp.int32)
    if balance is None:
        return loss_sum, count, {}
    balance_sum = balance * count
    return loss_sum + coefficient * balance_sum, count, {"balance_loss_sum": balance_sum}


def _balance_coefficient(experts: Any, asked: float | None) -> float:
    """Of the load-balancing loss: what was asked for, else what the checkpoint asks for."""
    if asked is not None:
        return asked
    return experts.balance_coefficient if experts is not None and experts.balance_loss else 0.0


def next_token(
    graph: Any,
    *,
    label_smoothing: float = 0.0,
    memory_policy: str = "keep",
    mlp_tile_tokens: int | None = None,
    head_tile_rows: int | None = None,
    neftune_alpha: float = 0.0,
    router_aux_loss_coef: float | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> LossFunction:
    """The loss function of a split model, to be differentiated with respect to its first argument.

    Example:
      >>> graph, lora, frozen = ph.split(model)
      >>> loss_fn = ph.losses.next_token(graph)
      >>> (loss, aux), gradient = jax.value_and_grad(loss_fn, has_aux=True)(lora, frozen, batch)

    Args:
      graph: the static part that `split` returned.
      label_smoothing, memory_policy, mlp_tile_tokens, head_tile_rows, neftune_alpha, router_aux_loss_coef: see
        `loss_sum_and_count`.
      reduction: "mean" over the trained tokens of the batch, or "sum" (what is added over micro-batches).

    Returns:
      `loss_fn(trainable, frozen, batch, dropout_key=None) -> (loss, aux)`; `aux` has `loss_sum` (fp32 scalar),
      `token_count` (int32 scalar) and what else `loss_sum_and_count` tells. A batch without one trained token has
      loss 0.
    """

    def loss_fn(trainable: Any, frozen: Any, batch: Batch, dropout_key: jax.Array | None = None):
        loss_sum, count, terms = loss_sum_and_count(
            merge(graph, trainable, frozen),
            batch,
            label_smoothing=label_smoothing,
            memory_policy=memory_policy,
            mlp_tile_tokens=mlp_tile_tokens,
            head_tile_rows=head_tile_rows,
            neftune_alpha=neftune_alpha,
            router_aux_loss_coef=router_aux_loss_coef,
            dropout_key=dropout_key,
        )
        loss = loss_sum / jnp.maximum(count, 1) if reduction == "mean" else loss_sum
        return loss, {"loss_sum": loss_sum, "token_count": count, **terms}

    return loss_fn


def evaluation_sums(graph: Any) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
    """`(trainable, frozen, batch) -> (loss sum fp32, token count int32)`, forward only, without dropout."""

    def sums(trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = merge(graph, trainable, frozen)
        hidden, targets, _ = _hidden_and_targets(model, batch)
        weight, bias, lora_a, lora_b, lora_scale = model.head()
        losses = linear_token_losses(
            hidden,
            weight,
            targets,
            bias=bias,
            lora_a=lora_a,
            lora_b=lora_b,
            lora_scale=lora_scale,
            softcap=model.config.logit_softcap,
            logit_scale=model.config.logit_scale,
        )
        return jnp.sum(losses), jnp.sum(targets != IGNORED, dtype=jnp.int32)

    return sums


def _hidden_and_targets(
    model: Any, batch: Batch, *, balanced: bool = False, **options: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Hidden states `[batch * seq, d]`, their targets `[batch * seq]`, and the load-balancing loss if asked for."""
    segment_ids, labels, balance = batch.get("segment_ids"), jnp.asarray(batch["labels"]), None
    if balanced:
        options["balance_over"] = _real_tokens(labels, segment_ids)
    hidden = model.hidden_states(batch["input_ids"], batch.get("positions"), segment_ids, **options)
    if balanced:
        hidden, balance = hidden
    targets = shifted_labels(labels, segment_ids)
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), balance


def _real_tokens(labels: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """bool `[batch, seq]`: no padding. Where nothing tells, padding is what follows a row's last label."""
    if segment_ids is not None:
        return segment_ids > 0
    return jax.lax.cummax((labels != IGNORED).astype(jnp.int8), axis=1, reverse=True) > 0
