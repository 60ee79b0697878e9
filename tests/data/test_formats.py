"""Formats are found with a reason, rows become examples, and a row that does not fit says what is missing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn.data.config import DataConfig, MixtureSource
from pronghorn.data.formats import READERS, detect_format, read_row
from pronghorn.data.sources import Row, load_rows
from pronghorn.errors import InputError

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def _read(values, format=None, columns=None):
    rows = load_rows([values])
    return read_row(rows[0], format or detect_format(rows, columns=columns).name, columns)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"messages": [U, A], "id": 3}, "messages"),
        ({"conversations": [U, A]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "sharegpt"),
        ({"instruction": "q", "output": "a"}, "alpaca"),
        ({"instruction": "q", "input": "", "output": "a", "text": "q a"}, "alpaca"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"text": "t", "meta": {}}, "text"),
    ],
)
def test_format_is_detected_with_a_reason(values, name):
    found = detect_format(load_rows([values]))
    assert found.name == name
    assert "'" in found.reason


def test_chosen_format_wins_over_detection():
    assert detect_format(load_rows([{"messages": [U], "text": "t"}]), "text").name == "text"


def test_unknown_columns_are_told_with_the_cure():
    with pytest.raises(InputError, match=r"row 1: .*'back', 'front'.*data\.columns"):
        detect_format(load_rows([{"front": "q", "back": "a"}]))


def test_well_known_pairs_of_columns_are_one_turn_and_the_reason_says_so():
    rows = load_rows([{"question": "q", "answer": "a", "id": 3}])
    format = detect_format(rows)
    assert format.name == "alpaca" and "'question' and 'answer'" in format.reason
    example = read_row(rows[0], format.name, format.columns)
    assert [m["content"] for m in example.messages] == ["q", "a"]


def test_weights_of_rows_and_messages():
    example = _read({"prompt": "p", "completion": "c", "weight": "0.5"})
    assert example.weight == 0.5 and _read({"text": "t"}).weight == 1
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no", "weight": 0}]
    example = _read(
        {"messages": [*messages, messages[0], {"role": "assistant", "content": "yes", "weight": 1}]}
    )
    assert example.trained == (False, False, False, True) and "weight" not in example.messages[1]
    for wrong in (-1, "much", True, float("nan"), [1]):
        with pytest.raises(InputError, match="'weight' is"):
            _read({"text": "t", "weight": wrong})


def test_function_calls_of_sharegpt_become_tool_calls():
    call = '{"name": "add", "arguments": {"a": 1}}'
    turns = [("human", "add"), ("function_call", call), ("observation", "1"), ("gpt", "one")]
    example = _read({"conversations": [{"from": who, "value": value} for who, value in turns]})
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert [m["role"] for m in example.messages] == ["user", "assistant", "tool", "assistant"]


def test_columns_are_mapped():
    example = _read({"question": "q", "answer": "a"}, columns={"prompt": "question", "completion": "answer"})
    assert (example.prompt, example.text) == ("q", "a")


def test_mapping_may_exchange_names_and_hides_what_it_replaces():
    example = _read({"text": "a", "prompt": "q"}, columns={"prompt": "prompt", "completion": "text"})
    assert (example.kind, example.prompt, example.text) == ("completion", "q", "a")


def test_missing_mapped_column_is_told():
    with pytest.raises(InputError, match=r"row 1: data\.columns names 'x'"):
        _read({"text": "a"}, columns={"text": "x"})


def test_messages_keep_roles_tools_and_extra_keys():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "system", "content": ""},
        U,
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {**A, "reasoning_content": "because"},
    ]
    example = _read({"messages": messages, "tools": [{"type": "function"}]})
    assert example.messages[2] == {"role": "assistant", "tool_calls": [call]}
    assert example.messages[3:] == tuple(messages[3:])
    assert example.trained == (False, False, True, False, True)
    assert example.tools == ({"type": "function"},)


def test_text_parts_are_joined_and_pictures_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert _read({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "ab"
    with pytest.raises(InputError, match="message 1 of 'messages' has a part of type 'image'"):
        _read({"messages": [{"role": "user", "content": [{"type": "image"}]}]})


def test_sharegpt_roles_are_translated():
    turns = [("system", "s"), ("human", "q"), ("gpt", "a"), ("observation", "o")]
    example = _read({"conversations": [{"from": f, "value": v} for f, v in turns], "system": None})
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "tool"]
    assert [m["content"] for m in example.messages] == ["s", "q", "a", "o"]


def test_alpaca_input_follows_the_instruction():
    assert _read({"instruction": "i", "input": "x", "output": "o"}).messages[0]["content"] == "i\n\nx"
    assert _read({"instruction": "i", "input": "", "output": "o"}).messages[0]["content"] == "i"


def test_only_the_completion_of_message_lists_is_trained():
    example = _read({"prompt": [U, A, U], "completion": [A]})
    assert example.trained == (False, False, False, True)


def test_empty_examples_are_known():
    for values in (
        {"text": ""},
        {"prompt": "q", "completion": ""},
        {"messages": []},
        {"messages": [{"role": "user", "content": ""}]},
        {"instruction": "", "output": ""},
    ):
        assert _read(values).empty, values
    assert not _read({"messages": [U]}).empty


BAD = [
    ("messages", {}, "'messages' is missing"),
    ("messages", {"messages": "text"}, "'messages' is a str"),
    ("messages", {"messages": ["text"]}, "message 1 of 'messages' is a str"),
    (
        "messages",
        {"messages": [U, {"role": "robot", "content": "x"}]},
        "message 2 of 'messages' has the role 'robot'",
    ),
    ("messages", {"messages": [U, {"role": "assistant"}]}, "message 2 of 'messages' has no 'content'"),
    ("messages", {"messages": [{"content": "x"}]}, "has the role 'None'"),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "is a int; it must be text"),
    ("messages", {"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    ("messages", {"messages": [U, A], "tools": "{"}, "'tools' is text that is not JSON"),
    ("messages", {"messages": [U, A], "tools": [3]}, "'tools' is a list of 1"),
    ("sharegpt", {"conversations": None}, "'conversations' is missing"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "turn 1 of 'conversations' lacks 'from' or 'value'"),
    ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien'"),
    ("alpaca", {"instruction": "i"}, "alpaca row needs 'output'"),
    ("alpaca", {"instruction": "i", "output": 3}, "output is a int"),
    ("prompt_completion", {"prompt": "p"}, "needs 'completion'"),
    (
        "prompt_completion",
        {"prompt": "p", "completion": [A]},
        "'prompt' is a str and 'completion' is a list of 1",
    ),
    ("text", {"txt": "t"}, "needs 'text', this one has 'txt'"),
    ("text", {"text": None}, "needs 'text'"),
]


@pytest.mark.parametrize(("format", "values", "message"), BAD)
def test_row_that_does_not_fit_is_told_with_its_origin(format, values, message):
    with pytest.raises(InputError, match=f"^file:7: .*{message}"):
        read_row(Row(values, "file:7"), format)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["messages", "conversations", "tools", "instruction", "output", "prompt", "completion", "text"]
        ),
        _JSON,
        max_size=4,
    ),
    st.sampled_from(sorted(READERS)),
)
def test_any_json_row_is_read_or_refused_in_words(values, format):
    try:
        read_row(Row(values, "f:1"), format)
    except InputError as error:
        assert str(error).startswith("f:1: ")


@pytest.mark.parametrize(
    "options",
    [
        {"format": "csv"},
        {"loss_on": "user"},
        {"overlong": "wrap"},
        {"loss_on": ["robot"]},
        {"loss_on": []},
        {"mixture": ["a.jsonl"]},
        {"mixture": [MixtureSource("a", 1.0), MixtureSource("b")]},
        {"mixture": [MixtureSource("a")], "path": "b"},
        {"max_length": 1},
        {"max_length": True},
        {"max_length": "2048"},
        {"eval_fraction": 1.0},
        {"eval_fraction": -0.1},
        {"packing": "yes"},
        {"seed": -1},
        {"path": 3},
        {"columns": {"question": "prompt"}},
        {"columns": {"prompt": 3}},
        {"columns": "prompt"},
    ],
)
def test_config_refuses_values_out_of_range_naming_the_option(options):
    with pytest.raises(InputError, match=f"data.{next(iter(options))}"):
        DataConfig(**options)
