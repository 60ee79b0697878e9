"""What the commands do, as functions: the pieces of the library joined for one job.

Order matters to the user: rows are read, tokenised and counted before any weight is loaded, so that an empty file or a
wrong template costs seconds. Then the step is compiled, of shapes, so that a job that does not fit is refused before
its weights are loaded; and what XLA tries out while it compiles never lies on the device beside them.
"""

import contextlib
import copy
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from pronghorn.configuration import JobConfig
from pronghorn.data import DataConfig, Dataset
from pronghorn.errors import InputError, RunError
from pronghorn.files import write_atomic, write_json
from pronghorn.lora import LoRAConfig
from pronghorn.models.config import DecoderConfig

ADAPTER_KL_LIMIT = 1e-9
HELDOUT_SHARE = 0.4  # of a text, where no other is given to judge on

if TYPE_CHECKING:
    from pronghorn.models.decoder import Decoder
    from pronghorn.training import MemoryPlan, Trainer


def read_data(
    data: DataConfig, tokenizer: Any, vocab_size: int | None = None
) -> tuple[Dataset, Dataset | None]:
    """See `data.reading.read_sets`."""
    from pronghorn.data.reading import read_sets

    return read_sets(data, tokenizer, vocab_size)


def read_architecture(folder: Path) -> DecoderConfig:
    """The `DecoderConfig` of a folder's config.json; no weight is read."""
    from pronghorn.converters.huggingface import read_config
    from pronghorn.models.families import family_for

    hf_config, _ = read_config(folder)
    return family_for(hf_config).config_from_hf(hf_config)


def prepare_job(job: JobConfig, *, merge_into: str | Path | None = None) -> "Trainer":
    """A `Trainer` for the job, its step compiled: data first, then the programs, then weights and the adapter.

    Args:
      merge_into: the folder that `save_results` will be given; that it can be written is checked now, not after hours.
    """
    from pronghorn.converters.huggingface import open_model, read_weights, resolve_model_path
    from pronghorn.training import Trainer

    adapted = job.adapter is not None or job.lora is not None
    require_free_folder(Path(job.train.output_dir) / ("adapter" if adapted else "model"))
    if merge_into is not None:
        if not adapted:
            raise InputError(
                "--merge: there is no adapter to merge with lora: null; the trained model is saved as it is."
            )
        require_free_folder(merge_into)
    folder = resolve_model_path(job.model)
    architecture = read_architecture(folder)
    tokenizer, vocab_size, first_new = tokenizer_of(job, folder, architecture)
    train, held_out = read_data(job.data, tokenizer, vocab_size)
    if job.new_tokens and train.largest_token < first_new:
        raise InputError(
            "new_tokens: not one of them occurs in the rows, so nothing could be learned about them; leave them out, "
            "or look at the rows with pronghorn preview."
        )
    opened = open_model(folder, dtype=job.dtype, layers=job.layers, quantization=job.quantization)
    answers = None
    if job.train.sample_every is not None:
        from pronghorn.generation import sampler

        answers = sampler(tokenizer, job.train.sample_prompts, max_new_tokens=job.train.sample_tokens)
    shapes = with_adapter(opened.model, job, folder, first_new)
    trainer = Trainer(
        shapes, tokenizer, train, job.train, data=job.data, eval_dataset=held_out, sampler=answers
    )
    plan = trainer.compile()
    print(
        f"{plan.memory_lines()[0]}\ncompiled in    {plan.compile_seconds:.1f} s; the weights are loaded now"
    )
    trainer.model = with_adapter(read_weights(opened), job, folder, first_new)
    return trainer


def with_adapter(model: "Decoder", job: JobConfig, folder: Path, first_new: int) -> "Decoder":
    """The base model of a job, of arrays or of shapes, with the job's new tokens and adapter; see `tokenizer_of`."""
    from pronghorn.converters.huggingface import original_weights
    from pronghorn.converters.peft import load_adapter
    from pronghorn.lora import add_lora
    from pronghorn.new_tokens import with_tokens

    if job.new_tokens:
        model = with_tokens(model, first_new, len(job.new_tokens))
    if job.adapter is not None:
        return load_adapter(model, job.adapter)
    return model if job.lora is None else add_lora(model, job.lora, original=original_weights(folder))


