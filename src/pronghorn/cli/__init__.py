"""The `pronghorn` command: one file a command, each only reads arguments and calls the library.

Exit codes: 0 done, 1 failed, 2 bad input (one sentence on standard error, no traceback).
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "quickstart": "fine-tune SmolLM2-135M on this machine, export it, check it, write a report",
    "train": "fine-tune by a YAML job file and key=value arguments",
    "plan": "memory, FLOPs and batches of a job, from the compiled step, before anything is loaded",
    "preview": "rendered rows with their loss mask, and how well they pack",
    "merge": "merge an adapter into its base model, reload the result and prove it",
    "merge-adapters": "one adapter out of several, by weights",
    "report": "one HTML file about a run: curves, unusual steps, settings",
    "convert": "a model into a Hugging Face folder (from GGUF, another dtype, other shards)",
    "sensitivity": "which layers stay in 8 or 16 bits beside 4-bit ones: measured KL within a memory budget",
    "generate": "text from a model, with an adapter if given",
    "verify": "compare a model with transformers (and PEFT) in fp32, layer by layer",
    "tune": "measure the kernels' block sizes on this GPU and keep the fastest",
    "doctor": "what this machine has, and whether the kernels are right on it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    from pronghorn.errors import PronghornError

    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="pronghorn",
        description="Fast, exact fine-tuning of language models in JAX.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:<14} {text}" for name, text in COMMANDS.items()),
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", nargs="?", choices=tuple(COMMANDS), metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="pronghorn COMMAND --help tells")
    options = parser.parse_args(arguments)
    if options.version:
        from importlib.metadata import version

        print(f"pronghorn {version('pronghorn')}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    command = importlib.import_module(f"pronghorn.cli.{options.command.replace('-', '_')}")
    command_parser = argparse.ArgumentParser(
        prog=f"pronghorn {options.command}", description=command.__doc__, formatter_class=_Formatter
    )
    command.add_arguments(command_parser)
    # Intermixed, so that `train job.yaml --json out.json train.max_steps=60` reads as it looks.
    parsed = command_parser.parse_intermixed_args(options.arguments)
    try:
        return int(command.run(parsed) or 0)
    except PronghornError as error:
        print(f"pronghorn {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            f"pronghorn {options.command}: interrupted; nothing half written is left behind.", file=sys.stderr
        )
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away (`pronghorn preview ... | head`): not a failure, and nothing to print to.
        sys.stderr.close()
        return 0
    except Exception as error:
        if not _out_of_memory(error):
            raise
        print(
            f"pronghorn {options.command}: the device's memory is full; `pronghorn plan` tells what a job needs, and "
            "a smaller train.batch_size or data.max_length, or train.memory_policy=offload, needs less.",
            file=sys.stderr,
        )
        return 1


def _out_of_memory(error: Exception) -> bool:
    """Whether XLA found no room. By name, since the class comes with jax, which `--help` does not load."""
    return type(error).__name__ == "JaxRuntimeError" and str(error).startswith("RESOURCE_EXHAUSTED")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the module docstring's line breaks and show defaults."""
