"""The folder of a run: config.json with every setting, the versions and the hashes, and what resuming compares."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pronghorn.errors import InputError
from pronghorn.files import write_json
from pronghorn.fingerprint import base_hash
from pronghorn.training.checkpoints import Checkpoint, newest_checkpoint
from pronghorn.training.config import TrainConfig
from pronghorn.versions import installed_versions

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
INCIDENTS = "incidents.jsonl"
SAMPLES = "samples.jsonl"
CONFIG = "config.json"

# May change between the two parts of a resumed run: they say where and how often something is reported, or how much
# memory is used, not which numbers are computed.
_FREE_SETTINGS = frozenset(
    {
        "best_at_end",
        "compile_cache",
        "deterministic",
        "early_stopping",
        "early_stopping_delta",
        "epochs",
        "general_text",
        "eval_batch_size",
        "eval_every",
        "keep_best",
        "keep_checkpoints",
        "keep_every",
        "log_every",
        "max_skipped_streak",
        "max_steps",
        "memory_policy",
        "mlp_tile_tokens",
        "head_tile_rows",
        "output_dir",
        "overwrite",
        "resume",
        "sample_every",
        "sample_prompts",
        "sample_tokens",
        "save_ema",
        "save_every",
        "spike_deviations",
        "tensorboard",
        "trackers",
    }
)


def run_settings(
    model: Any, train: TrainConfig, data: Any, dataset_hash: str, total_steps: int, *, full: bool
) -> dict[str, Any]:
    """What must be equal for a resumed run to be the interrupted one.

    Args:
      full: every weight is trained, so the base's values are in the checkpoint and only its structure must match.
    """
    base = base_hash(model)
    settings = {f"train.{name}": value for name, value in plain(train).items() if name not in _FREE_SETTINGS}
    settings |= {
        "total steps": total_steps,
        "data": dataset_hash,
        "data.max_length": data.max_length,
        "data.packing": data.packing,
        "data.seed": data.seed,
        "model": "-".join(base.split("-")[:2]) if full else base,
        "model.dtype": str(np.dtype(model.dtype)),
        "adapter": plain(model.adapter) if dataclasses.is_dataclass(model.adapter) else None,
    }
    return settings


def plain(config: Any) -> Any:
    """A dataclass as JSON values."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [plain(value) for value in config]
    return config if isinstance(config, (str, int, float, bool, type(None))) else str(config)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"train.learning_rate": 2e-4, ..}."""
    value = plain(config)
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v
        for name, inner in value.items()
        for k, v in flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def open_run_folder(
    folder: Path, *, resume: bool | str, overwrite: bool, say: Callable[[str], None]
) -> Checkpoint | None:
    """Decide how a run begins in `folder`; nothing is written or removed here.

    Returns:
      The checkpoint to go on from, or None for a new run.

    Raises:
      InputError: nothing to resume, or an earlier run that nobody said to replace.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"train.output_dir: {folder} is a file; name a folder.")
    if resume:
        checkpoint = newest_checkpoint(folder / CHECKPOINTS, say)
        if checkpoint is None and resume != "auto":
            raise InputError(
                f"train.resume: {folder / CHECKPOINTS} has no complete checkpoint; start without resume, or with "
                "resume=auto."
            )
        if checkpoint is None:
            say(f"{folder}: no complete checkpoint to resume, starting at step 1.")
        return checkpoint
    earlier = [folder / METRICS, *(folder / CHECKPOINTS).glob("step_*")]
    if not overwrite and any(path.exists() for path in earlier):
        raise InputError(
            f"train.output_dir: {folder} holds an earlier run; choose another folder, or set train.resume=true to go "
            "on with it or train.overwrite=true to replace it."
        )
    return None


def clear_earlier_run(folder: Path) -> None:
    """Remove an earlier run's checkpoints and records: a new run's own must be the only ones to resume from."""
    for name in (CHECKPOINTS, TENSORBOARD):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    for name in (INCIDENTS, SAMPLES):
        (folder / name).unlink(missing_ok=True)


def write_config(folder: Path, sections: dict[str, Any]) -> None:
    """config.json: the given sections, versions of what computes, and the device."""
    device = jax.devices()[0]
    write_json(
        folder / CONFIG,
        plain(sections)
        | {"versions": installed_versions(), "device": f"{device.platform} {device.device_kind}"},
    )
