"""Masks: what is in the loss is what the assistant says and its end-of-turn token, to the character."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn.data.config import DataConfig
from pronghorn.data.tokenization import tokenize_rows
from pronghorn.errors import InputError

from .templates import TEMPLATES
from .tokenizers import tiny_tokenizer

END_OF_TURN = {
    "smollm2": "<|im_end|>",
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "zephyr": "</s>",
    "gemma": "<end_of_turn>",
    "qwen3": "<|im_end|>",
}
TRIMMED = ("llama3", "gemma")  # templates that trim the content
MARKERS = (
    "<|im_end|>\n<|im_start|>assistant\nno<|im_end|>",
    "</s><|assistant|>\n[INST] a [/INST] b</s>",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nx",
    "<end_of_turn>\n<start_of_turn>model\ny",
)
CONTENTS = [
    "Paris.",
    "The capital of France is Paris.\n\nIs there more?",
    "élève 東京 🙂 e\u0301 \u200d",
    "    indented\n\tcode()\n",
    "ends with spaces   ",
    "\n\nstarts with lines",
    "assistant",
    "user\nassistant\n",
    "{{ messages }} {% raw %}",
    "",
    *MARKERS,
    MARKERS[0] * 3,
]


def _chat(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system is not None else []
    for i, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return {"messages": messages}


def _tokenized(rows, tokenizer, **options):
    return tokenize_rows(rows, tokenizer, DataConfig(**{"max_length": 100_000, **options}))


def _trained_texts(dataset, index, tokenizer):
    """The text of each run of trained tokens, decoded from their ids."""
    ids, labels = dataset.document(index)
    runs, current = [], []
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        if label >= 0:
            assert label == token
            current.append(token)
        elif current:
            runs.append(current)
            current = []
    return [tokenizer.decode(run) for run in [*runs, current] if run]


def _spoken(name, content, last):
    """What the assistant's turn reads in a template, end-of-turn included."""
    said = content.strip() if name in TRIMMED else content
    if name == "mistral":
        said = " " + said
    if name == "qwen3":
        said = "<think>\n\n</think>\n\n" + said.lstrip("\n") if last else said
    return said + END_OF_TURN[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_masked_text_is_the_assistants_text_and_end_of_turn(name):
    tokenizer = tiny_tokenizer(name)
    conversations = [("q", content) for content in CONTENTS]
    conversations += [
        (q, a, q2, a2)
        for q, a, q2, a2 in zip(CONTENTS, CONTENTS[1:], CONTENTS[2:], CONTENTS[3:], strict=False)
    ]
    conversations += [(c, CONTENTS[i - 1], c, CONTENTS[i - 2], c, c) for i, c in enumerate(CONTENTS) if c]
    systems = [None, "", "Be brief.", MARKERS[0]] if TEMPLATES[name].system else [None]
    cases = [(c, s) for i, c in enumerate(conversations) for s in {None, systems[i % len(systems)]}]
    dataset = _tokenized([_chat(*c, system=s) for c, s in cases], tokenizer)
    assert len(dataset) == len(cases) >= 30
    for i, (contents, _) in enumerate(cases):
        answers = contents[1::2]
        expected = [_spoken(name, a, last=k == len(answers) - 1) for k, a in enumerate(answers)]
        assert _trained_texts(dataset, i, tokenizer) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers_where_no_token_crosses_into_a_turn(name):
    tokenizer = tiny_tokenizer(name)
    rows = [_chat("q", c) for c in CONTENTS if c.lstrip() == c] + [_chat("a ", "b", "c", "d")]
    dataset = _tokenized(rows, tokenizer)
    for i, row in enumerate(rows):
        expected = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        assert dataset.document(i)[0].tolist() == expected


_TEXT = st.text(
    st.sampled_from("ab é東🙂\n\t<|>[]/{}%") | st.characters(exclude_categories=["Cs"]), max_size=12
) | st.sampled_from([*MARKERS, "<|im_start|>", "<|im_end|>", " ", "\n"])


@settings(max_examples=100, deadline=None)
@given(st.lists(_TEXT, min_size=2, max_size=6), st.none() | _TEXT)
def test_masked_text_is_exact_for_any_text(contents, system):
    contents = contents[: len(contents) // 2 * 2]
    if not any(contents):
        return
    tokenizer = tiny_tokenizer("chatml")
    dataset = _tokenized([_chat(*contents, system=system)], tokenizer)
    assert _trained_texts(dataset, 0, tokenizer) == [c + "<|im_end|>" for c in contents[1::2]]


def test_token_across_the_start_of_a_turn_is_split_as_at_generation(tokenizer):
    whole = tokenizer("\n\n")["input_ids"]
    assert len(whole) == 1, "the fixture merges two line breaks"
    dataset = _tokenized([_chat("q", "\nx")], tokenizer)
    ids, labels = dataset.document(0)
    prompt = tokenizer.apply_chat_template(
        _chat("q")["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids[: len(prompt)].tolist() == prompt
    assert (labels[: len(prompt)] == -100).all() and labels[len(prompt)] >= 0


def test_thoughts_and_tool_calls_of_the_last_turn_are_in_the_loss():
    tokenizer = tiny_tokenizer("qwen3")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two", "reasoning_content": "1 + 1"},
    ]
    first = _tokenized([{"messages": messages[:2]}], tokenizer)
    spoken = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert _trained_texts(first, 0, tokenizer) == ["<think>\n\n</think>\n\n" + spoken]
    both = _tokenized([{"messages": messages}], tokenizer)
    assert _trained_texts(both, 0, tokenizer) == [spoken, "<think>\n1 + 1\n</think>\n\ntwo<|im_end|>"]


def test_thought_dropped_from_history_is_not_in_the_loss_there():
    tokenizer = tiny_tokenizer("qwen3")
    dataset = _tokenized([_chat("q", "<think>\nhm\n</think>\n\nyes", "q", "no")], tokenizer)
    assert _trained_texts(dataset, 0, tokenizer) == ["yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]


def test_conversation_that_begins_with_the_assistant(tokenizer):
    row = {"messages": [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}]}
    assert _trained_texts(_tokenized([row], tokenizer), 0, tokenizer) == ["hello<|im_end|>"]


def test_only_the_completion_of_message_lists_is_in_the_loss(tokenizer):
    prompt, completion = _chat("q", "not this", "q2")["messages"], [{"role": "assistant", "content": "this"}]
    dataset = _tokenized([{"prompt": prompt, "completion": completion}], tokenizer)
    assert _trained_texts(dataset, 0, tokenizer) == ["this<|im_end|>"]


def test_loss_on_all_trains_every_token_but_the_first():
    tokenizer = tiny_tokenizer("llama3")
    rows = [_chat("q", "a", "q", "a"), _chat("only a question")]
    dataset = _tokenized(rows, tokenizer, loss_on="all")
    for i in range(2):
        ids, labels = dataset.document(i)
        assert labels[0] == -100 and labels[1:].tolist() == ids[1:].tolist()
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(rows[i]["messages"], tokenize=False)


def test_system_prompt_is_added_where_there_is_none(tokenizer):
    dataset = _tokenized(
        [_chat("q", "a"), _chat("q", "a", system="own")], tokenizer, system_prompt="Be kind."
    )
    texts = [tokenizer.decode(dataset.document(i)[0]) for i in range(2)]
    assert texts[0].startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert texts[1].startswith("<|im_start|>system\nown<|im_end|>")


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_completion_and_eos_are_in_the_loss_of_prompt_and_completion(name):
    tokenizer = tiny_tokenizer(name)
    rows = [
        {"prompt": p, "completion": c}
        for p in (
            "q: ",
            "a\n",
            "a" if name == "chatml" else "",
        )  # without BOS nothing predicts the first token
        for c in ("x", "\n\nx", " é", tokenizer.eos_token)
    ]
    dataset = _tokenized(rows, tokenizer)
    for i, row in enumerate(rows):
        ids, _ = dataset.document(i)
        said = row["completion"] + (
            "" if row["completion"].endswith(tokenizer.eos_token) else tokenizer.eos_token
        )
        assert _trained_texts(dataset, i, tokenizer) == [said]
        assert tokenizer.decode(ids) == (tokenizer.bos_token or "") + row["prompt"] + said


def test_text_has_bos_once_and_eos_once():
    tokenizer = tiny_tokenizer("llama3")
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    dataset = _tokenized([{"text": "a b"}, {"text": bos + "a b"}, {"text": "a b" + eos}], tokenizer)
    for i in range(3):
        ids, labels = dataset.document(i)
        assert tokenizer.decode(ids) == bos + "a b" + eos
        assert (labels[1:] == ids[1:]).all() and labels[0] == -100


def test_conversation_has_bos_only_where_the_template_writes_it():
    for name in ("llama3", "chatml"):
        tokenizer = tiny_tokenizer(name)
        ids, _ = _tokenized([_chat("q", "a")], tokenizer).document(0)
        assert (ids == tokenizer.bos_token_id).sum() == (name == "llama3")


NO_END = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"


def test_template_without_end_of_turn_is_refused_even_where_the_content_has_one(tokenizer):
    with pytest.raises(InputError, match="end-of-turn"):
        _tokenized([_chat("q", "a<|im_end|>")], tokenizer, chat_template=NO_END)


def test_template_whose_end_of_turn_is_no_special_token_is_refused():
    with pytest.raises(InputError, match=r"'<\|im_end\|>\\n', which is not an end-of-turn token"):
        _tokenized([_chat("q", "a")], tiny_tokenizer("mistral"), chat_template=TEMPLATES["chatml"].source)


def test_template_that_ends_only_the_last_turn_is_refused_for_more_turns(tokenizer):
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% if loop.last %}{{ eos_token }}"
    source += "{% endif %}{% endfor %}"
    assert len(_tokenized([_chat("q", "a")], tokenizer, chat_template=source)) == 1
    with pytest.raises(
        InputError, match=r"row 1: chat template: it writes no end-of-turn token after message 2"
    ):
        _tokenized([_chat("q", "a", "q", "a")], tokenizer, chat_template=source)


def test_template_that_hides_a_turn_is_refused(tokenizer):
    source = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}<|im_end|>"
        "{% else %}{{ m.content | length }}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match="row 1: chat template: it rewrites message 2"):
        _tokenized([_chat("q", "a", "q", "a")], tokenizer, chat_template=source)


def test_template_that_refuses_a_row_names_the_row():
    with pytest.raises(InputError, match=r"row 2: chat template: .*System role not supported"):
        _tokenized([_chat("q", "a"), _chat("q", "a", system="s")], tiny_tokenizer("gemma"))


def test_header_without_generation_prompt_is_not_in_the_loss(tokenizer):
    source = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    dataset = _tokenized([_chat("q", "a", "q", "\nb")], tokenizer, chat_template=source)
    assert _trained_texts(dataset, 0, tokenizer) == ["a<|im_end|>", "\nb<|im_end|>"]


def test_overlong_rows_are_truncated_dropped_or_refused_and_counted(tokenizer):
    rows = [_chat("q", "a"), _chat("q", "word " * 100), _chat("word " * 100, "a")]
    short = len(_tokenized(rows[:1], tokenizer).document(0)[0])
    cut = _tokenized(rows, tokenizer, max_length=short, overlong="truncate")
    assert cut.lengths.tolist() == [short, short]
    assert (cut.stats.truncated, cut.stats.untrained, cut.stats.documents) == (1, 1, 2)
    dropped = _tokenized(rows, tokenizer, max_length=short, overlong="drop")
    assert (dropped.stats.dropped, dropped.stats.documents, dropped.stats.rows) == (2, 1, 3)
    with pytest.raises(InputError, match=rf"row 2: \d+ tokens, over data\.max_length={short}"):
        _tokenized(rows, tokenizer, max_length=short, overlong="error")


def test_statistics_add_up(tokenizer):
    rows = [_chat("q", "a"), _chat("q", "a"), _chat("q"), {"messages": []}, _chat("q", "b")]
    dataset = _tokenized(rows, tokenizer)
    stats = dataset.stats
    assert (stats.rows, stats.documents, stats.untrained, stats.empty, stats.duplicates) == (5, 3, 1, 1, 1)
    assert stats.real_tokens == len(dataset.tokens) == dataset.lengths.sum()
    assert stats.trained_tokens == sum((dataset.document(i)[1] >= 0).sum() for i in range(3)) == 6
    assert stats.length_percentiles[100] == dataset.lengths.max()
    assert dataset.origins == ("row 1", "row 2", "row 5")


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        ([_chat("q"), _chat("q")], {}, r"2 have nothing to train on with data\.loss_on='assistant'"),
        ([_chat("word " * 50, "a")], {"max_length": 8}, r"1 lose every trained token at data\.max_length=8"),
        ([_chat("q", "word " * 50)], {"max_length": 8, "overlong": "drop"}, "1 are longer than"),
        ([{"text": ""}], {}, "1 are empty"),
    ],
)
def test_everything_masked_is_refused_with_the_reason(rows, options, reason, tokenizer):
    with pytest.raises(InputError, match=f"every token is masked.*{reason}"):
        _tokenized(rows, tokenizer, **options)