def tokenizer_of(job: JobConfig, folder: Path, architecture: DecoderConfig) -> tuple[Any, int, int]:
    """(tokenizer, embedding rows, id of the first new token) of a job, before any weight is read.

    Raises:
      InputError: tokens that cannot be added.
    """
    from pronghorn.converters.huggingface import load_tokenizer
    from pronghorn.converters.peft import adapter_tokenizer, adapter_vocab_size
    from pronghorn.new_tokens import extended_tokenizer

    tokenizer, vocab_size, first = load_tokenizer(folder), architecture.vocab_size, 0
    if job.adapter is not None:
        if job.new_tokens:
            raise InputError(
                "new_tokens: the job goes on with an adapter, whose vocabulary is fixed; give the tokens when the "
                "adapter is first trained."
            )
        tokenizer = adapter_tokenizer(job.adapter, tokenizer)
        vocab_size = adapter_vocab_size(job.adapter, architecture)
    if job.new_tokens and tokenizer is not None:
        tokenizer = extended_tokenizer(tokenizer, job.new_tokens)
        first = min(tokenizer.convert_tokens_to_ids(list(job.new_tokens)))
        vocab_size = max(vocab_size, first + len(job.new_tokens))
    return tokenizer, vocab_size, first


def require_run_folder(job: JobConfig) -> None:
    """Refuse a folder that the run will not begin in, before anything is compiled or loaded for it.

    A checkpoint to resume is looked for when training starts: its files are read whole for that.

    Raises:
      InputError: it holds another run that is neither resumed nor replaced.
    """
    from pronghorn.training.run_folder import open_run_folder

    if not job.train.resume:
        folder = Path(job.train.output_dir)
        open_run_folder(folder, resume=False, overwrite=job.train.overwrite, say=print)


def require_free_folder(path: str | Path) -> None:
    """Refuse a folder that a result could not be written to, before hours are spent on the result.

    Raises:
      InputError: it holds something that no earlier save wrote.
    """
    from pronghorn.converters.carried_files import written_by_us
    from pronghorn.files import require_new

    if not written_by_us(Path(path)):
        require_new(path)


def plan_job(job: JobConfig, *, memory_gib: float | None = None, device: str | None = None) -> "MemoryPlan":
    """Memory and FLOPs of the job's step, from the compiled program; no weight is read.

    Args:
      memory_gib: device memory that memory_policy "auto" has to fit; None asks the device.
      device: name of a GPU to compile for that need not be here (`target_device.py`); None takes this machine's.
    """
    from pronghorn.converters.huggingface import resolve_model_path
    from pronghorn.converters.quantized_weights import planned_quantization
    from pronghorn.quantization import read_quantization
    from pronghorn.target_device import compiling_for
    from pronghorn.training import plan_memory

    folder = resolve_model_path(job.model)
    architecture = read_architecture(folder)
    if job.new_tokens or job.adapter is not None:
        vocab_size = tokenizer_of(job, folder, architecture)[1]
        architecture = dataclasses.replace(architecture, vocab_size=vocab_size)
    with contextlib.nullcontext() if device is None else compiling_for(device):
        return plan_memory(
            architecture,
            job.lora if job.adapter is None else shape_of_adapter(Path(job.adapter), architecture),
            job.train,
            jnp.dtype(job.dtype),
            max_length=job.data.max_length,
            layers=job.layers,
            packing=job.data.packing,
            quantization=planned_quantization(folder) or read_quantization(job.quantization),
            evaluate=job.data.eval_path is not None or job.data.eval_fraction > 0,
            memory_limit=None if memory_gib is None else int(memory_gib * 2**30),
        )


