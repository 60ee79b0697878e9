"""`DataConfig`: where the rows are and how they become tokens, checked when it is made."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from pronghorn.errors import InputError

RowFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]
LossOn = Literal["assistant", "all"]
Overlong = Literal["truncate", "drop", "error"]

#: Canonical column names; `DataConfig.columns` maps them to the names a file uses.
COLUMNS = (
    "messages",
    "conversations",
    "tools",
    "system",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "text",
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data and what is done to it.

    Attributes:
      path: a file (.jsonl, .json, .parquet, .csv, .tsv), a folder, or a name on the Hugging Face hub.
      split: which split of a folder or hub set; None takes "train".
      eval_path: rows for evaluation; None holds out `eval_fraction` of the training rows.
      eval_fraction: share of rows held out, in [0, 1).
      format: what a row looks like; "auto" looks at the rows and gives its reason.
      max_length: tokens in a row of a batch, and the longest document.
      packing: several documents in a row (separated by segment ids), else one document padded.
      loss_on: "assistant": assistant turns and completions with their end-of-turn token; "all": every token
        but the first of a document.
      overlong: what happens to a document of more than `max_length` tokens.
      system_prompt: put in front of conversations that have no system message.
      chat_template: a Jinja template or the path of a file that holds one; None uses the tokenizer's own.
      columns: canonical name -> name in the file, for example {"prompt": "question", "completion": "answer"}.
      seed: decides the order of rows and what is held out.

    Raises:
      InputError: a value out of range, naming the option and the choices.
    """

    path: str | None = None
    split: str | None = None
    eval_path: str | None = None
    eval_fraction: float = 0.0
    format: RowFormat = "auto"
    max_length: int = 2048
    packing: bool = True
    loss_on: LossOn = "assistant"
    overlong: Overlong = "truncate"
    system_prompt: str | None = None
    chat_template: str | None = None
    columns: Mapping[str, str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("format", self.format, get_args(RowFormat))
        _one_of("loss_on", self.loss_on, get_args(LossOn))
        _one_of("overlong", self.overlong, get_args(Overlong))
        if not _is_int(self.max_length) or self.max_length < 2:
            raise InputError(
                f"data.max_length={self.max_length!r}: give a whole number of tokens, at least 2"
            )
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise InputError(f"data.seed={self.seed!r}: give a whole number from 0 to 2**63 - 1")
        if not isinstance(self.packing, bool):
            raise InputError(f"data.packing={self.packing!r}: give true or false")
        fraction = self.eval_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
            raise InputError(f"data.eval_fraction={fraction!r}: give a number from 0 up to, not including, 1")
        for name in ("path", "split", "eval_path", "system_prompt", "chat_template"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"data.{name}={value!r}: give text")
        self._check_columns()

    def _check_columns(self) -> None:
        if self.columns is None:
            return
        if not isinstance(self.columns, Mapping):
            raise InputError(
                f"data.columns={self.columns!r}: give a mapping such as {{prompt: question, completion: answer}}"
            )
        for ours, theirs in self.columns.items():
            if ours not in COLUMNS:
                raise InputError(
                    f"data.columns: {ours!r} is not a column pronghorn reads; the names are {', '.join(COLUMNS)}"
                )
            if not isinstance(theirs, str):
                raise InputError(f"data.columns.{ours}={theirs!r}: give the name of a column in the file")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"data.{name}={value!r}: choose one of {', '.join(choices)}")