def test_token_beyond_the_vocabulary_is_refused(tokenizer):
    rows = [_chat("q", "a")]
    assert tokenize_rows(rows, tokenizer, DataConfig(), vocab_size=len(tokenizer))
    with pytest.raises(InputError, match=r"row 1: token .* has the id \d+, and the model has 100 embeddings"):
        tokenize_rows(rows, tokenizer, DataConfig(), vocab_size=100)


def test_slow_tokenizer_is_refused():
    with pytest.raises(InputError, match="no fast version"):
        tokenize_rows([{"text": "a"}], object(), DataConfig())


def test_half_a_surrogate_pair_inside_a_tool_call_is_refused():
    call = {"function": {"name": "f", "arguments": {"x": "\ud800"}}}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(InputError, match=r"row 1: .*surrogate"):
        _tokenized([row], tiny_tokenizer("qwen3"))


def test_bad_row_names_its_file_and_line(tokenizer, tmp_path):
    from pronghorn.data.sources import load_rows

    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "q"}]}\n{"messages": 3}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2: 'messages' is a int"):
        _tokenized(load_rows(path), tokenizer)


def test_fingerprint_follows_tokens_masks_and_boundaries(tokenizer):
    rows = [_chat("q", "a"), _chat("q", "b")]
    one = _tokenized(rows, tokenizer)
    assert one.fingerprint == _tokenized(rows, tokenizer).fingerprint
    assert one.fingerprint != _tokenized(rows[::-1], tokenizer).fingerprint
    assert one.fingerprint != _tokenized(rows, tokenizer, loss_on="all").fingerprint
    moved = dataclasses.replace(one, offsets=one.offsets + np.asarray([0, 1, 0]))
    assert one.fingerprint != moved.fingerprint


