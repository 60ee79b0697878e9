"""What the commands do, as functions: the pieces of the library joined for one job.

Order matters to the user: rows are read, tokenised and counted before any weight is loaded, so that an empty file or a
wrong template costs seconds.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from pronghorn.configuration import JobConfig
from pronghorn.data import DataConfig, TokenizedDataset, load_rows, tokenize_rows
from pronghorn.errors import InputError, RunError
from pronghorn.files import write_json

ADAPTER_KL_LIMIT = 1e-9

if TYPE_CHECKING:
    from pronghorn.training import MemoryPlan, Trainer


def read_data(
    data: DataConfig, tokenizer: Any, vocab_size: int | None = None
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """(training set, held-out set or None) of `data.path`, `data.eval_path` and `data.eval_fraction`.

    Raises:
      InputError: no path, or rows that cannot be used.
    """
    from pronghorn.data.sources import hold_out

    if data.path is None:
        raise InputError("data.path: missing; give a file, a folder or a hub name of rows to train on.")
    if tokenizer is None:
        raise InputError(
            "model: its folder has no tokenizer, which rows need; put tokenizer.json into the folder."
        )
    rows = load_rows(data.path, data.split)
    held_out = []
    if data.eval_path is not None:
        held_out = load_rows(data.eval_path)
    else:
        rows, held_out = hold_out(rows, data.eval_fraction, data.seed)
    train = tokenize_rows(rows, tokenizer, data, vocab_size=vocab_size)
    if not held_out:
        return train, None
    return train, tokenize_rows(held_out, tokenizer, data, vocab_size=vocab_size)


def read_architecture(folder: Path) -> Any:
    """The `DecoderConfig` of a folder's config.json; no weight is read."""
    from pronghorn.converters.huggingface import read_config
    from pronghorn.models.families import family_for

    hf_config, _ = read_config(folder)
    return family_for(hf_config).config_from_hf(hf_config)


def prepare_job(job: JobConfig) -> "Trainer":
    """A `Trainer` for the job: data first, then weights, then the adapter."""
    from pronghorn.converters.huggingface import load_model, load_tokenizer, resolve_model_path
    from pronghorn.converters.peft import load_adapter
    from pronghorn.lora import add_lora
    from pronghorn.training import Trainer

    folder = resolve_model_path(job.model)
    tokenizer = load_tokenizer(folder)
    train, held_out = read_data(job.data, tokenizer, read_architecture(folder).vocab_size)
    model = load_model(folder, dtype=job.dtype, layers=job.layers)
    if job.adapter is not None:
        model = load_adapter(model, job.adapter)
    elif job.lora is not None:
        model = add_lora(model, job.lora)
    return Trainer(model, tokenizer, train, job.train, data=job.data, eval_dataset=held_out)


def plan_job(job: JobConfig) -> "MemoryPlan":
    """Memory and FLOPs of the job's step, from the compiled program; no weight is read."""
    from pronghorn.converters.huggingface import resolve_model_path
    from pronghorn.training import plan_memory

    return plan_memory(
        read_architecture(resolve_model_path(job.model)),
        job.lora,
        job.train,
        jnp.dtype(job.dtype),
        max_length=job.data.max_length,
        layers=job.layers,
        evaluate=job.data.eval_path is not None or job.data.eval_fraction > 0,
    )


def preview_job(job: JobConfig, *, rows: int, html: Path | None) -> dict[str, Any]:
    """Print (and write as HTML) the first rows with their loss mask; returns the statistics."""
    from pronghorn.converters.huggingface import load_tokenizer, resolve_model_path
    from pronghorn.data.preview import preview_rows

    if job.data.path is None:
        raise InputError("data.path: missing; give a file, a folder or a hub name of rows to look at.")
    tokenizer = load_tokenizer(resolve_model_path(job.model))
    return preview_rows(load_rows(job.data.path, job.data.split), tokenizer, job.data, count=rows, html=html)


def convert_model(source: str, out: Path, dtype: str | None, max_shard_bytes: int) -> dict[str, Any]:
    """Write `source` as a Hugging Face folder; untouched weights keep their bits."""
    from pronghorn.converters.huggingface import load_model, resolve_model_path, save_model
    from pronghorn.models.parameters import named_parameters

    folder = resolve_model_path(source)
    model = load_model(folder)
    save_model(model, out, tokenizer_from=folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
    count = sum(parameter.size for parameter in named_parameters(model).values())
    return {"out": str(out), "parameters": count, "dtype": dtype or str(model.dtype)}


def save_results(trainer: "Trainer", folder: Path, *, merge_into: str | Path | None = None) -> dict[str, Any]:
    """Save what was trained, reload it, compare it with the live model; the numbers are written beside it.

    An adapter goes to `folder/adapter`, fully trained weights to `folder/model`. With `merge_into` the adapter is also
    merged into a folder of its own.

    Raises:
      RunError: the reloaded artefact is not the live model.
    """
    from pronghorn.converters.huggingface import save_model
    from pronghorn.converters.merged import compare_models, fixture_ids, save_merged
    from pronghorn.converters.peft import load_adapter, save_adapter
    from pronghorn.lora import remove_lora

    model = trainer.model
    if model.adapter is None:
        out = save_model(model, folder / "model", tokenizer_from=trainer.tokenizer, overwrite=True)
        print(f"model saved in {out}")
        return {"model_dir": str(out)}
    adapter_dir = folder / "adapter"
    save_adapter(model, adapter_dir)
    reloaded = load_adapter(remove_lora(model), adapter_dir)
    check = compare_models(model, reloaded, fixture_ids(model, trainer.tokenizer))
    write_json(folder / "adapter_check.json", check)
    # The same factors on the same base in the same program: not even a rounding may differ.
    if not check["kl_max"] <= ADAPTER_KL_LIMIT:
        raise RunError(
            f"{adapter_dir}: reloaded, it differs from the trained adapter (KL {check['kl_max']:.1e})."
        )
    print(f"adapter saved in {adapter_dir}; reloaded, its KL to the live model is {check['kl_max']:.1e}")
    saved: dict[str, Any] = {"adapter_dir": str(adapter_dir), "adapter_kl": check["kl_max"]}
    if merge_into is not None:
        merged = save_merged(model, trainer.tokenizer, merge_into)
        print(
            f"merged model saved in {merge_into}; reloaded, its mean KL to the live model is {merged['kl_mean']:.1e}"
        )
        saved |= {"merged_dir": str(merge_into), "merged_kl": merged["kl_mean"]}
    return saved
