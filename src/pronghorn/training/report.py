"""What is printed before step 1: parameters, tokens, memory, arithmetic, every setting, one example with its mask."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.text import Text

from pronghorn.data import Dataset
from pronghorn.data.preview import pieces, summary, visible
from pronghorn.training.memory_plan import MemoryPlan

_SHOWN_TOKENS = 400


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What a run is, apart from its settings and memory.

    Attributes:
      model: architecture, dtype, layer layout in a few words.
      data: format of the rows and its reason, lengths, what was cut or left out, in a few words.
      rows, real_tokens, trained_tokens: of one pass over the data.
      padded_tokens: positions of one pass that hold no token.
      steps: updates of the whole run.
      steps_per_epoch: updates of one pass.
    """

    model: str
    data: str
    rows: int
    real_tokens: int
    trained_tokens: int
    padded_tokens: int
    steps: int
    steps_per_epoch: int


def run_facts(trainer: Any, total_steps: int) -> RunFacts:
    """What there is to say of a trainer's model and data."""
    stats, model = trainer.dataset.stats, trainer.model
    shape = model.config
    layout = "scanned" if any(segment.stacked for segment in model.segments) else "unrolled"
    per_epoch = len(trainer.loader)
    return RunFacts(
        model=f"{shape.family}, {shape.num_layers} layers ({layout}), hidden {shape.hidden_size}, {model.dtype}",
        data=summary(trainer.dataset),
        rows=stats.rows,
        real_tokens=stats.real_tokens,
        trained_tokens=stats.trained_tokens,
        padded_tokens=trainer.loader.padding,
        steps=total_steps,
        steps_per_epoch=per_epoch,
    )


def print_report(
    console: Console, facts: RunFacts, plan: MemoryPlan, configs: dict[str, Any], example: Text
) -> None:
    """Print everything that is known before step 1.

    Args:
      configs: name -> frozen dataclass; settings that are at their defaults are listed apart.
      example: from `example_text`.
    """
    trained, frozen = plan.trained_parameters, plan.frozen_parameters
    share = 100 * trained / max(1, trained + frozen)
    masked = facts.real_tokens - facts.trained_tokens
    lines = [
        f"model          {facts.model}",
        f"parameters     {trained:,} trained ({share:.2f} %), {frozen:,} frozen",
        f"tokens         {facts.real_tokens:,} in {facts.rows:,} rows: {facts.trained_tokens:,} in the loss, "
        f"{masked:,} masked; {facts.padded_tokens:,} padding a pass",
        f"rows           {visible(facts.data)}",
        f"steps          {facts.steps:,} of {plan.tokens_per_step:,} positions "
        f"({facts.steps / facts.steps_per_epoch:.2f} passes of {facts.steps_per_epoch:,} steps)",
        *plan.memory_lines(),
        f"arithmetic     {plan.flops_per_step:.3g} FLOP a full step, memory policy {plan.memory_policy}",
        f"compiled in    {plan.compile_seconds:.1f} s",
        *settings_lines(configs),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(example, highlight=False, soft_wrap=True)


def settings_lines(configs: dict[str, Any]) -> list[str]:
    """Two lines: the settings that were given, and those left at their defaults."""
    given: list[str] = []
    defaults: list[str] = []
    for name, config in configs.items():
        for field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
            value = getattr(config, field.name)
            default = (
                field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            )
            (defaults if value == default else given).append(f"{name}.{field.name}={value}")
    return [f"given          {' '.join(given) or 'nothing'}", f"defaults       {' '.join(defaults)}"]


def example_text(dataset: Dataset, index: int, tokenizer: Any, *, colour: bool) -> Text:
    """A document, decoded; what is in the loss is green, or between ⟦ ⟧ where there is no colour."""
    text = Text("example        ")
    text.append(f"{visible(dataset.origins[index])}, ")
    text.append("green is in the loss, dim is masked\n" if colour else "⟦in the loss⟧, the rest is masked\n")
    if tokenizer is None:
        ids, labels = dataset.document(index)
        return text.append(
            f"token ids {ids[:_SHOWN_TOKENS].tolist()}, {int((labels >= 0).sum())} in the loss"
        )
    for piece in pieces(dataset, index, tokenizer, limit=_SHOWN_TOKENS):
        shown = visible(piece.text)
        if not piece.trained:
            text.append(shown, style="dim")
        elif colour:
            text.append(shown, style="green")
        else:
            text.append(f"⟦{shown}⟧")
    return text
