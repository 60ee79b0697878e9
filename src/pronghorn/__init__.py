"""pronghorn: fast, exact fine-tuning of language models in JAX.

    model, tokenizer = ph.load("folder-or-hub-name")
    model = ph.add_lora(model, ph.LoRAConfig(rank=16))
    trainer = ph.Trainer(model, tokenizer, "rows.jsonl", ph.TrainConfig(max_steps=60))
    trainer.train()
    ph.save_adapter(model, "out/adapter")
    ph.save_merged(model, tokenizer, "out/merged")

Names are imported when first used, so `import pronghorn` costs nothing and `pronghorn.pallas_kernels` can be used
without the rest.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.converters.huggingface import load, save_model
    from pronghorn.converters.merged import save_merged
    from pronghorn.converters.peft import load_adapter, save_adapter
    from pronghorn.data.config import DataConfig
    from pronghorn.errors import InputError, PronghornError, RunError
    from pronghorn.generation import generate
    from pronghorn.lora import LoRAConfig, add_lora, merge, merge_lora, split
    from pronghorn.models.config import DecoderConfig
    from pronghorn.models.decoder import Decoder
    from pronghorn.pallas_kernels.launch import kernels
    from pronghorn.training import TrainConfig, Trainer, losses

_HOME = {
    "load": "converters.huggingface",
    "save_model": "converters.huggingface",
    "save_merged": "converters.merged",
    "load_adapter": "converters.peft",
    "save_adapter": "converters.peft",
    "DataConfig": "data.config",
    "InputError": "errors",
    "PronghornError": "errors",
    "RunError": "errors",
    "generate": "generation",
    "LoRAConfig": "lora",
    "add_lora": "lora",
    "merge": "lora",
    "merge_lora": "lora",
    "split": "lora",
    "DecoderConfig": "models.config",
    "Decoder": "models.decoder",
    "kernels": "pallas_kernels.launch",
    "TrainConfig": "training",
    "Trainer": "training",
    "losses": "training",
}

__all__ = [
    "DataConfig",
    "Decoder",
    "DecoderConfig",
    "InputError",
    "LoRAConfig",
    "PronghornError",
    "RunError",
    "TrainConfig",
    "Trainer",
    "add_lora",
    "generate",
    "kernels",
    "load",
    "load_adapter",
    "losses",
    "merge",
    "merge_lora",
    "save_adapter",
    "save_merged",
    "save_model",
    "split",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pronghorn' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pronghorn.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
