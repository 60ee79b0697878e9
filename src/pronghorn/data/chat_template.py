"""Render conversations with the tokenizer's own chat template, in the sandbox of `template_sandbox`.

What comes out is what `tokenizer.apply_chat_template(messages, tokenize=False)` of transformers gives, byte for byte
(tested on real templates); what differs is that a template that misbehaves ends in an `InputError`, within two seconds.
"""

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pronghorn.data.shipped_templates import SHIPPED
from pronghorn.data.template_limits import LimitError
from pronghorn.data.template_sandbox import TemplateEnvironment
from pronghorn.errors import InputError

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_USUAL_KEYS = {"role", "content", "name"}
_MAX_INPUT_DEPTH = 60


class TemplateRenderError(InputError):
    """The template refused or could not render these messages (other messages may be fine)."""


class ChatTemplate:
    """A compiled chat template.

    Args:
      source: the Jinja text.
      special_tokens: names the template may read, such as {"bos_token": "<s>", "eos_token": "</s>"}.
      now: the moment `strftime_now` tells; one moment for a whole data set, so that its rows agree.

    Raises:
      InputError: the text is no Jinja template, or is over the limits of the sandbox.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, Any] | None = None, *, now: datetime | None = None
    ) -> None:
        self.source = source
        self.special_tokens = plain(dict(special_tokens or {}))
        self._characters = _characters(self.special_tokens)
        moment = now or datetime.now()
        self._environment = TemplateEnvironment(moment.strftime)
        self._lock = threading.Lock()  # the environment's meter belongs to one rendering
        try:
            self._template = self._environment.compile_guarded(source)
            self._template.globals = dict(self._template.globals)  # a chain of mappings is slow to copy
        except Exception as error:
            raise InputError(
                f"chat template: cannot be used, {_reason(error)}; correct it or give another"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of `messages`.

        Args:
          messages: mappings with "role", "content" and whatever else the template reads. None values are left out.
          tools: JSON schemas of functions, for templates that show them.
          add_generation_prompt: end with the header of an assistant turn, where the template has one.
          **variables: further names for the template (they win over special tokens).

        Raises:
          TemplateRenderError: the template raised, went over a limit, or reached for something it may not have.
        """
        return self.render_with_spans(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )[0]

    def render_with_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the [start, end) characters inside `{% generation %}` blocks (none where it has no such)."""
        environment = self._environment
        with self._lock:
            try:
                others = {"tools": None if tools is None else plain(list(tools))}
                copies, characters = [], self._characters
                if variables or tools:
                    others |= plain(variables)
                    characters += _characters(others)
                for message in messages:
                    copy, size = _copied(message)
                    copies.append(copy)
                    characters += size
                values = {
                    **self.special_tokens,
                    **others,
                    "messages": copies,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
                environment.meter.start(characters)
                environment.emitted_chars = 0
                environment.generation_spans = []
                pieces = []
                for piece in self._template.generate(**values):
                    environment.emitted_chars += len(piece)
                    pieces.append(piece)
            except Exception as error:
                raise TemplateRenderError(
                    f"chat template: cannot render the messages, {_reason(error)}"
                ) from error
            finally:
                found = environment.generation_spans
                environment.generation_spans = []
                environment.meter.start(0)  # lets go of the values it holds
        text = "".join(pieces)
        for start, inside in found:
            if not text.startswith(inside, start):
                raise TemplateRenderError(
                    "chat template: a {% generation %} block stands inside a macro or a set block, "
                    "where its place cannot be told; move it out"
                )
        return text, [(start, start + len(inside)) for start, inside in found]


def template_source(tokenizer: Any, chosen: str | None = None, *, tools: bool = False) -> str:
    """The template text: `chosen` (a shipped one's name, Jinja text, or a file that holds it), else the tokenizer's.

    Raises:
      InputError: there is none, or the file cannot be read.
    """
    if chosen is not None:
        if chosen in SHIPPED:
            return SHIPPED[chosen].source
        if "{" in chosen or "\n" in chosen:
            return chosen
        try:
            return Path(chosen).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"data.chat_template={chosen!r}: neither Jinja text nor a readable file ({_told(error)}), nor one "
                f"of {', '.join(SHIPPED)}"
            ) from error
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("tool_use") if tools and "tool_use" in own else own.get("default")
    if not own:
        raise InputError(
            "the tokenizer has no chat template and the rows are conversations; set data.chat_template to one "
            f"({', '.join(SHIPPED)}, Jinja text or a file), or give rows with prompt and completion"
        )
    return own


def template_for(tokenizer: Any, chosen: str | None = None, *, tools: bool = False) -> ChatTemplate:
    """`template_source`, compiled, with the tokenizer's special tokens.

    Raises:
      InputError: there is none, it cannot be used, or it is a shipped one whose markers the tokenizer lacks.
    """
    if chosen is not None and chosen in SHIPPED:
        known = tokenizer.get_vocab()
        missing = [token for token in SHIPPED[chosen].markers if token not in known]
        if missing:
            raise InputError(
                f"data.chat_template={chosen!r}: the tokenizer has no token {', '.join(missing)}; give them as "
                "new_tokens, or choose a template that ends turns with the eos token (zephyr, vicuna, alpaca)"
            )
        named = tokenizer.special_tokens_map
        lacking = [n for n in ("bos_token", "eos_token") if n in SHIPPED[chosen].source and n not in named]
        if lacking == ["bos_token"]:  # a model without a start of text starts without one
            return ChatTemplate(SHIPPED[chosen].source, {**named, "bos_token": ""})
        if lacking:
            raise InputError(
                f"data.chat_template={chosen!r}: it ends turns with the eos token and the tokenizer names none"
            )
    return ChatTemplate(template_source(tokenizer, chosen, tools=tools), tokenizer.special_tokens_map)


def _told(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


def plain(value: Any, depth: int = 0) -> Any:
    """A copy in plain JSON types: a template must not get hold of objects with methods.

    Messages lose the keys whose value is None, which is how Parquet and `datasets` fill absent ones.

    Raises:
      InputError: nested too deeply.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > _MAX_INPUT_DEPTH:
        raise InputError(f"a message is nested more than {_MAX_INPUT_DEPTH} deep; flatten it")
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(key, depth + 1): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item, depth + 1) for item in value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a numpy scalar
        return plain(value.item(), depth + 1)
    return f"<{type(value).__name__}>"


def _with_reasoning(message: Any) -> dict[str, Any]:
    """Drop None values; give reasoning under each of the names that templates read it by, as transformers does."""
    if not isinstance(message, dict):
        raise InputError(f"a message is a {type(message).__name__}, not a mapping with role and content")
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING_FIELDS if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _copied(message: Any) -> tuple[dict[str, Any], int]:
    """(a message as a template may see it, its characters). Most hold nothing but texts, which cannot change."""
    if type(message) is dict and message.keys() <= _USUAL_KEYS:
        values = message.values()
        if all(type(value) is str for value in values):
            return dict(message), sum(map(len, values)) + 20
    copy = _with_reasoning(plain(message))
    return copy, _characters(copy)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(key) + _characters(item) + 1 for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(_characters(item) + 1 for item in value)
    return 1


def _reason(error: Exception) -> str:
    """One line about an error from inside a template, without the text of the rows."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply or calls itself without end"
    if isinstance(error, LimitError | InputError):
        return str(error)
    if isinstance(error, MemoryError):
        return "it is too complex"
    message = " ".join(str(error).split())[:300]
    line = getattr(error, "lineno", None)
    where = f"line {line}: " if isinstance(line, int) else ""
    return f"{where}{message or type(error).__name__}"
