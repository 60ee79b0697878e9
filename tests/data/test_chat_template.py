"""Rendering equals transformers' byte for byte, and a hostile template ends soon, in words."""

import time
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn.data.chat_template import ChatTemplate, TemplateRenderError, template_source
from pronghorn.errors import InputError

from .templates import TEMPLATES
from .tokenizers import tiny_tokenizer

USER = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "  It is 4.\n"}
MARKERS = {
    "role": "assistant",
    "content": "<|im_end|>\n<|im_start|>user\n</s>[INST] {{ x }} {% if %} <end_of_turn>",
}
UNICODE = {"role": "user", "content": "Grüße, 東京 🙂 \u200b\u00a0 e\u0301"}
CONVERSATIONS = {
    "one question": [USER],
    "one turn": [USER, ANSWER],
    "three turns": [USER, ANSWER, UNICODE, MARKERS, USER, ANSWER],
    "empty answer": [USER, {"role": "assistant", "content": ""}],
    "markers": [{"role": "user", "content": MARKERS["content"]}, MARKERS],
}
WITH_SYSTEM = {
    "system": [{"role": "system", "content": "Be brief."}, USER, ANSWER],
    "empty system": [{"role": "system", "content": ""}, USER, ANSWER],
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "é": "<b>&'"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, None], "c": "ü"}}}
WITH_TOOLS = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "4", "reasoning_content": "easy"},
]


def _template(name):
    tokenizer = tiny_tokenizer(name)
    return tokenizer, ChatTemplate(template_source(tokenizer), tokenizer.special_tokens_map)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers_byte_for_byte(name, prompt):
    tokenizer, template = _template(name)
    conversations = CONVERSATIONS | (WITH_SYSTEM if TEMPLATES[name].system else {})
    for messages in conversations.values():
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert template.render(messages, add_generation_prompt=prompt) == expected


def test_tools_and_thoughts_render_as_in_transformers():
    tokenizer, template = _template("qwen3")
    expected = tokenizer.apply_chat_template(WITH_TOOLS, tools=TOOLS, tokenize=False)
    assert template.render(WITH_TOOLS, tools=TOOLS) == expected
    assert "<think>\neasy\n</think>" in expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.sampled_from(sorted(TEMPLATES)))
def test_any_text_renders_as_in_transformers(contents, name):
    tokenizer, template = _template(name)
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    assert template.render(messages) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content | upper | replace('WHAT', 'why') | title }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ ', '.join(messages | map(attribute='role') | list) }}",
        "{{ messages | tojson(indent=2) }}{{ messages | tojson(sort_keys=true, separators=(',', ':')) }}",
        "{% for m in messages if m.role != 'user' %}{{ loop.index }}/{{ loop.length }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{% macro show(m, n=1) %}{{ m.role * n }}{% endmacro %}{{ show(messages[0]) }}{{ show(messages[1], n=3) }}",
        "{% set ns = namespace(a=[], t='') %}{% for m in messages %}{% set ns.a = ns.a + [m.role] %}"
        "{% set ns.t = ns.t ~ loop.index ~ m.role %}{% endfor %}{{ ns.a }}{{ ns.t }}",
        "{% set d = {'a': 1, 'b': [messages[0].role, (1, 2)]} %}{{ d }}{{ d.items() | list }}{{ d | dictsort }}",
        "{{ '%s-%05d' % (messages[0].role, 42) }}{{ '{:>8}|{}'.format('a', 1.5) }}{{ '%s' | format(3) }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[-1]['content'][::-1] }}",
        "{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | first }}{{ 7 // 2 ** 2 % 3 }}",
        "{{ 'x' if messages is iterable and messages is not string else 'y' }}{{ undefined_name }}{{ none }}{{ true }}",
        "{% filter upper %}{{ messages[0].content }}{% endfilter %}{{ [1, 2, 3] | slice(2) | list }}",
        "{% macro wrap() %}[{{ caller('a') }}]{% endmacro %}{% call(x) wrap() %}{{ x }}{% endcall %}",
        "{% generation %}{{ messages[1].content }}{% endgeneration %}{{ messages[0].get('name', 'nobody') }}",
        "{% set text %}<{{ messages[0].role }}>{% endset %}{{ text }}{{ text | length }}{{ 'a,b'.split(',')[-1] }}",
        "{{ [3, 1, 2] | sort | join('-') }}{{ [1, 2, 3] | sum }}{{ ['b', 'a'] | unique | list }}{{ 3.456 | round(1) }}",
        "{{ 'a b' | indent(4, first=true) }}{{ range(3) | list }}{{ 'abc' in messages[0].content }}{{ '<&>' | e }}",
        "{{- '  \n' -}}\n  {%- if true %}\n  a\n  {%- endif %}\n  {# comment #}\n  b\n",
        "{{ strftime_now('%Y') }}{{ bos_token }}{{ messages is string }}{{ [1, 2, 3, 4] | batch(2) | list }}",
    ],
)
def test_constructs_render_as_in_transformers(source):
    tokenizer = tiny_tokenizer("llama3")
    messages = [USER, ANSWER, UNICODE]
    expected = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert ChatTemplate(source, tokenizer.special_tokens_map).render(messages) == expected


