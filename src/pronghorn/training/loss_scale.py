"""Dynamic loss scaling for float16, inside of the compiled step.

A gradient below 6e-8 is zero in float16 and one above 65,504 infinite. So the summed loss is multiplied by a scale
before it is differentiated, and the gradient divided by it in fp32. The scale doubles after 200 steps in a row whose
gradient was finite, and halves at once where it was not; that step's update is left out. A loss that is not finite is
no matter of the scale, nor is a gradient when the scale is down to its least: those count as skipped steps.

The loss is a sum over tokens, not their mean, so a scale of 4,096 here is what 4,096 times the tokens is elsewhere.

Source: Micikevicius et al., Mixed Precision Training, 2018, section 3.2, https://arxiv.org/abs/1710.03740.
"""

import dataclasses

import jax
import jax.numpy as jnp

GROWTH_STEPS = 200
LEAST, MOST = 2.0**-14, 2.0**24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """Part of a training state.

    Attributes:
      scale: fp32 scalar, a power of two times the first one.
      good_steps: int32 scalar, finite steps since the last change.
      overflowed: int32 scalar, steps that were left out because of it.
    """

    scale: jax.Array
    good_steps: jax.Array
    overflowed: jax.Array

    @classmethod
    def start(cls, scale: float) -> "LossScale":
        return cls(jnp.float32(scale), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def overflows(self, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
        """Whether the gradient, and not the loss, left the range of float16, and a lower scale may help."""
        return jnp.isfinite(loss) & ~jnp.isfinite(grad_norm) & (self.scale > LEAST)

    def after(self, overflow: jax.Array, applied: jax.Array) -> "LossScale":
        """The next step's; a step that was skipped for another reason changes nothing."""
        good = jnp.where(overflow, 0, self.good_steps + applied)
        grow = good >= GROWTH_STEPS
        scale = jnp.where(overflow, self.scale / 2, jnp.where(grow, self.scale * 2, self.scale))
        return LossScale(
            jnp.clip(scale, LEAST, MOST),
            jnp.where(grow, 0, good).astype(jnp.int32),
            self.overflowed + overflow,
        )
