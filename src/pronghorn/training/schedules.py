"""Learning-rate schedules: a linear warm-up, then cosine, linear or constant.

With t the number of updates made so far, w the warm-up and T all updates, as in transformers' `get_scheduler`:

  t < w:     peak t / w
  cosine:    peak (1 + cos(pi p)) / 2,   p = (t - w) / (T - w)        (Loshchilov & Hutter 2017, SGDR, without restarts)
  linear:    peak (1 - p)
  constant:  peak
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pronghorn.training.config import TrainConfig

LearningRate = Callable[[jax.typing.ArrayLike], jax.Array]


def make_schedule(config: TrainConfig, total_steps: int) -> LearningRate:
    """The function from updates made so far (int32 scalar) to the learning rate of the next one (fp32 scalar)."""
    peak, warmup = config.learning_rate, config.warmup_steps
    decay_steps = max(1, total_steps - warmup)

    def learning_rate(count: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((t - warmup) / decay_steps, 0.0, 1.0)
        if config.schedule == "cosine":
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "linear":
            decay = 1.0 - progress
        else:
            decay = jnp.ones_like(t)
        return peak * jnp.where(t < warmup, t / max(1, warmup), decay)

    return learning_rate
