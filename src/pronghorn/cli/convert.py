"""Write a model as a Hugging Face folder: from a GGUF file, in another dtype, quantised, or in other shards.

Weights whose dtype does not change keep their exact bits.

pronghorn convert model.gguf OUT
pronghorn convert FOLDER OUT --dtype bfloat16 --max-shard-gib 4
pronghorn convert FOLDER OUT --quantization nf4        (as bitsandbytes and transformers write it)
"""

import argparse
from pathlib import Path

from pronghorn.cli.common import add_json_argument, write_json_if_asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder, GGUF file or hub name")
    parser.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--dtype", default=None, choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--quantization", default=None, help="nf4, fp4, int8, or a recipe of `pronghorn sensitivity`"
    )
    parser.add_argument(
        "--max-shard-gib", type=float, default=5.0, help="largest size of one safetensors file"
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    from pronghorn.jobs import convert_model

    numbers = convert_model(
        options.model,
        options.out,
        options.dtype,
        int(options.max_shard_gib * 2**30),
        quantization=options.quantization,
    )
    print(f"{options.out}: {numbers['parameters']:,} parameters in {numbers['dtype']}")
    write_json_if_asked(options, numbers)
    return 0
