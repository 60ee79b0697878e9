"""Do losses and gradient norms in bf16 agree with transformers + PEFT, as well as bf16 agrees with itself?

LoRA r=16 of SmolLM2-135M on the quickstart's rows: 200 steps from one base, one adapter and one order of batches. Four
runs: pronghorn with its kernels, pronghorn through XLA, transformers + PEFT with torch's fused attention, and with
eager attention. Two runs of the same framework differ in rounding alone: that is bf16's own spread.

    python benchmarks/loss_curve.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

RUNS = {
    "pronghorn": ("pronghorn", "pallas"),
    "pronghorn, XLA": ("pronghorn", "xla"),
    "transformers + PEFT": ("peft", "sdpa"),
    "transformers + PEFT, eager attention": ("peft", "eager"),
}
LEARNING_RATE, CLIP, RANK = 2e-4, 1.0, 16


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Write the base and the adapter as folders, and the batches as arrays."""
    import jax
    import jax.numpy as jnp

    import pronghorn as ph
    from pronghorn.data import Loader, load_rows, tokenize_rows
    from pronghorn.data.docstrings import docstring_rows
    from pronghorn.quickstart import find_model

    model, tokenizer = ph.load(options.model or str(find_model()))
    ph.save_model(model, folder / "base")
    model = ph.add_lora(model, ph.LoRAConfig(rank=RANK, alpha=RANK))
    graph, lora, frozen = ph.split(model)
    # B is not zero: a gradient of A that rounding decides would otherwise say nothing for some steps.
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(lora))))
    lora = jax.tree.map(
        lambda x: jnp.where(jnp.all(x == 0), 0.01 * jax.random.normal(next(keys), x.shape), x), lora
    )
    ph.save_adapter(ph.merge(graph, lora, frozen), folder / "adapter")
    data = ph.DataConfig(max_length=options.length, overlong="drop")
    rows = tokenize_rows(load_rows(docstring_rows("train")), tokenizer, data)
    loader = Loader(rows, batch_size=options.batch, max_length=options.length, packing=False)
    batches = [loader.batch_at(index) for index in range(options.steps)]
    np.savez(folder / "batches.npz", **{name: np.stack([b[name] for b in batches]) for name in batches[0]})


def run_pronghorn(
    folder: Path, batches: dict[str, np.ndarray], implementation: str
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    import pronghorn as ph
    from pronghorn.training.config import TrainConfig
    from pronghorn.training.losses import step_batch
    from pronghorn.training.memory_plan import start_state
    from pronghorn.training.optimizers import make_optimizer
    from pronghorn.training.step import compile_step, compute_dtypes, make_train_step

    steps = len(batches["input_ids"])
    model, _ = ph.load(folder / "base", adapter=folder / "adapter")
    graph, trainable, frozen = ph.split(model)
    train = TrainConfig(
        learning_rate=LEARNING_RATE,
        max_steps=steps,
        schedule="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
    )
    optimizer = make_optimizer(train, steps)
    state = start_state(trainable, optimizer, train)
    of_step = [step_batch({n: v[i] for n, v in batches.items()}, packing=False) for i in range(steps)]
    with ph.kernels(implementation):  # type: ignore[arg-type]
        step = make_train_step(graph, optimizer, train, dtypes=compute_dtypes(trainable))
        compiled = compile_step(step, state, frozen, of_step[0])
    import jax

    leaves, frozen_leaves, found = jax.tree.leaves(state), jax.tree.leaves(frozen), []
    for batch in of_step:
        leaves, metrics = compiled(leaves, frozen_leaves, batch)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return found


def run_peft(folder: Path, batches: dict[str, np.ndarray], attention: str) -> list[tuple[float, float]]:
    """The same, as plainly as torch allows."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.bfloat16, attn_implementation=attention
    ).to(device)
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    found = []
    for index in range(len(batches["input_ids"])):
        one = {name: torch.from_numpy(values[index, 0]).long().to(device) for name, values in batches.items()}
        loss = model(
            input_ids=one["input_ids"], labels=one["labels"], attention_mask=(one["segment_ids"] > 0).long()
        ).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append((float(loss.detach()), float(norm)))
    return found


def differences(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Of two curves `[steps, 2]`: relative differences of losses and norms, and of the loss's mean."""
    relative = np.abs(one - other) / np.abs(other)
    return {
        "loss_median": float(np.median(relative[:, 0])),
        "loss_largest": float(relative[:, 0].max()),
        "mean_loss": float(abs(one[:, 0].mean() - other[:, 0].mean()) / other[:, 0].mean()),
        "grad_norm_median": float(np.median(relative[:, 1])),
        "grad_norm_largest": float(relative[:, 1].max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser, "loss-curve")
    parser.add_argument("--model", default=None, help="GGUF file or folder; the quickstart's by default")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "prepare":
        prepare(options.folder, options)
        return
    if options.child is not None:
        framework, how = RUNS[options.child]
        run = run_pronghorn if framework == "pronghorn" else run_peft
        print(json.dumps(run(options.folder, dict(np.load(options.folder / "batches.npz")), how)), flush=True)
        return

    def child(name: str) -> str:
        """Output of a process of its own: none may hold the device's memory while another needs it."""
        command = [sys.executable, __file__, *sys.argv[1:], "--child", name, "--folder", scratch]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        return done.stdout

    with tempfile.TemporaryDirectory() as scratch:
        child("prepare")
        curves: dict[str, Any] = {}
        for name in RUNS:
            curves[name] = json.loads(child(name).strip().splitlines()[-1])
            losses, norms = np.asarray(curves[name]).T
            print(
                f"{name:40} loss {losses[0]:.4f} -> {losses[-10:].mean():.4f}, gradient norm {norms[-1]:.4f}",
                flush=True,
            )
    arrays = {name: np.asarray(curve) for name, curve in curves.items()}
    names = list(RUNS)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    rows = [{"one": a, "other": b, **differences(arrays[a], arrays[b])} for a, b in pairs]
    for row in rows:
        found = ", ".join(f"{name} {value:.1e}" for name, value in row.items() if isinstance(value, float))
        print(f"{row['one']} / {row['other']}: {found}")
    settings = {
        "steps": options.steps,
        "batch": options.batch,
        "length": options.length,
        "rank": RANK,
        "learning_rate": LEARNING_RATE,
    }
    result = {"settings": settings, "differences": rows, "curves": curves}
    result |= common.environment(options.commit, "torch", "transformers", "peft")
    common.write(Path(options.out), result)


if __name__ == "__main__":
    main()
