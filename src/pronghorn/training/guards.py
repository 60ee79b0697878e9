"""What stops a run that would train nothing: gradients that are zero or not finite.

A loss can look fine while a parameter gets no gradient. So the first real batch must give every trainable leaf a
finite, non-zero gradient. One exception is the start of an adapter: with B = 0, the gradient of A is
dA = s (dY B)ᵀ X = 0, and with A = 0 (embeddings) that of B; such a leaf is looked at again until its partner has moved.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.errors import RunError
from pronghorn.training.optimizers import is_stacked, is_variable

_PARTNERS = {
    "lora_A": "lora_B",
    "lora_B": "lora_A",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}
_NAMED = 8


def leaf_names(trainable: Any, model: Any = None) -> list[str]:
    """Names of the entries of a step's `leaf_grad_norms`, in its order.

    Args:
      trainable: from `split`.
      model: the Decoder it was split from; with it, layers are numbered as in Hugging Face
        (`layers.3.self_attn.q_proj.lora_A`), without it by segment.
    """
    names = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(trainable, is_leaf=is_variable)[0]:
        parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        for repeat in range(leaf.shape[0] if is_stacked(leaf) else 1):
            if model is not None and len(parts) > 4 and parts[0] == "segments" and parts[2] == "layers":
                segment = model.segments[int(parts[1])]
                layer = segment.start + repeat * len(segment.layers) + int(parts[3])
                names.append(".".join(["layers", str(layer), *parts[4:]]))
            else:
                names.append(".".join(parts) + (f"[{repeat}]" if is_stacked(leaf) else ""))
    return names


@jax.jit
def _largest_magnitudes(trainable: Any) -> jax.Array:
    largest = []
    for leaf in jax.tree.leaves(trainable, is_leaf=is_variable):
        array = leaf[...] if is_variable(leaf) else leaf
        axes = tuple(range(1, array.ndim)) if is_stacked(leaf) else None
        largest.append(jnp.atleast_1d(jnp.max(jnp.abs(array.astype(jnp.float32)), axis=axes)))
    return jnp.concatenate(largest)


def excused_leaves(trainable: Any, names: Sequence[str]) -> set[str]:
    """Adapter leaves whose gradient is exactly zero by the maths, because the other factor is all zero now.

    And the embedding's rows of new tokens: a batch need not have any. That the data has them is looked at before.
    """
    excused = {name for name in names if name.endswith("embed_tokens.lora_new_rows")}
    if not any(name.rpartition(".")[2] in _PARTNERS for name in names):
        return excused
    is_zero = dict(zip(names, np.asarray(_largest_magnitudes(trainable)) == 0, strict=True))
    for name in names:
        module, dot, leaf = name.rpartition(".")
        leaf, bracket, index = leaf.partition("[")
        partner = f"{module}{dot}{_PARTNERS[leaf]}{bracket}{index}" if leaf in _PARTNERS else None
        if partner is not None and is_zero.get(partner, False):
            excused.add(name)
    return excused


def check_leaf_gradients(names: Sequence[str], norms: Any, excused: set[str], *, step: int) -> None:
    """Refuse to go on when a leaf that is not excused has a zero gradient, or any leaf one that is not finite.

    Args:
      names: from `leaf_names`.
      norms: fp32 `[leaves]`, a step's `leaf_grad_norms`.
      excused: from `excused_leaves`, taken before that step.
      step: the step, counted from 1, for the message.

    Raises:
      RunError: naming the leaves.
    """
    norms = np.asarray(norms)
    infinite = [name for name, norm in zip(names, norms, strict=True) if not np.isfinite(norm)]
    if infinite:
        raise RunError(
            f"step {step}: the gradient of {_listed(infinite, len(names))} is not finite, so nothing can be learned; "
            "look at this batch, or try a lower learning rate or dtype float32."
        )
    zero = [name for name, norm in zip(names, norms, strict=True) if norm == 0 and name not in excused]
    if zero:
        raise RunError(
            f"step {step}: the gradient of {_listed(zero, len(names))} is exactly zero, so it would never be trained; "
            "leave it out of the adapter's targets, or report this as a fault of the model's code."
        )


def _listed(names: list[str], total: int) -> str:
    shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    return f"{shown} ({len(names)} of {total} trained leaves)"


@dataclasses.dataclass
class SkippedStreak:
    """Counts steps in a row whose update was skipped, and stops the run at `limit` of them.

    Attributes:
      limit: how many in a row are too many.
      rows_of: names the rows of a step (counted from 1), for the message.
      steps: the streak so far.
    """

    limit: int
    rows_of: Callable[[int], list[str]]
    steps: list[int] = dataclasses.field(default_factory=list)

    def see(self, step: int, *, applied: bool, token_count: int) -> None:
        """Note one step.

        Raises:
          RunError: when this is the `limit`-th step in a row without an update.
        """
        if applied:
            self.steps.clear()
            return
        self.steps.append(step)
        if len(self.steps) >= self.limit:
            why = (
                "had no trained token" if token_count == 0 else "had a loss or a gradient that is not finite"
            )
            rows = self.rows_of(self.steps[0])
            shown = ", ".join(rows[:_NAMED]) + (
                f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
            )
            raise RunError(
                f"steps {self.steps[0]} to {step} {why} (train.max_skipped_streak={self.limit}); the weights are as "
                f"they were before step {self.steps[0]}, whose rows are {shown}: look at them, or lower "
                "train.learning_rate."
            )