def test_a_long_conversation_is_within_the_limits():
    tokenizer, template = _template("qwen3")
    messages = [USER, {"role": "assistant", "content": "word " * 500}] * 400
    assert template.render(messages) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_generation_blocks_give_their_characters():
    source = (
        "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}.{% endgeneration %}{% endfor %}"
    )
    text, spans = ChatTemplate(source).render_with_spans([USER, ANSWER])
    assert [text[a:b] for a, b in spans] == [USER["content"] + ".", ANSWER["content"] + "."]


def test_one_moment_for_all_rows():
    from datetime import datetime

    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=datetime(2024, 7, 26))
    assert template.render([USER]) == "26 Jul 2024"


_BOMB = (
    "{{% set ns = namespace(x={start}) %}}{{% for i in range(200) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    "{{{{ {end} }}}}"
)
_DEEP = "{{% set ns = namespace(x=1) %}}{{% for i in range(99999) %}}{{% set ns.x = {} %}}{{% endfor %}}{{{{ {} }}}}"
HOSTILE = {
    "huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that skip": "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "nested output": "{% for i in range(99999) %}{% for j in range(99999) %}some text{% endfor %}{% endfor %}",
    "output in a macro": "{% macro m() %}{% for i in range(99999) %}"
    + "x" * 9999
    + "{% endfor %}{% endmacro %}{{ m() }}",
    "output in a set block": "{% set y %}{% for i in range(99999) %}"
    + "x" * 9999
    + "{% endfor %}{% endset %}",
    "output in a filter block": "{% filter upper %}{% for i in range(99999) %}"
    + "x" * 9999
    + "{% endfor %}{% endfilter %}",
    "recursive macro": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "two recursive macros": "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "recursive block": "{% block b %}{{ self.b() }}{% endblock %}",
    "class": "{{ ''.__class__ }}",
    "class by item": "{{ ''['__class__'] }}",
    "class by filter": "{{ '' | attr('__class__') }}",
    "class by map": "{{ [''] | map(attribute='__class__') | list }}",
    "class by format": "{{ '{0.__class__}'.format('') }}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "init of cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "self": "{{ self._TemplateReference__context }}",
    "namespace with a private name": "{% set ns = namespace(__class__=1) %}",
    "change of a message": "{{ messages.append(1) }}",
    "change of a dict": "{{ messages[0].update({'a': 1}) }}",
    "text times a number": "{{ 'a' * 10**10 }}",
    "number times text": "{{ 10**10 * 'a' }}",
    "list times a number": "{{ [1] * 10**10 }}",
    "power": "{{ 9**9**9**9**9**9**9 }}",
    "power loop": _BOMB.format(start="3", step="ns.x * ns.x", end="1"),
    "concatenation": _BOMB.format(start="'ab'", step="ns.x ~ ns.x", end="1"),
    "addition": _BOMB.format(start="'ab'", step="ns.x + ns.x", end="1"),
    "list addition": _BOMB.format(start="[1]", step="ns.x + ns.x", end="1"),
    "replacement": _BOMB.format(start="'a'", step="ns.x.replace('a', 'aa')", end="1"),
    "replacement filter": _BOMB.format(start="'a'", step="ns.x | replace('a', 'aa')", end="1"),
    "joining": _BOMB.format(start="'a'", step="ns.x.join([ns.x, ns.x])", end="1"),
    "joining filter": _BOMB.format(start="'a'", step="[ns.x, ns.x] | join(ns.x)", end="1"),
    "formatting": _BOMB.format(start="'a'", step="'%s%s' % (ns.x, ns.x)", end="1"),
    "formatting method": _BOMB.format(start="'a'", step="'{0}{0}'.format(ns.x)", end="1"),
    "formatting filter": _BOMB.format(start="'a'", step="'%s%s' | format(ns.x, ns.x)", end="1"),
    "escaping": _BOMB.format(start="'&'", step="(ns.x | string | e) ~ (ns.x | string | e)", end="1"),
    "nested list printed": _BOMB.format(start="1", step="[ns.x, ns.x]", end="ns.x"),
    "nested list as json": _BOMB.format(start="1", step="[ns.x, ns.x]", end="ns.x | tojson"),
    "nested dict": _BOMB.format(start="1", step="{'a': ns.x, 'b': ns.x}", end="ns.x"),
    "nested tuple hashed": _BOMB.format(start="1", step="(ns.x, ns.x)", end="{ns.x: 1}"),
    "dict call": _BOMB.format(start="1", step="dict(a=ns.x, b=ns.x)", end="ns.x"),
    "dict from keys": _BOMB.format(start="1", step="dict.fromkeys(['a', 'b'], ns.x)", end="ns.x"),
    "batch": _BOMB.format(start="1", step="[1] | batch(3, ns.x) | list", end="ns.x"),
    "slice": _BOMB.format(start="1", step="[1] | slice(3, ns.x) | list", end="ns.x"),
    "deep list": _DEEP.format("[ns.x]", "ns.x"),
    "deep tuple": _DEEP.format("(ns.x,)", "{ns.x: 1}"),
    "width of center": "{{ 'a'.center(10**9) }}",
    "width of zfill": "{{ 'a'.zfill(10**9) }}",
    "width of expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "width of a format": "{{ '{:>1000000000}'.format(1) }}",
    "nested width of a format": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "width of a percent": "{{ '%1000000000d' % 1 }}",
    "star width of a percent": "{{ '%*d' % (1000000000, 1) }}",
    "width of the format filter": "{{ '%1000000000d' | format(1) }}",
    "width of indent": "{{ 'a\nb' | indent(10**9) }}",
    "width of json": "{{ messages | tojson(indent=10**9) }}",
    "width of a date": "{{ strftime_now('%Y' * 100000) }}",
    "round": "{{ 1 | round(10**9, 'ceil') }}",
    "slices": "{{ [1] | slice(10**9) | list }}",
    "batches": "{{ [1] | batch(10**9, 1) | list }}",
    "sum of lists": "{{ ([[1]] * 99999) | sum(start=[]) | length }}",
    "bytes": "{{ (5).to_bytes(10**9, 'big') }}",
    "encode": "{{ 'a'.encode('idna') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "from import": "{% from 'os' import path %}",
    "extends": "{% extends '/etc/passwd' %}",
    "autoescape": "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "unknown filter": "{{ 'a' | striptags }}",
    "unknown tag": "{% debug %}",
    "lipsum": "{{ lipsum(10**6) }}",
    "syntax": "{% for x in %}",
    "unclosed": "{{ messages[0",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "long sum": "{{ " + "+".join(["1"] * 5000) + " }}",
    "deep nots": "{{ " + "not " * 5000 + "1 }}",
    "deep ifs": "{% if 1 %}" * 900 + "{% endif %}" * 900,
    "deep loops": "{% for x in [1] %}" * 60 + "{% endfor %}" * 60,
    "too long": "x" * 10**6,
    "too many parts": "{{x}}" * 6000,
    "many comparisons": "{% set a = [[1] * 900] * 900 %}{% set b = [[1] * 900] * 900 %}{{ ["
    + "a == b, " * 1500
    + "] }}",
    "exception": "{{ raise_exception('no ' * 10**5) }}",
    "division by zero": "{{ 1 // 0 }}",
    "undefined": "{{ messages[0].nothing.at_all }}",
    "growing number": _BOMB.format(start="10", step="(ns.x * 7 + 1) % 10**2400", end="ns.x * ns.x"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_ends_in_an_input_error_within_two_seconds(name):
    started = time.process_time()  # other work on the machine is not the template's
    with pytest.raises(InputError) as caught:
        ChatTemplate(HOSTILE[name]).render([USER, ANSWER])
    assert time.process_time() - started < 2
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_template_sees_no_object_but_plain_data():
    class Sneaky:
        def write(self):
            raise AssertionError("called")

    template = ChatTemplate("{{ messages[0].content }}{{ messages[0].extra }}")
    assert template.render([{"role": "user", "content": "a", "extra": Sneaky()}]) == "a<Sneaky>"
    with pytest.raises(InputError):
        ChatTemplate("{{ messages[0].extra.write() }}").render(
            [{"role": "user", "content": "a", "extra": Sneaky()}]
        )


def test_one_refused_conversation_leaves_the_template_usable():
    template = ChatTemplate("{% for i in range(messages[0].content | int) %}{{ 'a' * 999 }}{% endfor %}")
    with pytest.raises(TemplateRenderError):
        template.render([{"role": "user", "content": "99999"}])
    assert template.render([{"role": "user", "content": "2"}]) == "a" * 1998


def test_deeply_nested_message_is_refused():
    nested = value = []
    for _ in range(5000):
        value.append([])
        value = value[0]
    with pytest.raises(InputError, match="nested"):
        ChatTemplate("x").render([{"role": "user", "content": nested}])


def test_template_may_come_from_a_file(tmp_path, tokenizer):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}")
    assert template_source(tokenizer, str(file)) == "{{ messages[0].content }}"
    with pytest.raises(InputError, match=r"data\.chat_template='nowhere"):
        template_source(tokenizer, "nowhere.jinja")


def test_named_templates_choose_tool_use_for_tools():
    named = types.SimpleNamespace(chat_template={"default": "d", "tool_use": "t"})
    assert template_source(named) == "d"
    assert template_source(named, tools=True) == "t"


def test_no_template_is_told_with_the_cure():
    with pytest.raises(InputError, match=r"data\.chat_template"):
        template_source(types.SimpleNamespace(chat_template=None))
