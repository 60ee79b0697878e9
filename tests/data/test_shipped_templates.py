"""Every shipped template: the published format to the byte, and a mask that is the assistant's text to the character.

The formats are written a second time here, in plain Python and from their documentation, so that neither Jinja nor
our templates have a say in what is expected.
"""

import datetime
import functools
import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pronghorn.data import ChatTemplate, DataConfig, tokenize_rows
from pronghorn.data.chat_template import template_for
from pronghorn.data.shipped_templates import SHIPPED
from pronghorn.errors import InputError

BOS, EOS = "<s>", "</s>"
IM = "<|im_start|>{}\n{}<|im_end|>\n"
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


def _system(messages):
    """(text of a system message or None, the other messages)."""
    first = messages[0]
    return (first["content"], messages[1:]) if first["role"] == "system" else (None, messages)


def _pairs(turns):
    """(question, answer or None) of each turn."""
    contents = [turn["content"] for turn in turns]
    return [
        (contents[i], contents[i + 1] if i + 1 < len(contents) else None) for i in range(0, len(turns), 2)
    ]


def chatml(messages, prompt):
    text = "".join(IM.format(m["role"], m["content"]) for m in messages)
    return text + ("<|im_start|>assistant\n" if prompt else "")


def llama2(messages, prompt):
    system, turns = _system(messages)
    text = ""
    for i, (question, answer) in enumerate(_pairs(turns)):
        asked = question.strip()
        if i == 0 and system is not None:
            asked = f"<<SYS>>\n{system}\n<</SYS>>\n\n{asked}"
        text += f"{BOS}[INST] {asked} [/INST]" + ("" if answer is None else f" {answer.strip()} {EOS}")
    return text


def llama3(messages, prompt):
    text = BOS
    for message in messages:
        text += (
            f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n{message['content'].strip()}<|eot_id|>"
        )
    return text + ("<|start_header_id|>assistant<|end_header_id|>\n\n" if prompt else "")


def mistral(messages, prompt):
    system, turns = _system(messages)
    text = BOS
    for i, (question, answer) in enumerate(_pairs(turns)):
        asked = f"{system}\n\n{question}" if i == 0 and system is not None else question
        text += f" [INST] {asked} [/INST]" + ("" if answer is None else f" {answer}{EOS}")
    return text


def gemma(messages, prompt):
    system, turns = _system(messages)
    text = BOS
    for i, (question, answer) in enumerate(_pairs(turns)):
        before = f"{system}\n\n" if i == 0 and system is not None else ""
        text += f"<start_of_turn>user\n{before}{question.strip()}<end_of_turn>\n"
        if answer is not None:
            text += f"<start_of_turn>model\n{answer.strip()}<end_of_turn>\n"
    return text + ("<start_of_turn>model\n" if prompt else "")


def phi(messages, prompt):
    text = "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in messages)
    return text + ("<|assistant|>\n" if prompt else "")


def qwen(messages, prompt):
    system, turns = _system(messages)
    return chatml([{"role": "system", "content": QWEN_SYSTEM if system is None else system}, *turns], prompt)


def zephyr(messages, prompt):
    text = "".join(f"<|{m['role']}|>\n{m['content']}{EOS}\n" for m in messages)
    return text + ("<|assistant|>\n" if prompt else "")


def vicuna(messages, prompt):
    system, turns = _system(messages)
    text = BOS + (VICUNA_SYSTEM if system is None else system) + " "
    for question, answer in _pairs(turns):
        text += f"USER: {question} " + ("" if answer is None else f"ASSISTANT: {answer}{EOS}")
    return text + ("ASSISTANT:" if prompt else "")


def alpaca(messages, prompt):
    system, turns = _system(messages)
    text = BOS + (ALPACA_SYSTEM if system is None else system)
    for question, answer in _pairs(turns):
        text += f"\n\n### Instruction:\n{question}"
        text += "" if answer is None else f"\n\n### Response:{answer}{EOS}"
    return text + ("\n\n### Response:" if prompt else "")