def shape_of_adapter(folder: Path, architecture: DecoderConfig) -> LoRAConfig:
    """What makes an adapter as large as the one in a PEFT folder (with its largest rank, where it has several)."""
    from pronghorn.converters.peft_config import expected_modules, read_config
    from pronghorn.converters.peft_sites import module_names, part_names, peft_sites
    from pronghorn.models.decoder import Decoder

    config, model = read_config(folder), Decoder.abstract(architecture)
    joined = bool(config["target_parameters"])
    places = peft_sites(model, joined_experts=joined)
    chosen = expected_modules(folder, config, module_names(model, joined_experts=joined), places)
    if not chosen:
        raise InputError(f"{folder}: the adapter fits nothing in the model; it belongs to another model.")
    return LoRAConfig(
        rank=max(config["r"], *config["rank_pattern"].values(), 1),
        targets=tuple(part_names(places, chosen)),
        dropout=config["lora_dropout"],
        use_dora=config["use_dora"],
    )


def preview_job(job: JobConfig, *, rows: int, html: Path | None) -> dict[str, Any]:
    """Print (and write as HTML) the first rows with their loss mask; returns the statistics."""
    from pronghorn.converters.huggingface import resolve_model_path
    from pronghorn.data import Loader, preview_html, preview_rows

    if rows < 0:
        raise InputError(f"--rows {rows}: give 0 or more.")
    folder = resolve_model_path(job.model)
    tokenizer, vocab_size, _ = tokenizer_of(job, folder, read_architecture(folder))
    train, held_out = read_data(job.data, tokenizer, vocab_size)
    loader = Loader(
        train,
        batch_size=job.train.batch_size,
        micro_batches=job.train.gradient_accumulation,
        max_length=job.data.max_length,
        packing=job.data.packing,
        seed=job.data.seed,
    )
    preview_rows(train, tokenizer, rows=rows, loader=loader)
    if html is not None:
        write_atomic(html, preview_html(train, tokenizer, rows=rows, loader=loader))
        print(f"the same as a page: {html}")
    return {
        "format": train.format.name,
        **dataclasses.asdict(train.stats),
        "heldout_documents": 0 if held_out is None else len(held_out),
        "steps_per_epoch": len(loader),
        "rows_full": loader.efficiency,
    }


