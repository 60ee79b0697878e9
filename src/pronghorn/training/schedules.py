"""Learning-rate schedules: a linear warm-up, then one of several ways down, or none.

With t the number of updates made so far, w the warm-up, T all updates, p = (t - w) / (T - w) and m the lowest learning
rate as a share of the peak, as in transformers' schedulers:

  t < w:         peak t / w
  cosine:        peak (m + (1 - m) (1 + cos(pi p)) / 2)       Loshchilov & Hutter 2017, SGDR, without restarts
  linear:        peak (m + (1 - m) (1 - p))
  polynomial:    peak (m + (1 - m) (1 - p)^k)
  wsd:           peak until the last D updates, then linear: peak (m + (1 - m) (T - t) / D)
                                                              warm-up, stable, decay: Hu et al. 2024, MiniCPM
  inverse_sqrt:  peak sqrt(w' / (t - w + w')), w' = w, or 10,000 without a warm-up         Vaswani et al. 2017
  constant:      peak
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pronghorn.training.config import TrainConfig

LearningRate = Callable[[jax.typing.ArrayLike], jax.Array]

_TIME_SCALE = 10_000


def make_schedule(config: TrainConfig, total_steps: int) -> LearningRate:
    """The function from updates made so far (int32 scalar) to the learning rate of the next one (fp32 scalar)."""
    peak, warmup, lowest = config.learning_rate, config.warmup_steps, config.min_learning_rate_ratio
    after_warmup = max(1, total_steps - warmup)

    def learning_rate(count: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((t - warmup) / after_warmup, 0.0, 1.0)
        if config.schedule == "cosine":
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "linear":
            decay = 1.0 - progress
        elif config.schedule == "polynomial":
            decay = (1.0 - progress) ** config.schedule_power
        elif config.schedule == "wsd":
            last = max(1, round(config.decay_fraction * total_steps))
            decay = jnp.clip((total_steps - t) / last, 0.0, 1.0)
        else:
            decay = jnp.ones_like(t)
        decay = lowest + (1.0 - lowest) * decay
        if config.schedule == "inverse_sqrt":
            scale = warmup or _TIME_SCALE
            decay = jnp.sqrt(scale / jnp.maximum(t - warmup + scale, 1.0))
        return peak * jnp.where(t < warmup, t / max(1, warmup), decay)

    return learning_rate
