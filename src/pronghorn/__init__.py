"""pronghorn: fine-tuning of language models in JAX.

>>> import pronghorn as ph
>>> model, tokenizer = ph.load("HuggingFaceTB/SmolLM2-135M-Instruct")
>>> model = ph.add_lora(model, ph.LoRAConfig(rank=16))
>>> ph.Trainer(model, tokenizer, rows, ph.TrainConfig(max_steps=60)).train()
>>> ph.save_adapter(model, "out/adapter")

These are all the public names. Each is imported when it is first asked for: the command line can print its help, and a
research script can use one kernel, without loading the rest.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.converters.huggingface import load, load_model, load_tokenizer, save_model
    from pronghorn.converters.merged import save_merged
    from pronghorn.converters.peft import load_adapter, save_adapter
    from pronghorn.data import DataConfig, load_rows
    from pronghorn.errors import InputError, PronghornError, RunError
    from pronghorn.generation import generate
    from pronghorn.lora import LoRAConfig, add_lora, merge, merge_lora, split
    from pronghorn.models import Decoder, DecoderConfig
    from pronghorn.new_tokens import add_tokens
    from pronghorn.pallas_kernels.launch import kernels
    from pronghorn.training import TrainConfig, Trainer, losses

__version__ = "0.1.0"

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
    "add_tokens",
    "generate",
    "kernels",
    "load",
    "load_adapter",
    "load_model",
    "load_rows",
    "load_tokenizer",
    "losses",
    "merge",
    "merge_lora",
    "save_adapter",
    "save_merged",
    "save_model",
    "split",
]

_HOME = {
    "pronghorn.converters.huggingface": ("load", "load_model", "load_tokenizer", "save_model"),
    "pronghorn.converters.merged": ("save_merged",),
    "pronghorn.converters.peft": ("load_adapter", "save_adapter"),
    "pronghorn.data": ("DataConfig", "load_rows"),
    "pronghorn.errors": ("InputError", "PronghornError", "RunError"),
    "pronghorn.generation": ("generate",),
    "pronghorn.lora": ("LoRAConfig", "add_lora", "merge", "merge_lora", "split"),
    "pronghorn.models": ("Decoder", "DecoderConfig"),
    "pronghorn.new_tokens": ("add_tokens",),
    "pronghorn.pallas_kernels.launch": ("kernels",),
    "pronghorn.training": ("TrainConfig", "Trainer", "losses"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pronghorn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
