"""What a row says: find out which of five formats a set is in, and turn its rows into `Example`s.

| format | columns |
|---|---|
| messages | messages: [{role, content, ...}]; tools: [schema] |
| sharegpt | conversations: [{from: human or gpt, value}]; system |
| alpaca | instruction, output; input, system |
| prompt_completion | prompt and completion, both text or both lists of messages |
| text | text |

Any of them may have a number `weight`, a factor on the row's loss; 0 leaves the row out.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pronghorn.data.config import ROLES
from pronghorn.data.sources import Row
from pronghorn.errors import InputError

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_SAMPLED_ROWS = 100
# Columns of sets that name one question and one answer in their own way.
_PAIRS = (
    ("instruction", "response"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("user", "assistant"),
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One row, understood.

    Attributes:
      kind: "chat" (messages), "completion" (prompt and completion text) or "text".
      origin: where the row came from.
      messages, trained: of a chat, the messages and, for each, whether it is an assistant's that may be in the loss.
      eligible: of a chat, for each message, whether it may be in the loss if its role is chosen.
      tools: of a chat, the JSON schemas of the functions it may call, or None.
      prompt, text: of a completion, the prompt and what follows it; of a text, "" and the text.
      weight: factor on the loss.
    """

    kind: Literal["chat", "completion", "text"]
    origin: str
    messages: tuple[Mapping[str, Any], ...] = ()
    trained: tuple[bool, ...] = ()
    tools: tuple[Mapping[str, Any], ...] | None = None
    prompt: str = ""
    text: str = ""
    weight: float = 1.0
    eligible: tuple[bool, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing in it at all: no message with content, no text."""
        if self.kind == "chat":
            return not any(m.get("content") or m.get("tool_calls") for m in self.messages)
        return not self.text


@dataclasses.dataclass(frozen=True)
class DetectedFormat:
    """A format of `formats.READERS` and, in words, why it was taken.

    Attributes:
      columns: canonical name -> name in the rows, where the columns themselves decided it.
    """

    name: str
    reason: str
    columns: Mapping[str, str] | None = None


def detect_format(
    rows: Sequence[Row], chosen: str = "auto", columns: Mapping[str, str] | None = None
) -> DetectedFormat:
    """Decide what the rows are from the first hundred of them.

    Raises:
      InputError: no format fits; names the columns there are and the option that says what they mean.
    """
    if chosen != "auto":
        return DetectedFormat(chosen, "chosen by data.format")
    sample = [renamed(row, columns) for row in rows[:_SAMPLED_ROWS]]
    seen = {name for values in sample for name, value in values.items() if value is not None}
    first = {name: next(v[name] for v in sample if v.get(name) is not None) for name in seen}
    if "messages" in seen:
        return DetectedFormat("messages", "the rows have a column 'messages'")
    if "conversations" in seen:
        turns = first["conversations"]
        turn = turns[0] if isinstance(turns, list | tuple) and turns else {}
        if isinstance(turn, Mapping) and "role" in turn:
            return DetectedFormat(
                "messages", "the rows have 'conversations' whose turns have 'role' and 'content'"
            )
        return DetectedFormat("sharegpt", "the rows have 'conversations' whose turns have 'from' and 'value'")
    for name, needed in (
        ("prompt_completion", ("prompt", "completion")),
        ("alpaca", ("instruction", "output")),
        ("text", ("text",)),
    ):
        if seen.issuperset(needed):
            return DetectedFormat(name, f"the rows have {' and '.join(map(repr, needed))}")
    for question, answer in _PAIRS:
        if not columns and seen.issuperset((question, answer)):
            reason = (
                f"the rows have {question!r} and {answer!r}, taken as what is asked and answered in one turn"
            )
            return DetectedFormat("alpaca", reason, {"instruction": question, "output": answer})
    origin = rows[0].origin if rows else "the dataset"
    raise InputError(
        f"{origin}: no known row format has the columns {', '.join(sorted(map(repr, seen))) or '(none)'}; name them "
        "with data.columns, for example {prompt: question, completion: answer}, or use messages, conversations, "
        "instruction/output, prompt/completion or text"
    )


def read_row(row: Row, format: str, columns: Mapping[str, str] | None = None) -> Example:
    """Turn one row into an Example.

    Raises:
      InputError: the row does not fit; names its origin and what is missing or wrong.
    """
    values = renamed(row, columns)
    example = READERS[format](values, row.origin)
    weight = values.get("weight")
    if weight is None:
        return example
    if isinstance(weight, str):  # CSV has no numbers
        with contextlib.suppress(ValueError):
            weight = float(weight)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
        raise InputError(f"{row.origin}: 'weight' is {weight!r}; it must be a number from 0 to a million")
    return dataclasses.replace(example, weight=float(weight))


def renamed(row: Row, columns: Mapping[str, str] | None) -> Mapping[str, Any]:
    """The row's values under canonical names: `columns` maps our name to the file's."""
    if not columns:
        return row.values
    missing = [theirs for theirs in columns.values() if theirs not in row.values]
    if missing:
        raise InputError(
            f"{row.origin}: data.columns names {missing[0]!r}, but the row has {', '.join(map(repr, row.values))}"
        )
    taken = set(columns.values())
    rest = {name: value for name, value in row.values.items() if name not in taken and name not in columns}
    return rest | {ours: row.values[theirs] for ours, theirs in columns.items()}


def _messages_row(values: Mapping[str, Any], origin: str) -> Example:
    name = "messages" if values.get("messages") is not None else "conversations"
    messages = _message_list(values.get(name), origin, "messages" if name not in values else name)
    return _chat(messages, origin, values.get("tools"))


def _sharegpt_row(values: Mapping[str, Any], origin: str) -> Example:
    turns = values.get("conversations")
    if not isinstance(turns, list | tuple):
        raise InputError(f"{origin}: 'conversations' is {_kind(turns)}; sharegpt rows need a list of turns")
    messages = []
    system = values.get("system")
    if system:
        messages.append({"role": "system", "content": _text(system, origin, "system")})
    for number, turn in enumerate(turns, 1):
        place = f"turn {number} of 'conversations'"
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise InputError(f"{origin}: {place} lacks 'from' or 'value'; it is {_kind(turn)}")
        role = _SHAREGPT_ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise InputError(
                f"{origin}: {place} is from {str(turn['from'])[:40]!r}; known are {', '.join(_SHAREGPT_ROLES)}"
            )
        text = _text(turn["value"], origin, place)
        called = _function_call(text) if turn["from"] == "function_call" else None
        messages.append({"role": role, "content": text} if called is None else called)
    return _chat(messages, origin, values.get("tools"))


def _function_call(text: str) -> dict[str, Any] | None:
    """A turn from "function_call" whose text is {"name": .., "arguments": {..}}, or a list of such."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and "name" in c and "arguments" in c for c in calls):
        return None
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": c} for c in calls],
    }


