"""What the held-out losses of a run decide: which checkpoint is the best, and when to stop early."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class HeldOutHistory:
    """The best held-out loss so far, and how many evaluations in a row have not bettered it.

    A checkpoint's metadata carries it, so that a resumed run stops where the uninterrupted one would.

    Attributes:
      patience: stop after so many evaluations in a row without a new best; None never stops.
      delta: how much smaller than the best a loss has to be to count as better.
      best_loss, best_step: of the best evaluation; infinite and None before the first.
      stale: evaluations since then.
    """

    patience: int | None = None
    delta: float = 0.0
    best_loss: float = math.inf
    best_step: int | None = None
    stale: int = 0

    def see(self, step: int, loss: float) -> bool:
        """Note an evaluation; whether it is a new best. A loss that is not finite never is."""
        if math.isfinite(loss) and loss < self.best_loss - (
            self.delta if self.best_step is not None else 0.0
        ):
            self.best_loss, self.best_step, self.stale = loss, step, 0
            return True
        self.stale += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether the run should stop."""
        return self.patience is not None and self.stale >= self.patience

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"best_loss": self.best_loss, "best_step": self.best_step, "stale": self.stale}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Go on from what `metadata` gave."""
        if metadata.get("best_step") is not None:
            self.best_loss, self.best_step = float(metadata["best_loss"]), int(metadata["best_step"])
        self.stale = int(metadata.get("stale", 0))
