"""`DataConfig`: where the rows are and how they become tokens, checked when it is made."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from pronghorn.errors import InputError

RowFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]
LossOn = Literal["assistant", "last", "all"]
Overlong = Literal["auto", "truncate", "split", "drop", "error"]
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

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
    "weight",
)


@dataclasses.dataclass(frozen=True)
class MixtureSource:
    """One part of `DataConfig.mixture`.

    Attributes:
      path, split, format, columns: as in `DataConfig`.
      weight: share of the rows of batches, relative to the other parts'. Packed rows are full, so it is the share of
        tokens. None: as large as the set is, so that each document comes once an epoch.
    """

    path: str
    weight: float | None = None
    split: str | None = None
    format: RowFormat = "auto"
    columns: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if self.weight is not None and not (number and 0 < self.weight < float("inf")):
            raise InputError(f"data.mixture: weight={self.weight!r} of {self.path!r}: give a number above 0")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data and what is done to it.

    Attributes:
      path: a file (.jsonl, .json, .parquet, .csv, .tsv, .txt, .md), a folder, or a name on the Hugging Face hub.
      split: which split of a folder or hub set; None takes "train".
      eval_path: rows for evaluation; None holds out `eval_fraction` of the training rows.
      eval_fraction: share of rows held out, in [0, 1).
      format: what a row looks like; "auto" looks at the rows and gives its reason.
      max_length: tokens in a row of a batch, and the longest document.
      packing: several documents in a row (separated by segment ids), else one document padded.
      loss_on: "assistant": assistant turns and completions with their end-of-turn token; "last": the last of these
        turns only; a list of roles such as [assistant, tool]: the turns of these; "all": every token but the first of a
        document. A message with "weight": 0 is never in the loss (but under "all").
      overlong: what happens to a row of more than `max_length` tokens: "truncate", "split" into documents that
        overlap by one token (so that each token is predicted once), "drop", "error"; "auto" splits text and truncates
        the others.
      system_prompt: put in front of conversations that have no system message.
      chat_template: a Jinja template, the path of a file that holds one, or the name of a shipped one (chatml, llama3,
        ...); None uses the tokenizer's own.
      columns: canonical name -> name in the file, for example {"prompt": "question", "completion": "answer"}.
      mixture: several sets instead of `path`, mixed by weight.
      cache_dir: a folder for tokenised sets, found again by the content of rows, tokenizer, template and settings, and
        mapped instead of held in memory: rows are then streamed, and a set may be larger than memory.
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
    loss_on: LossOn | tuple[str, ...] = "assistant"
    overlong: Overlong = "auto"
    system_prompt: str | None = None
    chat_template: str | None = None
    columns: Mapping[str, str] | None = None
    mixture: tuple[MixtureSource, ...] = ()
    cache_dir: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("format", self.format, get_args(RowFormat))
        self._check_loss_on()
        self._check_mixture()
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
        for name in ("path", "split", "eval_path", "system_prompt", "chat_template", "cache_dir"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"data.{name}={value!r}: give text")
        self._check_columns()

    def _check_loss_on(self) -> None:
        if isinstance(self.loss_on, list):
            object.__setattr__(self, "loss_on", tuple(self.loss_on))
        if not isinstance(self.loss_on, tuple):
            _one_of("loss_on", self.loss_on, (*get_args(LossOn), "or a list of roles"))
        elif not self.loss_on or any(role not in ROLES for role in self.loss_on):
            raise InputError(f"data.loss_on={list(self.loss_on)!r}: list roles of {', '.join(ROLES)}")

    def _check_mixture(self) -> None:
        if isinstance(self.mixture, list):
            object.__setattr__(self, "mixture", tuple(self.mixture))
        if not self.mixture:
            return
        if not all(isinstance(source, MixtureSource) for source in self.mixture):
            raise InputError("data.mixture: give a list of {path: FILE, weight: NUMBER}")
        given = {source.weight is not None for source in self.mixture}
        if len(given) > 1:
            raise InputError("data.mixture: give every path a weight, or none of them")
        if len(self.mixture) > 256:
            raise InputError(
                f"data.mixture: {len(self.mixture)} paths, at most 256 can be mixed; join some files"
            )
        if self.path is not None or self.columns is not None or self.split is not None:
            raise InputError(
                "data.mixture: path, split and columns belong into each of its entries; take them out beside it"
            )

    def _check_columns(self) -> None:
        if self.columns is None:
            return
        if not isinstance(self.columns, Mapping):
            raise InputError(
                f"data.columns={self.columns!r}: give a mapping such as {{prompt: question, completion: answer}}"
            )
        if (
            "response" in self.columns and "completion" not in self.columns
        ):  # the other name people know it by
            renamed = {
                "completion" if ours == "response" else ours: theirs for ours, theirs in self.columns.items()
            }
            object.__setattr__(self, "columns", renamed)
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
