"""Where in a rendered conversation the assistant speaks, told by rendering and never by looking for markers.

For turn i of messages m, with E = render(m[:i+1]) and P = render(m[:i], add_generation_prompt=True):

* if the text of the whole conversation starts with E, the turn is what E has beyond P: the content, thinking and
  calls as the template writes them, and the end-of-turn token;
* if P is no beginning of E, or the template has no generation prompt, the turn begins where a placeholder stands when
  it takes the place of the content (white space in front of it belongs to the turn if nothing else does);
* if the whole text does not start with E (templates that rewrite history, such as Qwen3's which drops old thoughts),
  the turn is what differs when the whole conversation is rendered with a placeholder in that turn; both sides must
  agree to the byte, or the row is refused. Turns of other roles are always found so: their text, and the end-of-turn
  token if one follows at once.

Content that holds the template's own markers changes nothing in this: no place is found by its text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pronghorn.data.chat_template import ChatTemplate, TemplateRenderError
from pronghorn.errors import InputError

Span = tuple[int, int]
Messages = Sequence[Mapping[str, Any]]


class TurnFinder:
    """Renders conversations and gives the [start, end) characters of their trained turns.

    Args:
      template: the chat template.
      special_tokens: the tokenizer's special tokens; one of them must end an assistant turn.

    Raises:
      InputError: the template does not show what the assistant says, or ends its turn without a special token: a
        model trained on it would never stop.
    """

    def __init__(self, template: ChatTemplate, special_tokens: Sequence[str]) -> None:
        self.template = template
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        any_special = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._turn_end = re.compile(rf"\s*(?:{any_special})")
        self._ends = tuple(longest_first)
        self._shows_tools = False
        self._look_at_template()

    def _look_at_template(self) -> None:
        question = [{"role": "user", "content": "a question"}]
        marked = _placeholder("a question")
        answered = self.template.render([*question, {"role": "assistant", "content": marked}])
        if answered.count(marked) != 1:
            raise InputError(
                "chat template: it does not write what the assistant says exactly once; "
                "set data.chat_template to one that does"
            )
        tail = answered[answered.index(marked) + len(marked) :]
        if not self._turn_end.match(tail):
            raise InputError(
                f"chat template: after the assistant's text it writes {tail[:40]!r}, which is not an end-of-turn "
                "token of the tokenizer, so the model would never learn to stop; set data.chat_template to one "
                "that writes it (usually the eos token)"
            )
        try:
            plain = self.template.render(question)
            self._has_prompt = self.template.render(question, add_generation_prompt=True) != plain
        except TemplateRenderError:  # it may insist on an answer
            self._has_prompt = False

    def render(
        self,
        messages: Messages,
        trained: Sequence[bool],
        tools: Messages | None = None,
    ) -> tuple[str, list[Span]]:
        """The text of the conversation and a span for each message i with trained[i], end-of-turn token included.

        Raises:
          InputError: the template refuses the messages, or the place of a turn cannot be told for certain.
        """
        text = self.template.render(messages, tools=tools)
        if tools and not self._shows_tools:
            if text == self.template.render(messages):
                raise InputError(
                    "chat template: it does not show the tools of the row, so the model would call what it cannot see; "
                    "set data.chat_template to one that does (such as qwen)"
                )
            self._shows_tools = True
        spans = [self._turn(messages, i, text, tools) for i, wanted in enumerate(trained) if wanted]
        if any(message.get("tool_calls") for message in messages):
            self._check_calls(messages, tools, text)
        return text, spans

    def _check_calls(self, messages: Messages, tools: Messages | None, text: str) -> None:
        without = [
            {"content": "", **{key: value for key, value in message.items() if key != "tool_calls"}}
            for message in messages
        ]
        try:
            same = self.template.render(without, tools=tools) == text
        except TemplateRenderError:
            return
        if same:
            raise InputError(
                "chat template: it does not write the calls of functions, so nothing would be learned of them; set "
                "data.chat_template to one that does (such as qwen)"
            )

    def _turn(self, messages: Messages, i: int, text: str, tools: Messages | None) -> Span:
        if messages[i]["role"] != "assistant":
            return self._rewritten_turn(messages, i, text, tools)
        last = i == len(messages) - 1
        ended = text if last else self.template.render(messages[: i + 1], tools=tools)
        if not text.startswith(ended):
            return self._rewritten_turn(messages, i, text, tools)
        end = len(ended.rstrip())
        if not ended.endswith(self._ends, 0, end):
            raise InputError(f"chat template: it writes no end-of-turn token after message {i + 1}; {_CURE}")
        return self._start(messages, i, ended, tools), end

    def _start(self, messages: Messages, i: int, ended: str, tools: Messages | None) -> int:
        before = messages[:i]
        prompt = self.template.render(before, tools=tools, add_generation_prompt=True) if before else None
        if prompt is not None and not ended.startswith(prompt):
            prompt = None
        if prompt is not None and self._has_prompt:
            return len(prompt)
        placeholder = _placeholder(ended)
        marked = self.template.render([*before, {"role": "assistant", "content": placeholder}], tools=tools)
        start = marked.find(placeholder)
        if start < 0 or ended[:start] != marked[:start]:
            raise InputError(f"chat template: where message {i + 1} begins cannot be told; {_CURE}")
        if prompt is not None and ended[len(prompt) : start].isspace():
            return len(prompt)  # as in "[INST] question [/INST] answer": the space is the model's to write
        return start

    def _rewritten_turn(self, messages: Messages, i: int, text: str, tools: Messages | None) -> Span:
        placeholder = _placeholder(text)
        assistant = messages[i]["role"] == "assistant"
        marked_message = {
            **({} if assistant else messages[i]),
            "role": messages[i]["role"],
            "content": placeholder,
        }
        others = [*messages[:i], marked_message, *messages[i + 1 :]]
        problem = (
            f"chat template: it rewrites message {i + 1} once others follow and hides its place; {_CURE}"
        )
        try:
            marked = self.template.render(others, tools=tools)
        except TemplateRenderError as error:
            raise InputError(problem) from error
        if marked.count(placeholder) != 1:
            raise InputError(problem)
        before, after = marked.split(placeholder)
        content_end = len(text) - len(after)
        if not text.startswith(before) or not text.endswith(after) or content_end < len(before):
            raise InputError(problem)
        ending = self._turn_end.match(text, content_end)
        if ending is None and not assistant:
            return len(before), content_end  # as in "[INST] question [/INST]"
        if ending is None:
            raise InputError(f"chat template: it writes no end-of-turn token after message {i + 1}; {_CURE}")
        return len(before), ending.end()


_CURE = (
    "split the conversation into rows that end with the turn to train, or set data.chat_template to another"
)


def _placeholder(text: str) -> str:
    """Text that survives trimming and does not occur in `text`."""
    placeholder = "Placeholder0Q"
    while placeholder in text:
        placeholder += "Q0"
    return placeholder
