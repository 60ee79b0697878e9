"""Hostile and broken files by kind: {what is wrong with it: content}. Each has to be refused."""

import json
import struct

DEEP = 50_000

MESSAGES = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
JSONL = {
    "empty": "",
    "only blanks": "\n \n\t\n",
    "no JSON": "hello\n",
    "half a row": MESSAGES[:40],
    "second row broken": MESSAGES + "\n{\n",
    "an array": "[1, 2]\n",
    "a number": "3\n",
    "null": "null\n",
    "nan": '{"text": NaN}\n',
    "deep list": '{"text": ' + "[" * DEEP + "]" * DEEP + "}\n",
    "deep object": '{"a":' * DEEP + "1" + "}" * DEEP,
    "huge number": '{"text": ' + "9" * 100_000 + "}\n",
    "UTF-16": MESSAGES.encode("utf-16"),
    "Latin-1": '{"text": "é"}'.encode("latin-1"),
    "NUL bytes": b"\0" * 100,
    "gzip": b"\x1f\x8b\x08\x00" + bytes(range(256)),
    "half a surrogate": '{"text": "\\ud800"}\n',
    "surrogate in a message": MESSAGES.replace('"q"', '"\\udfff"'),
    "no known columns": '{"a": 1}\n',
    "messages is text": '{"messages": "q"}\n',
    "messages of numbers": '{"messages": [1, 2]}\n',
    "message without role": '{"messages": [{"content": "q"}]}\n',
    "unknown role": MESSAGES.replace("user", "root"),
    "role is a list": MESSAGES.replace('"user"', '["user"]'),
    "content is a number": MESSAGES.replace('"q"', "3"),
    "content is an object": MESSAGES.replace('"q"', '{"a": 1}'),
    "picture": MESSAGES.replace('"q"', '[{"type": "image_url", "image_url": "http://x"}]'),
    "content without text": MESSAGES.replace('"a"', "null"),
    "deep content": MESSAGES.replace('"q"', "[" * 90 + "]" * 90),
    "tools are a number": MESSAGES[:-1] + ', "tools": 3}',
    "tools are broken text": MESSAGES[:-1] + ', "tools": "[{"}',
    "tools of text": MESSAGES[:-1] + ', "tools": ["add"]}',
    "weight is text": MESSAGES[:-1] + ', "weight": "heavy"}',
    "weight is negative": MESSAGES[:-1] + ', "weight": -1}',
    "weight is infinite": MESSAGES[:-1] + ', "weight": Infinity}',
    "text is a list": '{"text": ["a"]}\n',
    "text is null": '{"text": null}\n',
    "formats mixed": '{"text": "a"}\n' + MESSAGES,
    "prompt without completion": '{"prompt": "a"}\n',
    "kinds mixed": '{"prompt": "a", "completion": ["b"]}\n',
    "turn of nobody": '{"conversations": [{"from": "nobody", "value": "a"}]}\n',
    "turn is text": '{"conversations": ["a", "b"]}\n',
    "nothing to train": '{"messages": [{"role": "user", "content": "q"}]}\n',
    "all empty": '{"text": ""}\n' * 3,
}


