"""Hugging Face tokenizer files from a GGUF file's `tokenizer.*` metadata.

GGUF keeps the vocabulary, the merges and the special token numbers, and names the pre-tokenizer
(`tokenizer.ggml.pre`) instead of describing it. `PRE_TOKENIZERS` describes the named ones as the original
tokenizer.json files do, which is what the models were trained with. Two vocabularies are read:

* `gpt2`: byte-level BPE; tokens are spelled in GPT-2's printable byte alphabet, merges are listed.
* `llama`: SentencePiece BPE with byte fallback; tokens are spelled with U+2581 for a space, and the merges are
  recovered from the vocabulary: any two tokens whose concatenation is a token, best score first.

Only the `tokenizers` package is used; neither torch nor the `gguf` package is needed.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pronghorn.errors import InputError

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_LONGEST_PIECE = 1024  # the merges of a SentencePiece token cost its length squared to find

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before BPE.

    Attributes:
      pattern: the regular expression of the words; None is GPT-2's own, built into `ByteLevel`.
      single_digits: every digit is a word of its own, cut before the pattern is applied.
      ignore_merges: a word that is itself a token is not merged from bytes.
      nfc: the text is brought to Unicode NFC first.
      add_bos: whether a file that does not say so begins every text with the bos token.
    """

    pattern: str | None = None
    single_digits: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False


_LLAMA3_PRE = PreTokenizer(_LLAMA3, ignore_merges=True, add_bos=True)
_QWEN2_PRE = PreTokenizer(_QWEN2, nfc=True)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "qwen2": _QWEN2_PRE,
    "deepseek-r1-qwen": _QWEN2_PRE,
    "tekken": PreTokenizer(_TEKKEN, ignore_merges=True, add_bos=True),
}


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Token numbers; `eos` lists every token that ends an answer, the tokenizer's eos first."""

    bos: int | None
    eos: tuple[int, ...]
    unk: int | None
    pad: int | None


def special_tokens(metadata: Mapping[str, Any], vocabulary_size: int, source: str) -> SpecialTokens:
    """The special token numbers of the metadata, each checked against the vocabulary.

    Raises:
      InputError: a number is none, or lies outside the vocabulary.
    """

    def number(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None or value == 0xFFFFFFFF:  # the writer's "none"
            return None
        if type(value) is not int or not 0 <= value < vocabulary_size:
            raise InputError(
                f"{source}: tokenizer.ggml.{name}_token_id is {value!r}, outside the vocabulary of "
                f"{vocabulary_size}; the file is damaged or was written by a faulty converter."
            )
        return value

    ends = [number(name) for name in ("eos", "eot", "eom")]
    return SpecialTokens(
        bos=number("bos"),
        eos=tuple(dict.fromkeys(end for end in ends if end is not None)),
        unk=number("unknown"),
        pad=number("padding"),
    )


def tokenizer_files(metadata: Mapping[str, Any], source: str) -> dict[str, str]:
    """The files of a Hugging Face tokenizer.

    Args:
      metadata: of a `GGUFFile`.
      source: the file's name, for messages.

    Returns:
      File name -> content: tokenizer.json, tokenizer_config.json, and where the file has chat templates
      chat_template.jinja and additional_chat_templates/NAME.jinja.

    Raises:
      InputError: the tokenizer is missing, inconsistent, or of a kind that is not supported.
    """
    tokens = _strings(metadata, "tokenizer.ggml.tokens", source)
    if len(set(tokens)) != len(tokens):
        repeated = collections.Counter(tokens).most_common(1)[0][0]
        raise InputError(f"{source}: the token {repeated!r} occurs twice in tokenizer.ggml.tokens.")
    kinds = metadata.get("tokenizer.ggml.token_type")
    kinds = [1] * len(tokens) if kinds is None else [int(kind) for kind in kinds]
    if len(kinds) != len(tokens):
        raise InputError(
            f"{source}: has {len(tokens)} tokens and {len(kinds)} token types; the file is damaged."
        )
    special = special_tokens(metadata, len(tokens), source)

    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(metadata, tokens, source)
    elif model == "llama":
        tokenizer, add_bos = _sentencepiece(metadata, tokens, special, source), True
    else:
        raise InputError(
            f"{source}: the tokenizer model {model!r} is not supported (gpt2 and llama are); "
            "convert from the original Hugging Face folder instead."
        )
    # the numbers of added tokens are those they already have in the vocabulary
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == _CONTROL or (kind == _UNKNOWN and model == "llama"):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])

    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)) and special.bos is not None
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and bool(special.eos)
    _set_template(tokenizer, tokens, special, add_bos=add_bos, add_eos=add_eos)
    config: dict[str, Any] = {
        # the generic class: it takes tokenizer.json as it is, where the classes named after models rebuild parts
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "bos_token": None if special.bos is None else tokens[special.bos],
        "eos_token": tokens[special.eos[0]] if special.eos else None,
        "unk_token": None if special.unk is None else tokens[special.unk],
        "pad_token": None if special.pad is None else tokens[special.pad],
        "clean_up_tokenization_spaces": False,
    }
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if type(context) is int:
        config["model_max_length"] = context
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
    return files | _chat_templates(metadata, source)