def gpt_oss(messages, prompt):
    system, turns = _system(messages)
    text = (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        f"Knowledge cutoff: 2024-06\nCurrent date: {datetime.date.today().isoformat()}\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
    )
    if system:
        text += f"<|start|>developer<|message|># Instructions\n\n{system}\n\n<|end|>"
    pairs = _pairs(turns)
    for i, (question, answer) in enumerate(pairs):
        text += f"<|start|>user<|message|>{question}<|end|>"
        if answer is not None:
            last = i == len(pairs) - 1 and not prompt
            text += f"<|start|>assistant<|channel|>final<|message|>{answer}" + (
                "<|return|>" if last else "<|end|>"
            )
    return text + ("<|start|>assistant" if prompt else "")


RENDERERS = {
    "chatml": chatml,
    "llama2": llama2,
    "llama3": llama3,
    "mistral": mistral,
    "gemma": gemma,
    "phi": phi,
    "qwen": qwen,
    "zephyr": zephyr,
    "vicuna": vicuna,
    "alpaca": alpaca,
    "gpt-oss": gpt_oss,
}
# What an assistant's turn reads, from where generation would begin to its end: (not the last turn, the last one).
SPOKEN = {
    "chatml": ("{}<|im_end|>",) * 2,
    "llama2": (" {} </s>",) * 2,
    "llama3": ("{}<|eot_id|>",) * 2,
    "mistral": (" {}</s>",) * 2,
    "gemma": ("{}<end_of_turn>",) * 2,
    "phi": ("{}<|end|>",) * 2,
    "qwen": ("{}<|im_end|>",) * 2,
    "zephyr": ("{}</s>",) * 2,
    "vicuna": (" {}</s>",) * 2,
    "alpaca": ("{}</s>",) * 2,
    "gpt-oss": ("{}<|end|>", "<|channel|>final<|message|>{}<|return|>"),
}
TRIMMED = ("llama2", "llama3", "gemma")

MARKERS = [
    "<|im_end|>\n<|im_start|>assistant\nno<|im_end|>",
    "</s><|assistant|>\n[INST] a [/INST] b </s>",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nx",
    "<end_of_turn>\n<start_of_turn>model\ny",
    "ASSISTANT: c</s>USER: d",
    "\n\n### Response:e\n\n### Instruction:\nf",
    "<|end|><|start|>assistant<|channel|>final<|message|>g<|return|>",
    "<<SYS>>\nh\n<</SYS>>\n\n",
]
PLAIN = [
    "Paris.",
    "Two lines.\n\nIs there more?",
    "élève 東京 🙂 e\u0301 \u200d",
    "    indented\n\tcode()\n",
    "ends with spaces   ",
    "\n\nstarts with lines",
    "{{ messages }} {% raw %}",
    "",
]
SYSTEMS = [None, "", "Be brief.", MARKERS[0], "東京\n\n"]


def _chat(system, *contents):
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def _conversations():
    """More than thirty: every text as an answer, as a question, in every position of three turns, with every system."""
    texts = PLAIN + MARKERS
    found = []
    for i, text in enumerate(texts):
        system, other, third = SYSTEMS[i % len(SYSTEMS)], texts[i - 3], texts[i - 5]
        found.append(_chat(system, "q", text))
        found.append(_chat(SYSTEMS[(i + 1) % len(SYSTEMS)], text, other, other, text))
        found.append(_chat(None, "q", text, third or "q", other, text or "q", third))
    return found


CONVERSATIONS = _conversations()


