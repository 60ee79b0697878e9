"""What each optimizer costs and where it ends: full fine-tuning of SmolLM2-135M on the quickstart's data.

Three tables: the 8-bit update kernels against a copy on the device; the update of the whole model alone; and training
runs from the same start with the same batches, held-out loss at the end. The last row of the third repeats AdamW with
deterministic kernels, to show what they cost.

    python benchmarks/optimizers.py                      # on a GPU, about 90 s
    python benchmarks/optimizers.py --only kernels       # or: updates, training
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

import pronghorn as ph
from pronghorn.data import DataConfig, load_rows, tokenize_rows
from pronghorn.data.docstrings import docstring_rows
from pronghorn.pallas_kernels import blockwise_8bit
from pronghorn.pallas_kernels.adam_8bit import adam_8bit, zero_moment
from pronghorn.pallas_kernels.lion_8bit import lion_8bit
from pronghorn.training.checkpoints import state_bytes
from pronghorn.training.config import TrainConfig
from pronghorn.training.optimizers import init_optimizer, make_optimizer

# AdamW's learning rate is Muon's too; Lion's is a third, and its second beta 0.99, as its paper advises.
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"learning_rate": 5e-5},
    "adamw_8bit": {"learning_rate": 5e-5},
    "lion": {"learning_rate": 1.5e-5, "beta2": 0.99},
    "lion_8bit": {"learning_rate": 1.5e-5, "beta2": 0.99},
    "muon": {"learning_rate": 5e-5},
}
LAUNCHES = ((16, 8), (16, 16), (16, 4), (8, 8), (8, 4), (4, 4), (32, 16))


def chained_milliseconds(step: Any, carry: Any, *, repeats: int = 20, samples: int = 5) -> float:
    """Median time of one call of `carry = step(carry)`, whose arguments are donated."""
    found = []
    for _ in range(2):
        carry = step(carry)
    for _ in range(samples):
        jax.block_until_ready(carry)
        start = time.perf_counter()
        for _ in range(repeats):
            carry = step(carry)
        jax.block_until_ready(carry)
        found.append((time.perf_counter() - start) / repeats * 1e3)
    return float(np.median(found))


def measure_kernels(elements: int, launches: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    """TB/s of the update kernels, bytes read and written, and as a share of a copy's."""
    copy = jax.jit(lambda x: -x)
    source = jnp.ones(elements, jnp.float32)
    copied = 8 * elements / common.milliseconds(copy, source, repeats=20) * 1e-9
    print(f"copy of {elements * 4 / 2**20:,.0f} MiB: {copied:.2f} TB/s")
    rows: list[dict[str, Any]] = []

    def adam(carry: Any) -> Any:
        return adam_8bit(*carry, jnp.int32(7), beta1=0.9, beta2=0.999, eps=1e-8, implementation="pallas")

    def lion(carry: Any) -> Any:
        return lion_8bit(*carry, beta1=0.9, beta2=0.99, implementation="pallas")

    signed, unsigned = (
        (lambda: zero_moment((elements,), signed=True)),
        (lambda: zero_moment((elements,), signed=False)),
    )
    cases = {"adam_8bit": (adam, (signed, unsigned)), "lion_8bit": (lion, (signed,))}
    default = (blockwise_8bit.BLOCKS_PER_PROGRAM, blockwise_8bit.WARPS)
    for blocks, warps in launches:
        blockwise_8bit.BLOCKS_PER_PROGRAM, blockwise_8bit.WARPS = blocks, warps
        for name, (step, moments) in cases.items():
            gradient = jax.random.normal(jax.random.key(0), (elements,)) * 1e-3
            carry = (gradient, *(moment() for moment in moments))
            # A new function object: an old trace would hold the launch parameters of before.
            milliseconds = chained_milliseconds(jax.jit(lambda c, s=step: s(c), donate_argnums=0), carry)
            moved = (8 + len(moments) * (2 + 8 / 256)) * elements
            row = {
                "kernel": name,
                "elements": elements,
                "blocks_per_program": blocks,
                "warps": warps,
                "milliseconds": milliseconds,
                "terabytes_per_second": moved / milliseconds * 1e-9,
                "share_of_copy": moved / milliseconds * 1e-9 / copied,
            }
            rows.append(row)
            print(
                f"{name:10} blocks {blocks:2} warps {warps:2}  {milliseconds:6.3f} ms  "
                f"{row['terabytes_per_second']:.2f} TB/s  {row['share_of_copy']:.0%} of a copy",
                flush=True,
            )
    blockwise_8bit.BLOCKS_PER_PROGRAM, blockwise_8bit.WARPS = default
    return rows


