"""What FP8 base weights cost in accuracy, on SmolLM2-135M: loss, gradient of every adapter leaf, and a short training.

Adapters (rank 16, every linear) are trained for a few steps on the base in fp32 first, since one whose B is zero has no
gradient in A. At that point each variant's loss and gradient, summed over some batches, are compared with those of the
base in fp32, and with those of the FP8 weights multiplied exactly, which leaves what rounding activations and gradients
costs. Then some of the variants go on training side by side, on the same batches.

    python benchmarks/fp8_accuracy.py      # on a CPU through the oracle of the FP8 products, on a GPU by cuBLAS
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np

import pronghorn as ph
from pronghorn.converters.huggingface import load_model, load_tokenizer
from pronghorn.data import DataConfig, Loader, load_rows, tokenize_rows
from pronghorn.data.docstrings import docstring_rows
from pronghorn.quantization import QuantizationConfig
from pronghorn.quickstart import _base_folder, find_model
from pronghorn.training import TrainConfig, losses
from pronghorn.training.losses import evaluation_sums
from pronghorn.training.optimizers import make_optimizer
from pronghorn.training.step import compile_step, compute_dtypes, init_state, make_train_step

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"
LIMIT = 0.99
REFERENCES = ("fp32", "fp8 weights alone")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to keep and multiply the frozen weights; those with `train` are trained as well."""

    name: str
    dtype: str
    quantization: QuantizationConfig | None = None
    train: bool = False


def variants(dtype: str) -> list[Variant]:
    """fp32 and the FP8 weights multiplied exactly, which the others are compared with, and these, in `dtype`."""

    def fp8(name: str, train: bool = False, **options: Any) -> Variant:
        return Variant(name, dtype, QuantizationConfig("fp8", **options), train)

    exact = QuantizationConfig("fp8", fp8_gradients="unrounded", fp8_activations="unrounded")
    return [
        Variant("fp32", "float32", train=dtype == "float32"),
        Variant("fp8 weights alone", "float32", exact),
        fp8("fp8, gradients e4m3", train=True),
        fp8("fp8, gradients e5m2", fp8_gradients="e5m2"),
        fp8("fp8, gradients unrounded", fp8_gradients="unrounded"),
        fp8("fp8, a scale a row", fp8_scales="row"),
        Variant("nf4", dtype, QuantizationConfig("nf4")),
        Variant("bf16", "bfloat16", train=dtype == "bfloat16"),
    ]


def cosines(one: Any, other: Any) -> np.ndarray:
    """Of each adapter leaf, layer by layer: the leaves are stacked."""
    found = []
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
        found.append(np.sum(a * b, 1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))
    return np.concatenate(found)