def _strings(metadata: Mapping[str, Any], key: str, source: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value:
        raise InputError(f"{source}: has no list {key}; a GGUF file with its own tokenizer is needed.")
    return value


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], source: str) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre")
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        what = "has no tokenizer.ggml.pre" if name is None else f"names the pre-tokenizer {name!r}"
        raise InputError(
            f"{source}: {what}, and without a known one ({', '.join(PRE_TOKENIZERS)}) text would be cut differently "
            "than in training; convert from the original Hugging Face folder instead."
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = []
    for line in _strings(metadata, "tokenizer.ggml.merges", source):
        left, gap, right = line.partition(" ")
        if not gap or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise InputError(
                f"{source}: the merge {line!r} does not join two tokens to a third; the file is damaged."
            )
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges))
    prefix_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=pre.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, pre.add_bos


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], special: SpecialTokens, source: str
) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise InputError(
            f"{source}: has no score for every token (tokenizer.ggml.scores); the file is damaged."
        )
    if max(map(len, tokens)) > _LONGEST_PIECE:
        raise InputError(f"{source}: has a token of over {_LONGEST_PIECE} letters; the file is damaged.")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    found = []
    for number, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                found.append((-float(scores[number]), number, left, right))
    merges = [(tokens[left], tokens[right]) for _, _, left, right in sorted(found)]
    unknown = None if special.unk is None else tokens[special.unk]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    # as Llama 2's tokenizer.json: the space in front goes before every text, one that begins with a space included
    spaces = normalizers.Replace(" ", "\u2581")
    prepend = [normalizers.Prepend("\u2581")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, spaces])
    steps: list[decoders.Decoder] = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if prefix_space:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _set_template(
    tokenizer: Tokenizer, tokens: list[str], special: SpecialTokens, *, add_bos: bool, add_eos: bool
) -> None:
    """Have the tokenizer itself put bos before and eos behind every text, where the file asks for it."""
    before = [special.bos] if add_bos and special.bos is not None else []
    after = [special.eos[0]] if add_eos else []
    if not before and not after:
        return

    def sequence(name: str, type_id: int) -> list[str]:
        parts = [*(tokens[i] for i in before), f"${name}", *(tokens[i] for i in after)]
        return [f"{part}:{type_id}" for part in parts]

    tokenizer.post_processor = processors.TemplateProcessing(
        single=sequence("A", 0),
        pair=sequence("A", 0) + sequence("B", 1),
        special_tokens=[(tokens[i], i) for i in dict.fromkeys(before + after)],
    )


def _chat_templates(metadata: Mapping[str, Any], source: str) -> dict[str, str]:
    files = {}
    for key, template in metadata.items():
        if key != "tokenizer.chat_template" and not key.startswith("tokenizer.chat_template."):
            continue
        name = key.removeprefix("tokenizer.chat_template").removeprefix(".")
        # the name becomes a file's name
        if not isinstance(template, str) or not re.fullmatch(r"[A-Za-z0-9_-]{0,64}", name):
            raise InputError(f"{source}: the chat template {key!r} has an unusable name or is no text.")
        files[f"additional_chat_templates/{name}.jinja" if name else "chat_template.jinja"] = template
    return files
