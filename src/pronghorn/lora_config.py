"""What an adapter is: `LoRAConfig` chooses it, `AdapterInfo` is what it carries with it from then on."""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Mapping
from typing import Any

from pronghorn.errors import InputError

ALL_LINEAR = "all-linear"
HEAD, EMBEDDING = "lm_head", "embed_tokens"
EXPERTS = ".mlp.experts."  # in the name of a linear that every expert has one of
STARTS = ("kaiming", "gaussian", "pissa", "olora", "loftq")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which adapters to add.

    Attributes:
      rank: r, the inner size of every adapter.
      alpha: numerator of the scale; None means `rank`, so that the scale is 1 (sqrt(r) for rsLoRA).
      targets: "all-linear" (every linear inside the layers, but neither the head nor experts), or names and patterns.
        A name matches the end of a module's name ("q_proj", "mlp.up_proj", "lm_head", "embed_tokens"), ours or else
        that of transformers ("qkv_proj" of Phi 3 is q, k and v), a pattern with `*`, `?` or `[` matches all of it as a
        shell would ("layers.*.mlp.up_proj"), and "re:..." is a regular expression for all of it. "experts.gate_proj",
        "experts.up_proj" and "experts.down_proj" give every expert an A and a B of its own.
      exclude: names and patterns as in `targets`, of modules that get none.
      dropout: share of the inputs of A that is dropped while training.
      use_rslora: scale by alpha / sqrt(r).
      use_dora: also train the length of every row of the adapted weight (`pallas_kernels.dora`).
      init: how the factors start (`lora_start`): "kaiming", "gaussian", "pissa", "pissa_niter_4", "olora", "loftq".
      layers: indices of the layers to adapt; None adapts all. The head and the embedding are not layers.
      rank_pattern: {name or pattern as in `targets`: rank} of modules that depart from `rank`; the first match counts.
      alpha_pattern: the same for alpha.
      seed: of A. A module's start depends on the seed and its name only, not on the other targets.

    Raises:
      InputError: for a value that cannot be used.
    """

    rank: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: tuple[str, ...] = ()
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "kaiming"
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank={self.rank} must be at least 1.")
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise InputError(f"lora.alpha={self.alpha} must be positive; leave it out for alpha = rank.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout={self.dropout} must be at least 0 and below 1.")
        for name in ("targets", "layers", "exclude"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.targets or not all(self.targets):
            raise InputError('lora.targets is empty; use "all-linear" or names such as "q_proj".')
        if self.layers is not None and not self.layers:
            raise InputError("lora.layers is empty; leave it out for all layers.")
        if not all(self.exclude):
            raise InputError("lora.exclude has an empty name; leave it out.")
        for name, rank in (self.rank_pattern or {}).items():
            if not isinstance(rank, int) or rank < 1:
                raise InputError(f"lora.rank_pattern.{name}={rank} must be a whole number, at least 1.")
        for name, alpha in (self.alpha_pattern or {}).items():
            if not (alpha > 0 and math.isfinite(alpha)):
                raise InputError(f"lora.alpha_pattern.{name}={alpha} must be positive.")
        if self.init not in STARTS and not self.power_iterations:
            raise InputError(
                f"lora.init={self.init!r} is not known; use one of {', '.join(STARTS)}, or pissa_niter_ and a number."
            )
        if self.init == "loftq" and self.use_dora:
            raise InputError(
                "lora.init=loftq starts at another function than its base, which lora.use_dora would take for its own; "
                "choose one of the two."
            )

    @property
    def power_iterations(self) -> int | None:
        """N of the start "pissa_niter_N"."""
        digits = self.init.removeprefix("pissa_niter_")
        return int(digits) if digits.isdecimal() and digits != self.init else None

    @property
    def scale(self) -> float:
        """s of the formula, where no pattern says otherwise."""
        return adapter_scale(self.rank, self.rank if self.alpha is None else self.alpha, self.use_rslora)

    def rank_and_alpha(self, name: str, layer: int | None) -> tuple[int, float]:
        """Those of one module: the pattern's where one matches, alpha being the module's rank where none is given."""
        rank = first_match(self.rank_pattern, name, layer, self.rank)
        alpha = first_match(self.alpha_pattern, name, layer, rank if self.alpha is None else self.alpha)
        return rank, float(alpha)


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """Tokens that a model was given (`new_tokens.add_tokens`), one run of ids. Static and hashable.

    Attributes:
      first, count: their ids are first .. first + count - 1.
      base_hash: of the model before.
    """

    first: int
    count: int
    base_hash: str


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """What an adapter carries with it, so that nobody has to type it again at export. Static and hashable.

    Attributes:
      rank, alpha, use_rslora, use_dora, init, dropout, targets, layers: as in `LoRAConfig`; alpha is a number here.
      base_hash: `base_hash` of the model that the adapter was made for.
      alpha_pattern: (module name, alpha) pairs where an adapter from elsewhere departs from `alpha`. Ranks that depart
        from `rank` are seen in the arrays.
    """

    rank: int
    alpha: float
    use_rslora: bool
    dropout: float
    targets: tuple[str, ...]
    layers: tuple[int, ...] | None
    base_hash: str
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    use_dora: bool = False
    init: str = "kaiming"


def adapter_scale(rank: int, alpha: float, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def matches(name: str, layer: int | None, target: str) -> bool:
    """Whether a target of `LoRAConfig.targets` chooses the module `name`, which is in a layer or (None) in none."""
    if target == ALL_LINEAR:
        return layer is not None and EXPERTS not in name
    if target.startswith("re:"):
        try:
            return re.fullmatch(target[3:], name) is not None
        except re.error as error:
            raise InputError(f"lora.targets: {target!r} is not a regular expression ({error}).") from None
    target = target.removeprefix("model.")
    if any(mark in target for mark in "*?["):
        return fnmatch.fnmatchcase(name, target)
    return name == target or name.endswith("." + target)


def first_match(pattern: Mapping[str, Any] | None, name: str, layer: int | None, usual: Any) -> Any:
    """The value of the first entry whose key chooses the module, else `usual`."""
    return next((v for target, v in (pattern or {}).items() if matches(name, layer, target)), usual)
