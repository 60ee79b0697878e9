"""Choosing the next token from logits: pure functions with explicit random keys.

    p_i = softmax(x / T)_i,   restricted first to the k likeliest tokens, then to the fewest of those that together
                              have probability P or more (Holtzman et al. 2020), and drawn by the Gumbel maximum

Temperature, k and P are ordinary arrays inside a compiled program: changing them compiles nothing. Only `Mode` does.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pronghorn.errors import InputError

# what a program is compiled for: the likeliest token, a draw from all, a draw from the likely ones (which sorts)
Mode = Literal["greedy", "all", "likely"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token, whatever the other two say.
      top_p: P of the formula, in (0, 1]; 1 keeps all.
      top_k: k of the formula; 0 keeps all.
      seed: of the random keys; the same seed, prompts and settings give the same tokens.

    Raises:
      InputError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(
                f"temperature={self.temperature} must be zero or more; 0 takes the likeliest token."
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must be above 0 and at most 1; 1 keeps all tokens.")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k={self.top_k} must be zero or more; 0 keeps all tokens.")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed} must be a whole number from 0 to 2**63 - 1.")

    @property
    def mode(self) -> Mode:
        """What a program must be compiled for."""
        if self.temperature == 0:
            return "greedy"
        return "likely" if self.top_k or self.top_p < 1 else "all"

    def arrays(self) -> "SamplingArrays":
        """The values as arrays, for a compiled program."""
        return SamplingArrays(
            jnp.float32(self.temperature or 1.0), jnp.float32(self.top_p), jnp.int32(self.top_k)
        )


class SamplingArrays(NamedTuple):
    """fp32, fp32 and int32 scalars."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array


def choose(logits: jax.Array, keys: jax.Array, settings: SamplingArrays, mode: Mode) -> jax.Array:
    """The next token of each row.

    Args:
      logits: fp32 `[batch, vocab]`.
      keys: random keys `[batch]`, one a row, so that a row's draw does not depend on the rows beside it.
      settings: see `Sampling`.
      mode: static.

    Returns:
      int32 `[batch]`.
    """
    if mode == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / settings.temperature
    if mode == "likely":
        scaled = keep_likely(scaled, settings.top_k, settings.top_p)
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


def keep_likely(logits: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float) -> jax.Array:
    """Logits with -inf for every token but the `top_k` likeliest, and of those the fewest that reach `top_p`.

    The likeliest token always stays. Tokens whose logits are equal stay or go together.

    Args:
      logits: fp32 `[..., vocab]`.
      top_k: 0 keeps all.
      top_p: 1 keeps all.
    """
    vocab = logits.shape[-1]
    ranked = jnp.sort(logits, axis=-1, descending=True)
    within = jnp.arange(vocab) < jnp.where(jnp.asarray(top_k) > 0, top_k, vocab)
    probability = jax.nn.softmax(jnp.where(within, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # at P = 1 the rounding of the sum must not cut the tail
    within &= (before < top_p) | (jnp.asarray(top_p) >= 1)
    within = within.at[..., 0].set(True)
    least = jnp.min(jnp.where(within, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def row_keys(seed: int, first_row: int, rows: int) -> jax.Array:
    """The keys of rows first_row .. first_row + rows - 1, one a row."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), first_row + jnp.arange(rows))


def step_keys(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    """The keys of one step, one a row."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)
