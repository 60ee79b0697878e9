"""Merge an adapter into its base model in fp32, write the result, reload it and compare it with the live model.

pronghorn merge BASE ADAPTER OUT

Of an adapter that was trained on a quantised base (QLoRA) there are two merges: into that base dequantised, which is
the very model that was trained, and into the 16-bit model that it was made from. Either can be written quantised again.

pronghorn merge BASE ADAPTER OUT --quantization nf4
pronghorn merge BASE ADAPTER OUT --quantization nf4 --onto BASE
pronghorn merge BASE ADAPTER OUT --quantization nf4 --onto BASE --write nf4
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
    parser.add_argument(
        "--quantization",
        default=None,
        help="how BASE was quantised in training: nf4, fp4, int8, fp8 or a recipe; not for a folder that is quantised",
    )
    parser.add_argument(
        "--onto", default=None, help="merge into this 16-bit model, BASE itself or another folder"
    )
    parser.add_argument(
        "--write",
        default=None,
        help="write the result quantised, as bitsandbytes does: nf4, fp4, int8 or a recipe",
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    use_compile_cache()
    from pronghorn.jobs import merge_model

    check = merge_model(
        options.base,
        options.adapter,
        options.out,
        options.dtype,
        quantization=options.quantization,
        onto=options.onto,
        write=options.write,
    )
    base = {"own": "the base", "dequantised": "the quantised base, dequantised"}.get(
        check["base"], check["base"]
    )
    print(f"{options.out}: merged into {base}")
    mean, largest = (check.get(f"live_{name}", check[name]) for name in ("kl_mean", "kl_max"))
    print(f"in 16 bits: mean KL to the live model {mean:.3e}, largest {largest:.3e}")
    if "quantization" in check:
        mean, largest = check["quantized_kl_mean"], check["quantized_kl_max"]
        print(
            f"as written in {check['quantization']}: mean KL to the live model {mean:.3e}, largest {largest:.3e}"
        )
    write_json_if_asked(options, check)
    return 0
