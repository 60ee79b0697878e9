"""A GGUF model to a plain Hugging Face folder.

The architectures are llama (which is also how Mistral models are written), qwen2 and qwen3, dense. Weights are decoded
in fp32 and rounded once to the dtype asked for; a quantised file gives the values it holds, not the ones before it was
quantised.

llama.cpp rotates neighbouring pairs of a head, transformers rotates its two halves, so its converter interleaves the
rows of q_proj and k_proj for the architecture `llama` (only there). With d rows a head, row 2 i + j of a GGUF head is
row j d/2 + i of the Hugging Face head, j in {0, 1}; `_heads_in_halves` undoes it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pronghorn.converters.gguf_reader import GGUFFile
from pronghorn.converters.gguf_tokenizer import SpecialTokens, special_tokens, tokenizer_files
from pronghorn.converters.safetensors_files import TensorSpec, write_weights
from pronghorn.errors import InputError
from pronghorn.files import new_folder

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_MODEL_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_DTYPES: dict[str, Any] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class Target:
    """Where one GGUF tensor goes: its Hugging Face name, its shape, and the heads whose rows are interleaved (or 0)."""

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0


def convert_gguf(path: str | Path, out_dir: str | Path, dtype: str = "bfloat16") -> Path:
    """Write the model and tokenizer of a GGUF file as a Hugging Face folder.

    The folder holds config.json, generation_config.json, model.safetensors (or shards and their index),
    tokenizer.json, tokenizer_config.json and the chat template. It appears whole or not at all.

    Args:
      path: a `.gguf` file; tensors may be any of `gguf_blocks.FORMATS`.
      out_dir: a folder that does not exist yet, or is empty.
      dtype: "bfloat16", "float16" or "float32", for every tensor.

    Returns:
      `out_dir` as a path.

    Raises:
      InputError: the file is damaged or incomplete, its architecture, rope scaling or tokenizer is not supported, or
        `out_dir` holds something already.
      RunError: the disk is full or cannot be written.
    """
    if dtype not in _DTYPES:
        raise InputError(
            f"dtype={dtype!r} is not supported for converting GGUF; choose from {', '.join(_DTYPES)}."
        )
    out_dir = Path(out_dir)
    with GGUFFile(path) as source:
        config = hugging_face_config(source, dtype)
        targets = tensor_targets(source, config)
        texts = tokenizer_files(source.metadata, str(source.path))
        texts["config.json"] = _json(config)
        texts["generation_config.json"] = _json(_generation_config(source))
        origin = {target.name: name for name, target in targets.items()}

        def fetch(name: str) -> np.ndarray:
            array = source.read(origin[name], _DTYPES[dtype])
            heads = targets[origin[name]].interleaved_heads
            return _heads_in_halves(array, heads) if heads else array

        with new_folder(out_dir) as folder:
            for name, text in texts.items():
                file = folder / name
                file.parent.mkdir(exist_ok=True)
                file.write_text(text, encoding="utf-8")
            specs = {t.name: TensorSpec(np.dtype(_DTYPES[dtype]), t.shape) for t in targets.values()}
            write_weights(folder, specs, fetch)
    return out_dir


def _heads_in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """`[heads * d, ...]` with the two halves of each head interleaved, to halves one after the other."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