def convert_model(
    source: str, out: Path, dtype: str | None, max_shard_bytes: int, quantization: str | None = None
) -> dict[str, Any]:
    """Write `source` as a Hugging Face folder; untouched weights keep their bits.

    Args:
      quantization: write the folder that bitsandbytes would: "nf4", "fp4", "int8" or a recipe.
    """
    from pronghorn.converters.huggingface import load_model, resolve_model_path, save_model
    from pronghorn.models.parameters import named_parameters

    require_free_folder(out)
    folder = resolve_model_path(source)
    model = load_model(folder, dtype=None if quantization is None else dtype, quantization=quantization)
    save_model(model, out, tokenizer_from=folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
    count = sum(math.prod(parameter.shape) for parameter in named_parameters(model).values())
    return {"out": str(out), "parameters": count, "dtype": dtype or str(model.dtype)}


def make_recipe(
    source: str,
    out: Path,
    *,
    text: Path,
    heldout: Path | None = None,
    config: Any = None,
    costs: Path | None = None,
    progress: Any = None,
) -> dict[str, Any]:
    """Search a recipe for 4-bit weights on a text, and write it; see `evaluation.recipe_search`."""
    from pronghorn.converters.huggingface import load_tokenizer, resolve_model_path
    from pronghorn.evaluation.recipe_search import search_recipe
    from pronghorn.quantization.recipe import read_recipe

    known = None if costs is None else read_recipe(costs).get("costs", {})
    texts = [_read_text(path) for path in (text, heldout) if path is not None]
    folder = resolve_model_path(source)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise InputError(
            f"{source}: has no tokenizer, which the text needs; put tokenizer.json into the folder."
        )
    calibration, *rest = (
        tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in texts
    )
    if not rest:
        cut = int(len(calibration) * (1 - HELDOUT_SHARE))
        calibration, rest = calibration[:cut], [calibration[cut:]]
    recipe = search_recipe(folder, calibration, rest[0], config, known=known, progress=progress)
    write_json(out, recipe)
    return recipe


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: the text cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; give a text file.") from None


def merge_model(
    base: str,
    adapter: str,
    out: Path,
    dtype: str | None,
    *,
    quantization: str | None = None,
    onto: str | None = None,
    write: str | None = None,
) -> dict[str, Any]:
    """Merge a PEFT adapter into its base, write, reload, compare; returns the comparison.

    Args:
      quantization: how the base was quantised when the adapter was trained: the live model is the adapter on that.
      onto: a 16-bit model to merge into, instead of the base as it is loaded (a quantised one is dequantised).
      write: quantise what is written: "nf4", "fp4", "int8" or a recipe.
    """
    from pronghorn.converters.huggingface import load
    from pronghorn.converters.merged import save_merged

    require_free_folder(out)
    model, tokenizer = load(base, adapter=adapter, dtype=dtype, quantization=quantization)
    return save_merged(model, tokenizer, out, base=onto, quantization=write)


def save_results(trainer: "Trainer", folder: Path, *, merge_into: str | Path | None = None) -> dict[str, Any]:
    """Save what was trained, reload it, compare it with the live model; the numbers are written beside it.

    An adapter goes to `folder/adapter`, fully trained weights to `folder/model`. With `merge_into` the adapter is also
    merged into a folder of its own. Each carries the chat template that the rows were rendered with.

    Raises:
      RunError: the reloaded artefact is not the live model.
    """
    from pronghorn.converters.merged import compare_models, fixture_ids, save_merged
    from pronghorn.converters.peft import load_adapter, save_adapter
    from pronghorn.lora import remove_lora

    model, tokenizer = trainer.model, tokenizer_as_trained(trainer)
    if model.adapter is None:
        check = save_merged(model, tokenizer, folder / "model")
        print(
            f"model saved in {folder / 'model'}; reloaded, its mean KL to the live model is {check['kl_mean']:.1e}"
        )
        return {"model_dir": str(folder / "model"), "model_kl": check["kl_mean"]}
    adapter_dir = folder / "adapter"
    save_adapter(model, adapter_dir, tokenizer=tokenizer)
    reloaded = load_adapter(remove_lora(model), adapter_dir)
    check = compare_models(model, reloaded, fixture_ids(model, tokenizer))
    write_json(folder / "adapter_check.json", check)
    # The same factors on the same base in the same program: not even a rounding may differ.
    if not check["kl_max"] <= ADAPTER_KL_LIMIT:
        raise RunError(
            f"{adapter_dir}: reloaded, it differs from the trained adapter (KL {check['kl_max']:.1e})."
        )
    print(f"adapter saved in {adapter_dir}; reloaded, its KL to the live model is {check['kl_max']:.1e}")
    saved: dict[str, Any] = {"adapter_dir": str(adapter_dir), "adapter_kl": check["kl_max"]}
    if merge_into is not None:
        merged = save_merged(model, tokenizer, merge_into)
        print(
            f"merged model saved in {merge_into}; reloaded, its mean KL to the live model is {merged['kl_mean']:.1e}"
        )
        saved |= {"merged_dir": str(merge_into), "merged_kl": merged["kl_mean"]}
    return saved


def tokenizer_as_trained(trainer: "Trainer") -> Any:
    """The trainer's tokenizer, with `data.chat_template` as its template where the job gave one.

    Where a shipped template ends turns with a marker of its own, that is the eos token from now on: a model that ends
    its answer would otherwise not be stopped.
    """
    from pronghorn.data.chat_template import template_source
    from pronghorn.data.shipped_templates import SHIPPED

    if trainer.tokenizer is None or trainer.data.chat_template is None:
        return trainer.tokenizer
    tokenizer = copy.deepcopy(trainer.tokenizer)
    tokenizer.chat_template = template_source(tokenizer, trainer.data.chat_template)
    shipped = SHIPPED.get(trainer.data.chat_template)
    if shipped is not None and shipped.end is not None:
        tokenizer.eos_token = shipped.end
    if shipped is not None and tokenizer.bos_token is None:  # it was rendered without one
        tokenizer.chat_template = "{%- set bos_token = '' %}" + tokenizer.chat_template
    return tokenizer
