"""Compare a model with transformers in fp32: each layer's output, logits, KL, and every parameter's gradient.

Exits 1 when it departs, naming the first layer that does. With --adapter the adapter is compared with PEFT.

pronghorn verify FOLDER --json verify.json
"""

import argparse
import dataclasses

from pronghorn.cli.common import add_json_argument, use_compile_cache, write_json_if_asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder or cached hub name")
    parser.add_argument("--adapter", default=None, help="PEFT adapter folder to compare as well")
    parser.add_argument(
        "--tokens", type=int, default=500, help="length of the prompt; short ones hide rope faults"
    )
    parser.add_argument("--no-gradients", action="store_true", help="logits only (half the memory and time)")
    parser.add_argument("--seed", type=int, default=0)
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    use_compile_cache()
    from pronghorn.verification import verify_model

    report = verify_model(
        options.model,
        adapter=options.adapter,
        tokens=options.tokens,
        gradients=not options.no_gradients,
        seed=options.seed,
    )
    print(report)
    write_json_if_asked(options, dataclasses.asdict(report))
    return 0 if report.passed else 1