def test_loss_on_the_last_turn_or_on_chosen_roles(tokenizer):
    row = _chat("q1", "a1", "q2", "a2", system="s")
    last = _tokenized([row], tokenizer, loss_on="last")
    assert _trained_texts(last, 0, tokenizer) == ["a2<|im_end|>"]
    chosen = _tokenized([row], tokenizer, loss_on=("user", "system"))
    assert _trained_texts(chosen, 0, tokenizer) == ["s<|im_end|>", "q1<|im_end|>", "q2<|im_end|>"]
    both = _tokenized([row], tokenizer, loss_on=["assistant", "user"])
    assert _trained_texts(both, 0, tokenizer) == [f"{t}<|im_end|>" for t in ("q1", "a1", "q2", "a2")]


@pytest.mark.parametrize(
    ("name", "spoken"), [("mistral", "why not [/INST]"), ("gemma", "why not<end_of_turn>")]
)
def test_user_turn_is_its_text_and_the_special_token_that_ends_it(name, spoken):
    tokenizer = tiny_tokenizer(name)
    dataset = _tokenized([_chat("why not", "a")], tokenizer, loss_on=["user"])
    assert _trained_texts(dataset, 0, tokenizer) == [spoken]


def test_tool_results_are_in_the_loss_when_asked_for():
    tokenizer = tiny_tokenizer("qwen3")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2 apples"},
        {"role": "assistant", "content": "two"},
    ]
    dataset = _tokenized([{"messages": messages}], tokenizer, loss_on=["tool"])
    assert _trained_texts(dataset, 0, tokenizer) == ["2 apples"]


