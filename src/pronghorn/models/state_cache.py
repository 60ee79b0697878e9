"""What decoding keeps of a layer whose memory is a state behind a short convolution, and how new tokens are put to it.

Nothing of it grows with the row. Tokens of a call may be padded anywhere (position −1): the real ones move to the front
in their order, and what is behind them must leave the state alone. A row whose first token stands at position 0 starts
anew.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class StateCache(NamedTuple):
    """Of one layer; stacked layers have a leading axis.

    Attributes:
      recent: what the next convolution reaches back to: its input at the last tokens, `[batch, conv_width - 1,
        features]`, zeros in front of the row.
      state: fp32 `[batch, heads, key_dim, value_dim]`.
    """

    recent: jax.Array
    state: jax.Array

    def states(self, new: "NewTokens") -> jax.Array:
        """The states that new tokens follow: zeros where the row starts anew."""
        return jnp.where(new.starts[..., None, None], 0.0, self.state)


class NewTokens(NamedTuple):
    """Where the tokens of a call belong.

    Attributes:
      order: int `[batch, tokens]`, of every place in front the token that moves there.
      lengths: int `[batch]`, how many are real.
      starts: bool `[batch, 1]`, whether the row starts anew.
    """

    order: jax.Array
    lengths: jax.Array
    starts: jax.Array

    @classmethod
    def at(cls, positions: jax.Array) -> "NewTokens":
        """Of positions int `[batch, tokens]`, -1 for padding."""
        real = positions >= 0
        order = jnp.argsort(~real, axis=1, stable=True)
        return cls(order, jnp.sum(real, axis=1), jnp.take_along_axis(positions, order[:, :1], axis=1) == 0)

    @property
    def real(self) -> jax.Array:
        """bool `[batch, tokens, 1]`: which places in front are of real tokens."""
        return (jnp.arange(self.order.shape[1]) < self.lengths[:, None])[..., None]

    def in_front(self, values: jax.Array) -> jax.Array:
        """`[batch, tokens, features]` in the order of `order`."""
        return jnp.take_along_axis(values, self.order[..., None], axis=1)

    def in_place(self, values: jax.Array) -> jax.Array:
        """The way back, of `[batch, tokens, heads, dim]`."""
        back = jnp.argsort(self.order, axis=1)
        return jnp.take_along_axis(values, back[..., None, None], axis=1)

    def taps(self, cache: StateCache, values: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """(what a convolution weighs, the token itself last, `recent` behind these tokens), of values in front."""
        history, tokens = cache.recent.shape[1], values.shape[1]
        earlier = jnp.where(self.starts[..., None], 0, cache.recent).astype(values.dtype)
        row = jnp.concatenate([earlier, values], axis=1)
        last = self.lengths[:, None] + jnp.arange(history)
        recent = jnp.take_along_axis(row, last[..., None], axis=1).astype(cache.recent.dtype)
        return [row[:, i : i + tokens] for i in range(history + 1)], recent