def measure_updates(trainable: Any, optimizers: list[str]) -> list[dict[str, Any]]:
    """Milliseconds of one update of the whole model, and bytes of its state."""
    rows = []
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    for name in optimizers:
        optimizer = make_optimizer(TrainConfig(optimizer=name, **SETTINGS[name]), 100)

        def step(carry: Any, optimizer: Any = optimizer) -> Any:
            weights, state, gradient = carry
            updates, state = optimizer.update(gradient, state, weights)
            return jax.tree.map(jnp.add, weights, updates), state, gradient

        weights = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
        gradient = jax.tree.map(lambda x: 1e-3 * jnp.sin(1e4 * x), weights)
        state = init_optimizer(optimizer, trainable)
        held = state_bytes(state)
        milliseconds = chained_milliseconds(
            jax.jit(step, donate_argnums=0), (weights, state, gradient), repeats=10, samples=3
        )
        rows.append(
            {
                "optimizer": name,
                "update_milliseconds": milliseconds,
                "state_bytes": held,
                "state_bytes_per_parameter": held / parameters,
            }
        )
        print(
            f"{name:10}  update {milliseconds:6.2f} ms  state {held / 2**20:7.1f} MiB, "
            f"{held / parameters:.3f} bytes a parameter",
            flush=True,
        )
    return rows


def measure_training(
    folder: str, data: tuple[Any, Any, DataConfig], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Held-out loss after the same batches, from the same start."""
    train, held_out, data_config = data
    rows: list[dict[str, Any]] = []
    runs = [(name, False) for name in options.optimizers] + [("adamw", True)] * (not options.no_deterministic)
    for name, deterministic in runs:
        model, tokenizer = ph.load(folder, dtype=options.dtype)
        with tempfile.TemporaryDirectory() as output:
            config = TrainConfig(
                optimizer=name,
                max_steps=options.steps,
                warmup_steps=min(10, options.steps - 1),
                batch_size=options.batch,
                save_every=None,
                log_every=1000,
                deterministic=deterministic,
                output_dir=output,
                **SETTINGS[name],
            )
            trainer = ph.Trainer(model, tokenizer, train, config, data=data_config, eval_dataset=held_out)
            before = rows[0]["heldout_loss_before"] if rows else trainer.evaluate().loss
            result = trainer.train()
        reference = rows[0]["heldout_loss"] if rows else result.evaluations[-1].loss
        row = {
            "optimizer": name,
            "deterministic": deterministic,
            "settings": SETTINGS[name],
            "steps": result.steps,
            "heldout_loss_before": before,
            "heldout_loss": result.evaluations[-1].loss,
            "relative_to_first": result.evaluations[-1].loss / reference - 1,
            "train_loss_last_ten": float(np.mean(result.losses[-10:])),
            "losses": result.losses,
            "tokens_per_second": result.tokens_per_second,
            "peak_device_bytes_planned": result.planned_device_bytes,
            "compile_seconds": result.compile_seconds,
            "skipped": result.skipped,
        }
        rows.append(row)
        print(
            f"{name:10}{' deterministic' if deterministic else ''}  held-out {before:.4f} -> {row['heldout_loss']:.4f} "
            f"({row['relative_to_first']:+.2%})  training {row['train_loss_last_ten']:.4f}  "
            f"{row['tokens_per_second']:,.0f} tokens/s  plan {row['peak_device_bytes_planned'] / 2**30:.2f} GiB  "
            f"compiled in {row['compile_seconds']:.0f} s",
            flush=True,
        )
    return rows


def quickstart_data(folder: str, length: int) -> tuple[Any, Any, DataConfig]:
    """Tokenised training and held-out functions of the quickstart."""
    from pronghorn.converters.huggingface import load_tokenizer

    tokenizer = load_tokenizer(folder)
    config = DataConfig(max_length=length, overlong="drop")
    rows = [docstring_rows("train"), docstring_rows("heldout")[:200]]
    train, held_out = (tokenize_rows(load_rows(part), tokenizer, config) for part in rows)
    return train, held_out, config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_arguments(parser, "optimizers")
    parser.add_argument("--only", choices=("kernels", "updates", "training"), default=None)
    parser.add_argument("--model", default=None, help="GGUF file or folder; the quickstart's by default")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "adamw_8bit", "lion_8bit", "muon"])
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-deterministic", action="store_true")
    parser.add_argument(
        "--all-launches", action="store_true", help="every launch parameter, not only the default"
    )
    options = parser.parse_args()
    default = ((blockwise_8bit.BLOCKS_PER_PROGRAM, blockwise_8bit.WARPS),)
    found: dict[str, Any] = {}
    if options.only in (None, "kernels"):
        found["kernels"] = measure_kernels(options.elements, LAUNCHES if options.all_launches else default)
    if options.only != "kernels":
        from pronghorn.converters.gguf import convert_gguf
        from pronghorn.quickstart import find_model

        with tempfile.TemporaryDirectory() as place:
            source = options.model or str(find_model())
            folder = source
            if source.endswith(".gguf"):
                folder = str(convert_gguf(source, Path(place) / "base"))
            if options.only in (None, "updates"):
                trainable = ph.split(ph.load(folder, dtype=options.dtype)[0])[1]
                found["updates"] = measure_updates(trainable, options.optimizers)
                del trainable
            if options.only in (None, "training"):
                data = quickstart_data(folder, options.length)
                found["training"] = measure_training(folder, data, options)
    common.write(options.out, found | common.environment(options.commit))


if __name__ == "__main__":
    main()