OTHER_FILES = {
    ".json": ["{", "3", "[1]", "[" * DEEP, b"\xff\xfe"],
    ".csv": ['text\n"open', "a,a\n1,2\n", "text\na,b\n", b"text\n\xff\n"],
    ".parquet": [b"PAR1", b"PAR1" + b"\xff" * 64 + b"PAR1", ""],
    ".txt": [b"\xff\xfe"],
    ".md": [""],
    ".pkl": [b"\x80\x04."],
    ".zip": [b"PK\x03\x04"],
}


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "empty": b"",
    "short": b"\0\0\0",
    "endless header": safetensors(b"{}", length=2**63),
    "negative as signed": safetensors(b"{}", length=2**64 - 1),
    "header beyond the file": safetensors(b"{}", length=3),
    "no JSON": safetensors(b"\xff" * 8),
    "list": safetensors([]),
    "deep": safetensors(b"[" * DEEP),
    "deep object": safetensors(b'{"a":' * DEEP),
    "duplicate": safetensors(b'{"w": {}, "w": {}}'),
    "metadata is a list": safetensors({"__metadata__": [1]}),
    "entry is text": safetensors({"w": "F32"}),
    "no dtype": safetensors({"w": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "dtype of nowhere": safetensors({"w": entry(dtype="F31")}, b"\0" * 8),
    "dtype is a list": safetensors({"w": entry(dtype=["F32"])}, b"\0" * 8),
    "shape is text": safetensors({"w": entry() | {"shape": "2"}}, b"\0" * 8),
    "shape of booleans": safetensors({"w": entry((True, True))}, b"\0" * 8),
    "huge shape": safetensors({"w": entry((2**62, 2**62))}, b"\0" * 8),
    "negative shape": safetensors({"w": entry((-2,))}, b"\0" * 8),
    "shape with a fraction": safetensors({"w": entry((2.0,))}, b"\0" * 8),
    "offsets the wrong way": safetensors({"w": entry(begin=8, end=0)}, b"\0" * 8),
    "negative offsets": safetensors({"w": entry(begin=-8)}, b"\0" * 8),
    "offsets beyond": safetensors({"w": entry((200,), end=800)}, b"\0" * 8),
    "three offsets": safetensors({"w": entry() | {"data_offsets": [0, 8, 9]}}, b"\0" * 8),
    "overlap": safetensors({"v": entry(), "w": entry()}, b"\0" * 8),
    "hole": safetensors({"v": entry((1,), 0, 4), "w": entry((1,), 8, 12)}, b"\0" * 12),
    "more data than tensors": safetensors({"w": entry()}, b"\0" * 99),
    "number of many digits": safetensors(b'{"w": {"dtype": "F32", "shape": [' + b"9" * 9000 + b"]}}"),
    "pickle": b"\x80\x04\x95" + b"\0" * 60,
    "zip": b"PK\x03\x04" + b"\0" * 60,
}

INDEXES = {
    "empty": "",
    "no JSON": "{",
    "list": "[]",
    "no map": "{}",
    "map is a list": '{"weight_map": []}',
    "empty map": '{"weight_map": {}}',
    "file is a number": '{"weight_map": {"w": 3}}',
    "file is null": '{"weight_map": {"w": null}}',
    "parent": '{"weight_map": {"w": "../out/x.safetensors"}}',
    "absolute": '{"weight_map": {"w": "/etc/passwd"}}',
    "home": '{"weight_map": {"w": "~/x.safetensors"}}',
    "backslash": '{"weight_map": {"w": "..\\\\x.safetensors"}}',
    "dot": '{"weight_map": {"w": "."}}',
    "NUL": '{"weight_map": {"w": "a\\u0000b.safetensors"}}',
    "long name": '{"weight_map": {"w": "' + "x" * 5000 + '"}}',
    "pickle": '{"weight_map": {"w": "model.bin"}}',
    "missing shard": '{"weight_map": {"w": "model-1.safetensors"}}',
    "deep": '{"weight_map": ' + "[" * DEEP,
    "link": '{"weight_map": {"w": "link.safetensors"}}',
}

CONFIGS = {
    "empty": "",
    "list": "[]",
    "deep": "[" * DEEP,
    "not UTF-8": b"\xff{}",
    "no model type": "{}",
    "unknown family": {"model_type": "nonesuch"},
    "remote code": {"model_type": "nonesuch", "auto_map": {"AutoModel": "evil.Model"}},
    "text for a number": {"hidden_size": "large"},
    "negative size": {"hidden_size": -1},
    "zero heads": {"num_attention_heads": 0},
    "layers without end": {"num_hidden_layers": 10**12},
    "vocabulary without end": {"vocab_size": 10**15},
    "a fraction of a layer": {"num_hidden_layers": 1.5},
    "heads that do not divide": {"num_key_value_heads": 3},
    "infinite size": {"hidden_size": float("inf")},
    "size that is no number": {"hidden_size": float("nan")},
    "null size": {"intermediate_size": None},
    "rope of nowhere": {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
    "rope theta is text": {"rope_theta": "big", "rope_parameters": None},
    "infinite eps": {"rms_norm_eps": float("inf")},
    "activation of nowhere": {"hidden_act": "mystery"},
    "list for a flag": {"tie_word_embeddings": [1]},
    "quantised by nobody": {"quantization_config": {"quant_method": "mystery"}},
}

JOBS = {
    "tabs": "model:\n\tx: 1",
    "list": "- a\n- b",
    "number": "3",
    "python object": "model: !!python/object/apply:os.system ['touch x']",
    "python name": "model: !!python/name:os.system",
    "python module": "!!python/module:os {}",
    "anchors": "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(50)),
    "laughs": "a: &a ['x','x','x','x','x','x','x','x','x']\n"
    + "".join(
        f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "recursive": "&a [*a]",
    "recursive mapping": "model: x\ndata: &a {path: *a}",
    "deep": "[" * 3000 + "]" * 3000,
    "deep mapping": "{a: " * 3000 + "}" * 3000,
    "doubled key": "model: a\nmodel: b",
    "unknown key": "modle: a",
    "key of a list": "? [a]\n: b",
    "date that is none": "model: 2024-99-99",
    "NUL": b"model: \0",
    "not UTF-8": b"model: \xff",
    "empty": "",
    "two documents": "model: a\n---\nmodel: b",
    "wrong types": "model: [a]",
    "number for a list": "model: a\nnew_tokens: 3",
    "negative rank": "model: a\nlora: {rank: -1}",
    "rate of text": "model: a\ntrain: {learning_rate: fast}",
    "mixture of text": "model: a\ndata: {mixture: [a, b]}",
    "weight of nothing": "model: a\ndata: {mixture: [{path: a, weight: 0}]}",
    "roles of nobody": "model: a\ndata: {loss_on: [robot]}",
    "length of a million digits": "model: a\ndata: {max_length: " + "9" * 10**5 + "}",
    "merge key of text": "model: a\n<<: b",
}


def gguf(version=3, tensors=0, pairs=0, rest=b"", magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, pairs) + rest


def string(text):
    return struct.pack("<Q", len(text)) + text


GGUF = {
    "empty": b"",
    "short": b"GGUF",
    "another magic": gguf(magic=b"GGML"),
    "version 1": gguf(version=1),
    "big-endian": gguf(version=3 << 24),
    "tensors without end": gguf(tensors=2**63),
    "pairs without end": gguf(pairs=2**62),
    "key without end": gguf(pairs=1, rest=struct.pack("<Q", 2**60) + b"\0" * 30),
    "key that is not UTF-8": gguf(pairs=1, rest=string(b"\xff\xfe") + struct.pack("<IB", 0, 1) + b"\0" * 8),
    "unknown value": gguf(pairs=1, rest=string(b"a") + struct.pack("<I", 99) + b"\0" * 16),
    "array without end": gguf(pairs=1, rest=string(b"a") + struct.pack("<IIQ", 9, 4, 2**61) + b"\0" * 16),
    "array of arrays": gguf(pairs=1, rest=string(b"a") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 16),
    "strings without end": gguf(pairs=1, rest=string(b"a") + struct.pack("<IIQ", 9, 8, 2**60) + b"\0" * 16),
    "doubled key": gguf(pairs=2, rest=(string(b"a") + struct.pack("<II", 4, 1)) * 2 + b"\0" * 16),
    "alignment of zero": gguf(
        pairs=1, rest=string(b"general.alignment") + struct.pack("<II", 4, 0) + b"\0" * 16
    ),
    "dimensions without end": gguf(tensors=1, rest=string(b"w") + struct.pack("<I", 2**31) + b"\0" * 64),
    "shape without end": gguf(
        tensors=1, rest=string(b"w") + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0) + b"\0" * 64
    ),
    "tensor of another type": gguf(
        tensors=1, rest=string(b"w") + struct.pack("<IQIQ", 1, 32, 77, 0) + b"\0" * 64
    ),
    "tensor beyond the file": gguf(
        tensors=1, rest=string(b"w") + struct.pack("<IQIQ", 1, 32, 0, 2**40) + b"\0" * 64
    ),
    "tensor of no elements": gguf(
        tensors=1, rest=string(b"w") + struct.pack("<IQIQ", 1, 0, 0, 0) + b"\0" * 64
    ),
    "nothing in it": gguf() + b"\0" * 32,
}
