"""What NF4 costs a fine-tuning: LoRA and QLoRA of SmolLM2-135M on the quickstart's data, the same steps and rows.

Held-out loss before and after, on a 16-bit base, on an NF4 one, on the same with an adapter that starts by mending what
quantisation lost (LoftQ), and on a recipe of `pronghorn sensitivity` if given. On a GPU the quickstart's hundred steps
each, on a CPU its sixty; `--steps` for fewer.

    python benchmarks/qlora_quality.py
    python benchmarks/qlora_quality.py --recipe benchmarks/results/sensitivity-smollm2-135m.recipe.json
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import jax

from pronghorn.converters.huggingface import (
    load_model,
    load_tokenizer,
    original_weights,
    resolve_model_path,
)
from pronghorn.data import DataConfig, load_rows, tokenize_rows
from pronghorn.data.docstrings import docstring_rows
from pronghorn.lora import LoRAConfig, add_lora
from pronghorn.quickstart import QuickstartConfig, find_model
from pronghorn.training import TrainConfig, Trainer

LIMIT = 0.03


def measure(
    folder: Path, data: tuple[Any, Any], how: str | None, init: str, config: QuickstartConfig
) -> dict[str, Any]:
    """Train once; the row of one base and start."""
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=config.dtype, layers=config.layers, quantization=how)  # type: ignore[arg-type]
    adapter = LoRAConfig(rank=config.rank, alpha=2 * config.rank, init=init, seed=config.seed)
    model = add_lora(model, adapter, original=original_weights(folder) if init == "loftq" else None)
    with tempfile.TemporaryDirectory() as out:
        train = TrainConfig(
            learning_rate=config.learning_rate,
            max_steps=config.steps,
            warmup_steps=min(5, config.steps - 1),
            batch_size=config.batch_size,
            save_every=None,
            log_every=50,
            seed=config.seed,
            output_dir=out,
        )
        settings = DataConfig(max_length=config.max_length, overlong="drop", seed=config.seed)
        trainer = Trainer(model, tokenizer, data[0], train, data=settings, eval_dataset=data[1])
        before = trainer.evaluate().loss
        started = time.perf_counter()
        result = trainer.train()
    row = {
        "base": Path(how).name if how else config.dtype,
        "init": init,
        "heldout_loss_before": before,
        "heldout_loss_after": result.evaluations[-1].loss,
        "tokens_per_second": result.tokens_per_second,
        "peak_device_gib": result.peak_device_bytes / 2**30,
        "seconds": time.perf_counter() - started,
    }
    print(
        f"{row['base']:<44} {init:<8} held-out loss {before:.4f} -> {row['heldout_loss_after']:.4f}, "
        f"{row['tokens_per_second']:,.0f} tokens/s, peak {row['peak_device_gib']:.2f} GiB",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_arguments(parser, "qlora-quality")
    parser.add_argument("--recipe", default=None)
    parser.add_argument("--layers", default="unrolled", choices=("unrolled", "scanned"))
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--heldout-rows", type=int, default=None)
    options = parser.parse_args()
    config = QuickstartConfig.for_this_machine()
    # One layout for all: a recipe's layers differ, and cannot be stacked.
    changes: dict[str, Any] = {"layers": options.layers}
    changes |= {"steps": options.steps} if options.steps else {}
    changes |= {"heldout_rows": options.heldout_rows} if options.heldout_rows else {}
    config = dataclasses.replace(config, **changes)
    folder = resolve_model_path(find_model())
    tokenizer = load_tokenizer(folder)
    vocab_size = load_model(folder).config.vocab_size
    settings = DataConfig(max_length=config.max_length, overlong="drop", seed=config.seed)
    parts = docstring_rows("train"), docstring_rows("heldout")[: config.heldout_rows]
    data = tuple(tokenize_rows(load_rows(rows), tokenizer, settings, vocab_size=vocab_size) for rows in parts)
    starts = [(None, "kaiming"), ("nf4", "kaiming"), ("nf4", "loftq")]
    starts += [(options.recipe, "kaiming")] if options.recipe else []
    rows: list[dict[str, Any]] = []
    for how, init in starts:
        row = measure(folder, data, how, init, config)  # type: ignore[arg-type]
        rows.append(row)
        row["over_16_bit"] = row["heldout_loss_after"] / rows[0]["heldout_loss_after"] - 1
        if row is not rows[0]:
            verdict = "within" if row["over_16_bit"] <= LIMIT else "NOT within"
            name = f"{row['base']}, {row['init']}"
            print(f"{name}: {row['over_16_bit']:+.2%} of 16-bit LoRA, {verdict} {LIMIT:.0%}")
        result = {"rows": rows, "config": dataclasses.asdict(config), **common.environment(options.commit)}
        common.write(options.out, result | {"backend": jax.default_backend()})


if __name__ == "__main__":
    main()