def _alpaca_row(values: Mapping[str, Any], origin: str) -> Example:
    instruction = _text(_needed(values, "instruction", origin, "alpaca"), origin, "instruction")
    output = _text(_needed(values, "output", origin, "alpaca"), origin, "output")
    extra = values.get("input")
    question = f"{instruction}\n\n{_text(extra, origin, 'input')}" if extra else instruction
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    if values.get("system"):
        messages.insert(0, {"role": "system", "content": _text(values["system"], origin, "system")})
    if not output and not question:
        messages = []
    return _chat(messages, origin, None)


def _prompt_completion_row(values: Mapping[str, Any], origin: str) -> Example:
    prompt = _needed(values, "prompt", origin, "prompt_completion")
    completion = _needed(values, "completion", origin, "prompt_completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Example(
            "completion",
            origin,
            prompt=_text(prompt, origin, "prompt"),
            text=_text(completion, origin, "completion"),
        )
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
        before = _message_list(prompt, origin, "prompt")
        after = _message_list(completion, origin, "completion")
        return _chat(before + after, origin, values.get("tools"), trained_from=len(before))
    raise InputError(
        f"{origin}: 'prompt' is {_kind(prompt)} and 'completion' is {_kind(completion)}; "
        "give both as text or both as lists of messages"
    )


def _text_row(values: Mapping[str, Any], origin: str) -> Example:
    return Example("text", origin, text=_text(_needed(values, "text", origin, "text"), origin, "text"))


READERS = {
    "messages": _messages_row,
    "sharegpt": _sharegpt_row,
    "alpaca": _alpaca_row,
    "prompt_completion": _prompt_completion_row,
    "text": _text_row,
}


def _chat(messages: list[dict[str, Any]], origin: str, tools: Any, trained_from: int = 0) -> Example:
    # OpenAI's `"weight": 0` on a message; no template reads it.
    eligible = tuple(i >= trained_from and m.pop("weight", 1) != 0 for i, m in enumerate(messages))
    trained = tuple(one and m["role"] == "assistant" for one, m in zip(eligible, messages, strict=True))
    tools = _tools(tools, origin)
    return Example("chat", origin, tuple(messages), trained, tools, eligible=eligible)


def _message_list(value: Any, origin: str, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{origin}: {name!r} is {_kind(value)}; it must be a list of messages")
    messages = []
    for number, message in enumerate(value, 1):
        place = f"message {number} of {name!r}"
        if not isinstance(message, Mapping):
            raise InputError(f"{origin}: {place} is {_kind(message)}; it must have 'role' and 'content'")
        role = message.get("role")
        if role not in ROLES:
            raise InputError(
                f"{origin}: {place} has the role {str(role)[:40]!r}; known are {', '.join(ROLES)}"
            )
        if message.get("content") is None and not message.get("tool_calls"):
            raise InputError(f"{origin}: {place} has no 'content'")
        read = {key: item for key, item in message.items() if item is not None}
        if "content" in read:
            read["content"] = _content(read["content"], origin, place)
        messages.append(read)
    return messages


def _content(value: Any, origin: str, place: str) -> str:
    """Text, or a list of text parts joined: few templates read parts."""
    if isinstance(value, list | tuple):
        parts = []
        for part in value:
            if not isinstance(part, Mapping) or part.get("type", "text") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
                raise InputError(
                    f"{origin}: {place} has a part of type {kind!r}; only text can be trained on"
                )
            parts.append(_text(part.get("text"), origin, place))
        return "".join(parts)
    return _text(value, origin, place)


def _tools(value: Any, origin: str) -> tuple[Mapping[str, Any], ...] | None:
    if not value:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{origin}: 'tools' is text that is not JSON; give a list of function schemas"
            ) from error
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise InputError(f"{origin}: 'tools' is {_kind(value)}; give a list of function schemas")
    return tuple(value)


def _needed(values: Mapping[str, Any], name: str, origin: str, format: str) -> Any:
    if values.get(name) is None:
        raise InputError(
            f"{origin}: a {format} row needs {name!r}, this one has {', '.join(map(repr, values)) or 'no columns'}; "
            "name it with data.columns or choose another data.format"
        )
    return values[name]


def _text(value: Any, origin: str, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{origin}: {name} is {_kind(value)}; it must be text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{origin}: {name} holds half of a surrogate pair at character {error.start}, which is not text"
            ) from error
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(repr, list(value)[:8])) or 'nothing'}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"