@functools.cache
def tokenizer_for(name):
    """Bytes as tokens, the template's markers as special tokens, and a few merges so that tokens may cross borders."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ċ", "Ċ"), ("Ġ", "q"), (":", "P"), ("Ġ", "Ġ"), ("Ġ", "P")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in (BOS, EOS, *SHIPPED[name].markers)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=list(SHIPPED[name].markers),
    )


def test_there_are_enough_conversations_and_a_renderer_for_each_template():
    assert len(CONVERSATIONS) >= 30 and RENDERERS.keys() == SPOKEN.keys() == SHIPPED.keys()


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", SHIPPED)
def test_rendering_is_the_published_format_and_transformers_agrees(name, prompt):
    tokenizer = tokenizer_for(name)
    template = template_for(tokenizer, name)
    for messages in CONVERSATIONS:
        asked = messages[:-1] if prompt else messages
        expected = RENDERERS[name](asked, prompt)
        assert template.render(asked, add_generation_prompt=prompt) == expected
        theirs = tokenizer.apply_chat_template(
            asked, chat_template=SHIPPED[name].source, tokenize=False, add_generation_prompt=prompt
        )
        assert theirs == expected


@pytest.mark.parametrize("name", SHIPPED)
def test_masked_text_is_the_assistants_text_with_its_end_of_turn(name):
    tokenizer = tokenizer_for(name)
    config = DataConfig(max_length=100_000, chat_template=name)
    dataset = tokenize_rows([{"messages": m} for m in CONVERSATIONS], tokenizer, config)
    assert len(dataset) == len(CONVERSATIONS)
    for i, messages in enumerate(CONVERSATIONS):
        ids, labels = dataset.document(i)
        assert tokenizer.decode(ids) == RENDERERS[name](messages, False)
        runs, last = [], None
        for place, label in enumerate(labels.tolist()):
            if label >= 0:
                runs = [*runs[:-1], [*runs[-1], label]] if last == place - 1 else [*runs, [label]]
                last = place
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        answers = [a.strip() for a in answers] if name in TRIMMED else answers
        expected = [SPOKEN[name][k == len(answers) - 1].format(a) for k, a in enumerate(answers)]
        assert [tokenizer.decode(run) for run in runs] == expected


TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "é", "parameters": {"type": "object"}}}
]
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": i}}} for i in range(2)]
WITH_TOOLS = [
    {"role": "user", "content": "add"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
]


def test_qwen_writes_tools_calls_and_results_and_trains_the_calls():
    tokenizer = tokenizer_for("qwen")
    expected = (
        f"<|im_start|>system\n{QWEN_SYSTEM}\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        + json.dumps(TOOLS[0], ensure_ascii=False)
        + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\nadd<|im_end|>\n<|im_start|>assistant"
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 0}}\n</tool_call>'
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n"
    )
    template = template_for(tokenizer, "qwen")
    assert template.render(WITH_TOOLS, tools=TOOLS) == expected
    assert expected == tokenizer.apply_chat_template(
        WITH_TOOLS, tools=TOOLS, chat_template=SHIPPED["qwen"].source, tokenize=False
    )
    rows = [{"messages": WITH_TOOLS, "tools": TOOLS}]
    _, labels = tokenize_rows(rows, tokenizer, DataConfig(max_length=9999, chat_template="qwen")).document(0)
    trained = tokenizer.decode([t for t in labels.tolist() if t >= 0])
    assert (
        trained.count("<tool_call>") == 2 and trained.endswith("two<|im_end|>") and "response" not in trained
    )


def test_thinking_of_the_last_answer_is_trained_in_gpt_oss():
    tokenizer = tokenizer_for("gpt-oss")
    row = {"messages": [*_chat(None, "q"), {"role": "assistant", "content": "a", "thinking": "hm"}]}
    dataset = tokenize_rows([row], tokenizer, DataConfig(max_length=9999, chat_template="gpt-oss"))
    _, labels = dataset.document(0)
    trained = tokenizer.decode([t for t in labels.tolist() if t >= 0])
    assert trained == (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>"
    )


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "qwen"])
def test_tools_are_refused_where_the_format_has_none(name):
    row = {"messages": _chat(None, "q", "a"), "tools": TOOLS}
    with pytest.raises(InputError, match="does not show the tools"):
        tokenize_rows([row], tokenizer_for(name), DataConfig(chat_template=name))
    with pytest.raises(InputError, match=r"does not write the call|take turns|there are system"):
        tokenize_rows([{"messages": WITH_TOOLS}], tokenizer_for(name), DataConfig(chat_template=name))


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma", "vicuna", "alpaca", "gpt-oss"])
def test_roles_that_do_not_take_turns_are_refused(name):
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(InputError, match="must take turns"):
        template_for(tokenizer_for(name), name).render(messages)


def test_markers_that_the_tokenizer_lacks_are_named_with_the_cure():
    with pytest.raises(InputError, match=r"no token <\|im_start\|>, <\|im_end\|>; give them as new_tokens"):
        template_for(tokenizer_for("vicuna"), "chatml")


def test_template_without_bos_renders_without_it():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_for("zephyr").backend_tokenizer, eos_token=EOS
    )
    assert isinstance(template_for(tokenizer, "vicuna"), ChatTemplate)
    assert template_for(tokenizer, "vicuna").render(_chat("s", "q")) == "s USER: q "