class _Keys:
    """The metadata below `<architecture>.`, each value checked for type and range."""

    def __init__(self, source: GGUFFile, architecture: str):
        self.path, self.metadata, self.architecture = source.path, source.metadata, architecture

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; a list counts as its value when all layers agree."""
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if value is None and default is not None:
            return default
        if type(value) is not int or value <= 0:
            raise self._wrong(key, value, "one positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive float; a stored fp32 becomes the shortest decimal that rounds to it (1e-05, not 9.99e-06)."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise self._wrong(key, value, "a positive number")
        return float(str(np.float32(value)))

    def _wrong(self, key: str, value: Any, expected: str) -> InputError:
        key = f"{self.architecture}.{key}"
        if value is None:
            return InputError(f"{self.path}: lacks the metadata key {key}; the file is no complete model.")
        return InputError(f"{self.path}: {key} is {str(value)[:60]}, where {expected} is needed.")


def hugging_face_config(source: GGUFFile, dtype: str) -> dict[str, Any]:
    """config.json for the model of a GGUF file.

    Raises:
      InputError: an architecture, feature or rope scaling that is not supported, or a key missing or out of range.
    """
    architecture = source.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{source.path}: the architecture {architecture!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    keys = _Keys(source, architecture)
    if keys.get("expert_count"):
        raise InputError(f"{source.path}: is a mixture of experts, which cannot be converted from GGUF yet.")
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden // heads)
    if head_dim % 2:
        raise InputError(f"{source.path}: has heads of {head_dim} elements, and rope rotates an even number.")
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.count(key, head_dim) != head_dim:
            raise InputError(
                f"{source.path}: {architecture}.{key} is {keys.count(key)} and the head size {head_dim}; "
                "heads of two sizes and partly rotated heads are not supported."
            )
    if "token_embd.weight" not in source.tensors:
        raise InputError(f"{source.path}: has no tensor token_embd.weight; the file is no complete model.")
    sliding_window = keys.get("attention.sliding_window") or None
    model_type = "mistral" if architecture == "llama" and sliding_window else architecture
    if sliding_window is not None and model_type != "mistral":
        raise InputError(f"{source.path}: {architecture} with a sliding window is not supported.")
    tokens = _special_tokens(source)
    config: dict[str, Any] = {
        "architectures": [_MODEL_CLASSES[model_type]],
        "model_type": model_type,
        "attention_bias": "blk.0.attn_q.bias" in source.tensors,
        "attention_dropout": 0.0,
        "bos_token_id": tokens.bos,
        "dtype": dtype,
        "eos_token_id": tokens.eos[0] if tokens.eos else None,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": keys.count("feed_forward_length"),
        "max_position_embeddings": keys.count("context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": keys.count("block_count"),
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "pad_token_id": tokens.pad,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_scaling": _rope_scaling(source, keys, head_dim),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "use_cache": True,
        "vocab_size": source.tensors["token_embd.weight"].shape[0],
    }
    if model_type == "mistral":
        config["sliding_window"] = keys.count("attention.sliding_window")
    if model_type.startswith("qwen"):
        config["use_sliding_window"] = False
    if model_type != "llama":
        del config["mlp_bias"]
    if model_type in ("mistral", "qwen2"):
        # qwen2 always has biases on q, k and v, mistral never; neither says so
        if config["attention_bias"] != (model_type == "qwen2"):
            raise InputError(
                f"{source.path}: has biases where {model_type} has none, or lacks the ones it has."
            )
        del config["attention_bias"]
    return config


def _special_tokens(source: GGUFFile) -> SpecialTokens:
    tokens = source.metadata.get("tokenizer.ggml.tokens")
    size = len(tokens) if isinstance(tokens, list) else 0
    rows = source.tensors["token_embd.weight"].shape[0]
    if size > rows:
        raise InputError(f"{source.path}: has {size} tokens and only {rows} embeddings; the file is damaged.")
    return special_tokens(source.metadata, size, str(source.path))


def _generation_config(source: GGUFFile) -> dict[str, Any]:
    tokens = _special_tokens(source)
    ends: Any = list(tokens.eos) if len(tokens.eos) > 1 else next(iter(tokens.eos), None)
    config = {"bos_token_id": tokens.bos, "eos_token_id": ends, "pad_token_id": tokens.pad}
    return {key: value for key, value in config.items() if value is not None}


def _rope_scaling(source: GGUFFile, keys: _Keys, head_dim: int) -> dict[str, Any] | None:
    """rope_scaling of config.json, or None for plain rope."""
    kind = keys.get("rope.scaling.type")
    if kind not in (None, "none", "linear", "yarn"):
        raise InputError(
            f"{source.path}: the rope scaling {str(kind)[:40]!r} is not supported (linear and yarn are)."
        )
    if _ROPE_FACTORS in source.tensors:
        if kind not in (None, "none"):
            raise InputError(f"{source.path}: has both {_ROPE_FACTORS} and a rope scaling of kind {kind}.")
        return _llama3_scaling(source, keys.number("rope.freq_base", 10000.0), head_dim)
    if kind in (None, "none"):
        return None
    factor = keys.number("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.count("rope.scaling.original_context_length"),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    if attention_factor != 1.0:
        # llama.cpp multiplies its factor with YaRN's own; transformers' replaces it
        scaling["attention_factor"] = attention_factor * (0.1 * float(np.log(factor)) + 1.0)
    return scaling


def _llama3_scaling(source: GGUFFile, base: float, head_dim: int) -> dict[str, Any]:
    """The llama3 parameters that give the divisors in `rope_freqs.weight`.

    A GGUF file has only the result: wavelength / divisor, where the divisor is 1 for wavelengths below
    context / high_freq_factor, `factor` above context / low_freq_factor, and between them the reciprocal of
    (1 - t) / factor + t with t = (context / wavelength - low) / (high - low) (Llama 3.1's `apply_scaling`). Every
    released model has low = 1, high = 4 and a context of 8192; whether that is so here is checked, not assumed.
    """
    info = source.tensors[_ROPE_FACTORS]
    if info.shape != (head_dim // 2,):
        raise InputError(f"{source.path}: {_ROPE_FACTORS} has shape {info.shape}, not ({head_dim // 2},).")
    divisors = source.read(_ROPE_FACTORS).astype(np.float64)
    factor, low, high, context = float(divisors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    t = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - t) / factor + t)
    if not np.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise InputError(
            f"{source.path}: {_ROPE_FACTORS} holds divisors that Llama 3's rope scaling (low 1, high 4, context 8192) "
            "does not give; convert from the original Hugging Face folder instead."
        )
    return {
        "rope_type": "llama3",
        "factor": float(str(np.float32(factor))),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def tensor_targets(source: GGUFFile, config: dict[str, Any]) -> dict[str, Target]:
    """GGUF tensor name -> `Target`, complete and checked: nothing is missing, left over, or of another shape.

    Raises:
      InputError: naming the first tensor that is.
    """
    layers = config["num_hidden_layers"]
    if layers > len(source.tensors):
        raise InputError(
            f"{source.path}: says it has {layers} layers and has {len(source.tensors)} tensors; it is damaged."
        )
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads, head_dim = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
    )
    halves = config["model_type"] in ("llama", "mistral")
    q = ("self_attn.q_proj", heads * head_dim, hidden, heads if halves else 0)
    k = ("self_attn.k_proj", kv_heads * head_dim, hidden, kv_heads if halves else 0)
    linears = {
        "attn_q": q,
        "attn_k": k,
        "attn_v": ("self_attn.v_proj", kv_heads * head_dim, hidden, 0),
        "attn_output": ("self_attn.o_proj", hidden, heads * head_dim, 0),
        "ffn_gate": ("mlp.gate_proj", ffn, hidden, 0),
        "ffn_up": ("mlp.up_proj", ffn, hidden, 0),
        "ffn_down": ("mlp.down_proj", hidden, ffn, 0),
    }
    norms = {"attn_norm": ("input_layernorm", hidden), "ffn_norm": ("post_attention_layernorm", hidden)}
    if config["model_type"] == "qwen3":
        norms |= {
            "attn_q_norm": ("self_attn.q_norm", head_dim),
            "attn_k_norm": ("self_attn.k_norm", head_dim),
        }
    if config["model_type"] == "qwen2":
        biased = ["attn_q", "attn_k", "attn_v"]
    else:
        biased = ["attn_q", "attn_k", "attn_v", "attn_output"] if config.get("attention_bias") else []

    targets = {"token_embd.weight": Target("model.embed_tokens.weight", (vocab, hidden))}
    for layer in range(layers):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        for name, (module, rows, columns, interleaved) in linears.items():
            targets[f"{ours}{name}.weight"] = Target(f"{theirs}{module}.weight", (rows, columns), interleaved)
            if name in biased:
                targets[f"{ours}{name}.bias"] = Target(f"{theirs}{module}.bias", (rows,), interleaved)
        for name, (module, size) in norms.items():
            targets[f"{ours}{name}.weight"] = Target(f"{theirs}{module}.weight", (size,))
    targets["output_norm.weight"] = Target("model.norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        targets["output.weight"] = Target("lm_head.weight", (vocab, hidden))

    for name, target in targets.items():
        if name not in source.tensors:
            raise InputError(f"{source.path}: lacks the tensor {name}; the file is no complete model.")
        if source.tensors[name].shape != target.shape:
            raise InputError(
                f"{source.path}: {name} has shape {source.tensors[name].shape} where its metadata say {target.shape}."
            )
    left_over = [name for name in source.tensors if name not in targets and name != _ROPE_FACTORS]
    if left_over:
        raise InputError(
            f"{source.path}: has {len(left_over)} tensors that {config['model_type']} does not use ({left_over[0]!r} "
            "is the first); converting would change the model."
        )
    return targets
