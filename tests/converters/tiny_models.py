"""Tiny random models made by transformers, saved as Hugging Face folders, and what they answer."""

import functools
import json
from pathlib import Path

import numpy as np

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make(family: str, *, tied: bool = False, seed: int = 0, dtype: str = "float32", **changes):
    """A transformers model in eval mode, every parameter random (biases and norms too)."""
    import torch
    import transformers

    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
        "mistral": (
            transformers.MistralConfig,
            transformers.MistralForCausalLM,
            {"sliding_window": 64, "head_dim": 12},
        ),
    }
    config_class, model_class, special = classes[family]
    torch.manual_seed(seed)
    config = config_class(**(COMMON | special | {"tie_word_embeddings": tied} | changes))
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif "norm" in name:
                parameter.normal_(1.0, 0.1)
    return model.to(getattr(torch, dtype))


def save(model, folder: Path, **options) -> Path:
    """`model.save_pretrained` with transformers' progress kept off the screen."""
    model.save_pretrained(str(folder), **options)
    return folder


def prompt(tokens: int = 500, seed: int = 1, batch: int = 1) -> np.ndarray:
    """Random token ids, int32 `[batch, tokens]`."""
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, tokens)).astype(np.int32)


def logits(model, input_ids: np.ndarray) -> np.ndarray:
    """fp32 logits of a transformers (or PEFT) model."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(input_ids.astype(np.int64))).logits.float().numpy()


@functools.cache
def _forward():
    import jax

    from pronghorn.lora import merge

    return jax.jit(
        lambda graph, trainable, frozen, ids: merge(graph, trainable, frozen)(ids), static_argnums=0
    )


def ours(model, input_ids: np.ndarray) -> np.ndarray:
    """fp32 logits of a pronghorn model; models of one structure share one compiled program."""
    from pronghorn.lora import split

    graph, trainable, frozen = split(model)
    return np.asarray(_forward()(graph, trainable, frozen, input_ids))


def add_tokenizer(
    folder: Path, template: str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
):
    """A word-level tokenizer of VOCAB words with a chat template, saved into `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 4))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text())
    for key, new in changes.items():
        if new is None:
            value.pop(key, None)
        else:
            value[key] = new
    path.write_text(json.dumps(value))
