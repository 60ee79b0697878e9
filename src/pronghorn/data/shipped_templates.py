"""Chat templates for base models, which have none of their own: `data.chat_template: chatml` and so on.

Each writes the published format of the model it is named after to the byte, markers, spaces and line breaks. Where a
format says nothing (a second turn of Alpaca) the comment says what is done. A conversation that a format has no place
for is refused by the template, never bent: roles that do not alternate, tools, a system message.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ShippedTemplate:
    """A template and what it needs.

    Attributes:
      source: Jinja text.
      markers: special tokens it writes beside the tokenizer's own bos and eos.
      end: the one of them that ends a turn, and so becomes the eos token of what is saved; None where eos does.
    """

    source: str
    markers: tuple[str, ...] = ()
    end: str | None = None


# What the formats share. A system message first, and then user and assistant in turn.
_SYSTEM_FIRST = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
"""
_ALTERNATE = """\
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ('user', 'assistant') %}
        {{- raise_exception('user and assistant must take turns, after at most one system message') }}
    {%- endif %}
"""

# OpenAI's Chat Markup Language: https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Touvron et al. 2023, and llama's generation.py: spaces inside of [INST], the system message in the first one.
_LLAMA2 = (
    _SYSTEM_FIRST
    + "{%- for message in turns %}\n"
    + _ALTERNATE
    + """\
    {%- set content = message['content'].strip() %}
    {%- if loop.first and system is defined %}
        {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + content + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
)

# Llama 3's model card: headers, two line breaks, content without white space around it.
_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

# Mistral 7B Instruct v0.1 and v0.2, as their tokenizer writes it; the system message in the first [INST].
_MISTRAL = (
    _SYSTEM_FIRST
    + "{{- bos_token }}\n{%- for message in turns %}\n"
    + _ALTERNATE
    + """\
    {%- if message['role'] == 'user' and loop.first and system is defined %}
        {{- ' [INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'user' %}
        {{- ' [INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
)

# Gemma 2 and 3: the assistant is called model, the system message stands in front of the first user's.
_GEMMA = (
    _SYSTEM_FIRST
    + "{{- bos_token }}\n{%- for message in turns %}\n"
    + _ALTERNATE
    + """\
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}
    {%- if loop.first and system is defined %}{{- system + '\\n\\n' }}{%- endif %}
    {{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""
)

# Phi-3's and 3.5's model cards.
_PHI = """\
{%- for message in messages %}
    {%- if message['role'] not in ('system', 'user', 'assistant') %}
        {{- raise_exception('there are system, user and assistant, and no ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
"""

# Qwen2.5: ChatML with a system message of its own, and tools as in Hermes (https://qwen.readthedocs.io).
_QWEN = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in turns %}
    {%- if message['role'] == 'tool' %}
        {%- if loop.first or turns[loop.index0 - 1]['role'] != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
        {%- if loop.last or turns[loop.index0 + 1]['role'] != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif message['tool_calls'] %}
        {{- '<|im_start|>' + message['role'] }}
        {%- if message['content'] %}{{- '\\n' + message['content'] }}{%- endif %}
        {%- for call in message['tool_calls'] %}
            {%- set function = call['function'] or call %}
            {%- set arguments = function['arguments'] %}
            {%- set arguments = arguments if arguments is string else arguments | tojson %}
            {{- '\\n<tool_call>\\n{"name": "' + function['name'] + '", ' }}
            {{- '"arguments": ' + arguments + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Zephyr 7B's model card: every turn ends with the eos token.
_ZEPHYR = """\
{%- for message in messages %}
    {%- if message['role'] not in ('system', 'user', 'assistant') %}
        {{- raise_exception('there are system, user and assistant, and no ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
"""

# Vicuna 1.1 as FastChat writes it: https://github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md
_VICUNA = (
    _SYSTEM_FIRST
    + """\
{%- if system is not defined %}
    {%- set system = "A chat between a curious user and an artificial intelligence assistant. "
        + "The assistant gives helpful, detailed, and polite answers to the user's questions." %}
{%- endif %}
{{- bos_token + system + ' ' }}
{%- for message in turns %}
"""
    + _ALTERNATE
    + """\
    {%- if message['role'] == 'user' %}
        {{- 'USER: ' + message['content'] + ' ' }}
    {%- else %}
        {{- 'ASSISTANT: ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}
"""
)

# Stanford Alpaca's prompt without input, the answer right behind the colon as in its train.py. The set has one turn a
# row; further ones follow after an empty line. A system message takes the place of the first paragraph.
_ALPACA = (
    _SYSTEM_FIRST
    + """\
{%- if system is not defined %}
    {%- set system = 'Below is an instruction that describes a task. '
        + 'Write a response that appropriately completes the request.' %}
{%- endif %}
{{- bos_token + system }}
{%- for message in turns %}
"""
    + _ALTERNATE
    + """\
    {%- if message['role'] == 'user' %}
        {{- '\\n\\n### Instruction:\\n' + message['content'] }}
    {%- else %}
        {{- '\\n\\n### Response:' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\\n\\n### Response:' }}{%- endif %}
"""
)

# OpenAI's harmony, as gpt-oss's own template writes it: the last answer ends with <|return|>, others with <|end|>, and
# thinking is shown for the last answer only. https://cookbook.openai.com/articles/openai-harmony
_GPT_OSS = (
    """\
{%- if messages[0]['role'] in ('system', 'developer') %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\n' }}
{{- 'Knowledge cutoff: 2024-06\\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\\n\\nReasoning: ' }}
{{- (reasoning_effort or 'medium') + '\\n\\n# Valid channels: analysis, commentary, final. ' }}
{{- 'Channel must be included for every message.<|end|>' }}
{%- if system is defined and system %}
    {{- '<|start|>developer<|message|># Instructions\\n\\n' + system + '\\n\\n<|end|>' }}
{%- endif %}
{%- for message in turns %}
"""
    + _ALTERNATE
    + """\
    {%- if message['role'] == 'user' %}
        {{- '<|start|>user<|message|>' + message['content'] + '<|end|>' }}
    {%- else %}
        {%- if loop.last and message['thinking'] %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message['thinking'] + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message['content'] }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""
)

_IM = ("<|im_start|>", "<|im_end|>")

SHIPPED: Mapping[str, ShippedTemplate] = {
    "chatml": ShippedTemplate(_CHATML, _IM, "<|im_end|>"),
    "llama2": ShippedTemplate(_LLAMA2),
    "llama3": ShippedTemplate(
        _LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "mistral": ShippedTemplate(_MISTRAL),
    "gemma": ShippedTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "phi": ShippedTemplate(_PHI, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "qwen": ShippedTemplate(_QWEN, _IM, "<|im_end|>"),
    "zephyr": ShippedTemplate(_ZEPHYR),
    "vicuna": ShippedTemplate(_VICUNA),
    "alpaca": ShippedTemplate(_ALPACA),
    "gpt-oss": ShippedTemplate(
        _GPT_OSS, ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"), "<|return|>"
    ),
}