def whole_cosine(one: Any, other: Any) -> float:
    """Of the gradients as one vector."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    return float(sum(np.vdot(a, b) for a, b in pairs) / (norm(one) * norm(other)))


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree))))


class Job:
    """Data, adapters and optimizer that all variants share."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.folder, self.options = folder, options
        tokenizer = load_tokenizer(folder)
        data = DataConfig(max_length=options.seq, overlong="drop")
        self.train, self.held_out = (
            Loader(
                tokenize_rows(load_rows(docstring_rows(part)[: options.rows]), tokenizer, data),
                batch_size=options.batch,
                max_length=options.seq,
                shuffle=part == "train",
            )
            for part in ("train", "heldout")
        )
        self.config = TrainConfig(
            learning_rate=5e-4, max_steps=1000, schedule="constant", batch_size=options.batch
        )
        self.optimizer = make_optimizer(self.config, 1000)

    def split(self, variant: Variant) -> tuple[Any, Any, Any]:
        model = load_model(
            self.folder, dtype=variant.dtype, layers="scanned", quantization=variant.quantization
        )
        return ph.split(ph.add_lora(model, ph.LoRAConfig(rank=16, alpha=32)))

    def micro_batch(self, loader: Loader, index: int) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in loader.batch_at(index).items()}

    def steps(self, parts: tuple, trainable: Any, first: int, count: int) -> tuple[Any, list[float]]:
        """(adapters, losses) after `count` steps on the batches from `first` on."""
        graph, like, frozen = parts
        step = make_train_step(graph, self.optimizer, self.config, dtypes=compute_dtypes(like))
        state = init_state(trainable, self.optimizer)
        compiled = compile_step(step, state, frozen, self.train.batch_at(first))
        state_leaves, structure = jax.tree.flatten(state)
        frozen_leaves, found = jax.tree.leaves(frozen), []
        for index in range(first, first + count):
            state_leaves, metrics = compiled(state_leaves, frozen_leaves, self.train.batch_at(index))
            found.append(float(metrics["loss"]))
        return jax.tree.unflatten(structure, state_leaves).trainable, found

    def loss_and_gradient(self, parts: tuple, trainable: Any, first: int) -> tuple[float, Any]:
        """(mean loss, gradient of its sum in fp64) over the batches from `first` on."""
        graph, _, frozen = parts
        run = jax.jit(jax.value_and_grad(losses.next_token(graph, reduction="sum"), has_aux=True))
        total, loss_sum, count = None, 0.0, 0
        for index in range(first, first + self.options.gradient_batches):
            (loss, aux), gradient = run(trainable, frozen, self.micro_batch(self.train, index))
            gradient = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradient)
            total = gradient if total is None else jax.tree.map(np.add, total, gradient)
            loss_sum, count = loss_sum + float(loss), count + int(aux["token_count"])
        return loss_sum / count, jax.tree.map(lambda leaf: leaf / count, total)

    def held_out_loss(self, parts: tuple, trainable: Any) -> float:
        graph, _, frozen = parts
        run = jax.jit(evaluation_sums(graph))
        sums = [
            run(trainable, frozen, self.micro_batch(self.held_out, index))
            for index in range(self.options.held_out)
        ]
        return float(sum(s for s, _ in sums) / sum(n for _, n in sums))


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each variant."""
    job = Job(options, folder)
    chosen = [v for v in variants(options.dtype) if options.only in v.name or v.name in REFERENCES]
    parts = job.split(chosen[0])
    start, _ = job.steps(parts, parts[1], 0, options.warm_up)
    start = jax.tree.map(np.asarray, start)
    rows, gradients = [], {}
    for variant in chosen:
        parts = job.split(variant)
        loss, gradient = job.loss_and_gradient(parts, start, options.warm_up)
        if variant.name in REFERENCES:
            gradients[variant.name] = gradient
        row = {
            "variant": variant.name,
            "dtype": variant.dtype,
            "loss": loss,
            "grad_norm": norm(gradient),
            "held_out_loss": job.held_out_loss(parts, start),
        }
        for name, reference in gradients.items():
            found = cosines(gradient, reference)
            row |= {"leaves": len(found)}
            row[f"cosine with {name}"] = {
                "lowest": float(found.min()),
                "mean": float(found.mean()),
                "whole": whole_cosine(gradient, reference),
                "leaves_below_limit": int(np.sum(found < LIMIT)),
            }
        if variant.train and options.steps:
            trained, row["losses"] = job.steps(parts, start, options.warm_up, options.steps)
            row["held_out_loss_trained"] = job.held_out_loss(parts, trained)
        print({k: v for k, v in row.items() if k != "losses"}, flush=True)
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown of a result file."""
    rows, settings = result["rows"], result["settings"]
    lines = [
        f"SmolLM2-135M, adapters of rank 16 after {settings['warm_up']} steps, {rows[0]['leaves']} leaves, gradient of "
        f"{settings['gradient_batches']} batches of {settings['batch']} x {settings['seq']} tokens, on "
        f"{result['device']}. Cosines: the lowest of any leaf, the mean, and that of the whole gradient. Trained: "
        f"held-out loss after {settings['steps']} further steps.",
        "",
        "| frozen weights | computed in | loss | cosine with fp32 | with the same FP8 weights multiplied exactly | "
        "gradient norm | held-out loss | trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        pairs = [row.get(f"cosine with {name}") for name in REFERENCES]
        shown = [
            f"{pair['lowest']:.4f}, {pair['mean']:.4f}, {pair['whole']:.4f}" if pair else "" for pair in pairs
        ]
        trained = row.get("held_out_loss_trained")
        lines.append(
            f"| {row['variant']} | {row['dtype']} | {row['loss']:.4f} | {shown[0]} | {shown[1]} | "
            f"{row['grad_norm']:.4f} | {row['held_out_loss']:.4f} | {'' if trained is None else f'{trained:.4f}'} |"
        )
    return "\n".join(lines)


def main() -> None:
    gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_arguments(parser, "fp8-accuracy-gpu" if gpu else "fp8-accuracy-cpu")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--batch", type=int, default=8 if gpu else 1)
    parser.add_argument("--seq", type=int, default=1024 if gpu else 256)
    parser.add_argument(
        "--rows", type=int, default=4000 if gpu else 400, help="functions to train on, at most"
    )
    parser.add_argument("--warm-up", type=int, default=20 if gpu else 6)
    parser.add_argument("--steps", type=int, default=100 if gpu else 16)
    parser.add_argument("--gradient-batches", type=int, default=4 if gpu else 8)
    parser.add_argument(
        "--only", default="", help="variants whose name has this; the first two are always measured"
    )
    parser.add_argument("--held-out", type=int, default=16 if gpu else 4, help="batches of held-out rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, _base_folder(str(find_model()), Path(folder)))
    names = ("dtype", "batch", "seq", "rows", "warm_up", "gradient_batches", "steps", "held_out")
    settings = {name: getattr(options, name) for name in names}
    result = {**common.environment(options.commit), "settings": settings, "rows": rows}
    common.write(options.out, result)
    name = "fp8-gpu" if gpu else "fp8-cpu"
    if options.out.parent == common.RESULTS and f"<!-- {name}:begin -->" in DOCUMENT.read_text():
        head, rest = DOCUMENT.read_text().split(f"<!-- {name}:begin -->", 1)
        tail = rest.split(f"<!-- {name}:end -->", 1)[1]
        DOCUMENT.write_text(f"{head}<!-- {name}:begin -->\n{table(result)}\n<!-- {name}:end -->{tail}")


if __name__ == "__main__":
    main()