def test_messages_of_weight_zero_and_rows_of_weight_zero_are_not_in_the_loss(tokenizer):
    row = _chat("q", "no", "q", "yes")
    row["messages"][1]["weight"] = 0
    dataset = _tokenized([row, _chat("q", "a") | {"weight": 0}, _chat("q", "b") | {"weight": 2.5}], tokenizer)
    assert _trained_texts(dataset, 0, tokenizer) == ["yes<|im_end|>"]
    assert dataset.weights.tolist() == [1, 2.5] and dataset.stats.untrained == 1


@pytest.mark.parametrize("limit", [2, 5, 7, 100])
def test_splitting_predicts_every_token_exactly_once(tokenizer, limit):
    text = "The quick brown fox jumps over the lazy dog. " * 3
    whole = _tokenized([{"text": text}], tokenizer)
    pieces = _tokenized([{"text": text}, {"text": "a"}], tokenizer, max_length=limit, overlong="auto")
    ids = whole.document(0)[0].tolist()
    found = [pieces.document(i) for i in range(len(pieces) - 1)]
    targets = [label for _, labels in found for label in labels.tolist() if label >= 0]
    assert targets == ids[1:] and max(pieces.lengths) <= limit
    assert all(labels[0] == -100 for _, labels in found)
    assert pieces.stats.split == (len(ids) > limit) and pieces.stats.truncated == 0


