"""Merge an adapter into its base model in fp32, write the result, reload it and compare it with the live model.

pronghorn merge BASE ADAPTER OUT
"""

import argparse
from pathlib import Path

from pronghorn.cli.common import add_json_argument, use_compile_cache, write_json_if_asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="Hugging Face folder, GGUF file or hub name of the base model")
    parser.add_argument("adapter", help="PEFT adapter folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--dtype",
        default=None,
        choices=("bfloat16", "float16", "float32"),
        help="dtype of the merged weights; the base's own if not given",
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    use_compile_cache()
    from pronghorn.jobs import merge_model

    check = merge_model(options.base, options.adapter, options.out, options.dtype)
    print(f"{options.out}: mean KL to the live model {check['kl_mean']:.3e}, largest {check['kl_max']:.3e}")
    write_json_if_asked(options, check)
    return 0
