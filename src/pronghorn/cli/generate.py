"""Text from a model, greedy unless a temperature is given.

pronghorn generate MODEL --prompt "Why is the sky blue?"
pronghorn generate MODEL --adapter runs/mine/adapter --prompt-file question.txt --temperature 0.7
"""

import argparse
import sys
import time
from pathlib import Path

from pronghorn.cli.common import add_json_argument, use_compile_cache, write_json_if_asked
from pronghorn.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder, GGUF file or hub name")
    parser.add_argument("--adapter", default=None, help="PEFT adapter folder")
    parser.add_argument(
        "--prompt", default=None, help="the user's message; read from standard input if not given"
    )
    parser.add_argument("--prompt-file", type=Path, default=None, help="read the message from this file")
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text as it is")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    prompt = _prompt(options)
    use_compile_cache()
    import pronghorn as ph

    model, tokenizer = ph.load(options.model, adapter=options.adapter, dtype=options.dtype)
    if tokenizer is None:
        raise InputError(f"{options.model}: has no tokenizer; put tokenizer.json into the folder.")
    start = time.perf_counter()
    messages = prompt if options.raw or not tokenizer.chat_template else [{"role": "user", "content": prompt}]
    text = ph.generate(
        model,
        tokenizer,
        messages,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    seconds = time.perf_counter() - start
    print(text)
    write_json_if_asked(options, {"prompt": prompt, "text": text, "seconds": seconds})
    return 0


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        return options.prompt
    if options.prompt_file is not None:
        try:
            return options.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--prompt-file {options.prompt_file}: cannot be read as UTF-8 text ({error})."
            ) from None
    if sys.stdin.isatty():
        raise InputError(
            "--prompt: missing; give --prompt TEXT, --prompt-file PATH, or text on standard input."
        )
    return sys.stdin.read()
