"""A tiny model as a Hugging Face folder with a real fast tokenizer and a ChatML template, and rows to train it on."""

import json
from pathlib import Path

from pronghorn.converters.huggingface import save_model
from pronghorn.models import DecoderConfig
from tests.data.tokenizers import tiny_tokenizer
from tests.models.reference import tiny_decoder

QUESTIONS = ("fox", "dog", "hen", "cow", "pig", "cat", "東京", "élève", "owl", "elk", "yak", "ant")


def tiny_config(**changes) -> DecoderConfig:
    fields = {
        "family": "llama",
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    return DecoderConfig(**fields | changes)


def write_model(folder: Path, *, seed: int = 0, **changes) -> Path:
    """config.json, model.safetensors in fp32, tokenizer and template."""
    save_model(tiny_decoder(tiny_config(**changes), seed=seed), folder, tokenizer_from=tiny_tokenizer())
    return folder


def chat(question: str, answer: str) -> dict:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def write_rows(path: Path, rows: list[dict] | None = None) -> Path:
    """JSON Lines; by default twelve short conversations of different lengths."""
    if rows is None:
        rows = [chat(f"what is {word}?", f"{word} is {'so ' * i}lazy") for i, word in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