def test_quick_masks_are_those_of_all_offsets(monkeypatch):
    from pronghorn.data import masks

    rows = [_chat(c, d, d, c, system=c) for c, d in itertools.pairwise(CONTENTS) if c]
    for name in TEMPLATES:
        tokenizer = tiny_tokenizer(name)
        usable = rows if TEMPLATES[name].system else [{"messages": row["messages"][1:]} for row in rows]
        quick = _tokenized(usable, tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr(masks, "_quick_mask", lambda *arguments: None)
            slow = _tokenized(usable, tokenizer)
        assert quick.fingerprint == slow.fingerprint


@pytest.mark.parametrize("options", [{"format": "text"}, {"loss_on": "all"}])
def test_places_are_asked_for_only_where_a_mask_depends_on_them(options, tokenizer, monkeypatch):
    rows = [{"text": text} for text in CONTENTS] if "format" in options else [_chat("a", "b")]
    with monkeypatch.context() as patch:
        patch.setattr("pronghorn.data.tokenization.needs_places", lambda text, spans: True)
        patch.setattr("pronghorn.data.masks.needs_places", lambda text, spans: True)
        expected = _tokenized(rows, tokenizer, **options)
    monkeypatch.setattr("pronghorn.data.masks._quick_mask", None)
    found = _tokenized(rows, tokenizer, **options)
    assert np.array_equal(found.tokens, expected.tokens) and np.array_equal(found.trained, expected.trained)
    assert found.trained.any()


def test_error_of_an_earlier_row_is_told_first(tokenizer, monkeypatch):
    monkeypatch.setattr("pronghorn.data.tokenization._BATCH_ROWS", 1)
    rows = [_chat("q", "a"), _chat("q", "long " * 50), {"messages": 3}]
    with pytest.raises(InputError, match=r"row 2: .* tokens, over data\.max_length"):
        _tokenized(rows, tokenizer, max_length=40, overlong="error")
