"""A corpus of hostile and broken files: each refused in one sentence, soon, and nothing outside its folder touched.

What is named here must be refused. Files of the second kind are valid ones with bytes changed, cut or put in: they are
refused, or read, and nothing else. Chat templates have a corpus of their own in data/test_chat_template.py.
"""

import json
import os
import sys
import time

import numpy as np
import pytest

from pronghorn.configuration import read_job
from pronghorn.converters.gguf import convert_gguf
from pronghorn.converters.huggingface import load_tokenizer, read_config
from pronghorn.converters.peft import adapter_tokenizer, load_adapter, save_adapter
from pronghorn.converters.quantized_weights import stored_quantization
from pronghorn.converters.safetensors_files import open_weights, read_header
from pronghorn.data import DataConfig, load_rows, tokenize_rows
from pronghorn.data.store import cached
from pronghorn.errors import InputError, RunError
from pronghorn.lora import LoRAConfig, add_lora
from pronghorn.models.decoder import Decoder
from pronghorn.models.families import family_for
from tests import tiny
from tests.converters import gguf_files
from tests.data.test_chat_template import HOSTILE as HOSTILE_TEMPLATES
from tests.hostile_files import (
    CONFIGS,
    DEEP,
    GGUF,
    HEADERS,
    INDEXES,
    JOBS,
    JSONL,
    MESSAGES,
    OTHER_FILES,
    entry,
    safetensors,
)
from tests.models.reference import tiny_decoder

SECONDS = 2.0
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Watch:
    """What a call opens, runs and connects to, by Python's audit events."""

    def __init__(self):
        self.active, self.root, self.found = False, "", []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if not self.active:
            return
        if event in ("subprocess.Popen", "os.system", "socket.connect", "os.exec", "pickle.find_class"):
            self.found.append(f"{event} {arguments!r:.80}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            inside = path.startswith(self.root + "/in/")
            secret = path.startswith((self.root + "/out", "/etc/passwd", "/etc/shadow"))
            if secret or (not inside and isinstance(arguments[2], int) and arguments[2] & _WRITES):
                self.found.append(f"open {path}")


WATCH = Watch()


def outcome(root, call):
    """None where the call refuses in one good sentence or goes through; else what is wrong with how it ends."""
    WATCH.root, WATCH.found, WATCH.active = os.path.realpath(root), [], True
    started, message, refused = time.process_time(), "", False
    try:
        call()
    except (InputError, RunError) as error:
        message, refused = str(error), isinstance(error, InputError)
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}", False
    finally:
        WATCH.active = False
    if time.process_time() - started > SECONDS:
        return f"took {time.process_time() - started:.1f} s", refused
    if WATCH.found:
        return f"touched {WATCH.found[:3]}", refused
    if refused and (not 10 < len(message) < 700 or "\n" in message or "Traceback" in message):
        return f"is told badly: {message[:300]!r}", refused
    return None, refused


def check(root, cases, *, must_refuse=True):
    """Run every case {name: call}; returns how many there were."""
    wrong = {}
    for name, call in cases.items():
        problem, refused = outcome(root, call)
        if problem is None and must_refuse and not refused:
            problem = "was taken"
        if problem is not None:
            wrong[name] = problem
    assert not wrong, "\n".join(f"{name}: {problem}" for name, problem in wrong.items())
    return len(cases)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/secret.jsonl").write_text('{"text": "secret"}\n')
    return tmp_path


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def garbled(data: bytes, count: int, seed: int) -> list[bytes]:
    """Copies of `data` with a few bytes changed, a piece cut out, doubled or put in, or the end gone."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        copy = bytearray(data)
        at, size = int(rng.integers(len(data))), int(rng.integers(1, 9))
        if i % 4 == 0:
            for place in rng.integers(0, len(data), size).tolist():
                copy[place] = int(rng.integers(256))
        elif i % 4 == 1:
            del copy[at:]
        elif i % 4 == 2:
            copy[at:at] = rng.bytes(size)
        else:
            copy[at : at + size] = [b"\xff" * size, b"\0" * size, b"9" * size][i // 4 % 3]
        made.append(bytes(copy))
    return made


def read_and_tokenize(path, **options):
    return lambda: tokenize_rows(load_rows(path), tiny.tiny_tokenizer(), DataConfig(max_length=64, **options))


def test_rows(root):
    folder, cases = root / "in", {}
    for number, (name, content) in enumerate(JSONL.items()):
        cases[name] = read_and_tokenize(write(folder, f"{number}.jsonl", content))
    for number, (ending, content) in enumerate(
        (ending, content) for ending, contents in OTHER_FILES.items() for content in contents
    ):
        cases[f"{ending} {content[:20]!r}"] = read_and_tokenize(write(folder, f"x{number}{ending}", content))
    (folder / "links").mkdir()
    (folder / "links/a.jsonl").symlink_to(root / "out/secret.jsonl")
    cases["link out of the folder"] = lambda: load_rows(folder / "links")
    cases["no such file"] = lambda: load_rows(str(folder / "none.jsonl"))
    cases["way out by name"] = lambda: load_rows("../out/none.jsonl")
    cases["hub name with a way out"] = lambda: load_rows("../../no-such-rows")
    (folder / "void").mkdir()
    cases["empty folder"] = lambda: load_rows(folder / "void")
    cases["device"] = lambda: load_rows("/dev/null")
    assert check(root, cases) >= 60


def test_garbled_rows(root):
    valid = (MESSAGES + "\n") * 3 + '{"messages": [{"role": "system", "content": "\\u00e9"}]}\n'
    copies = garbled(valid.encode(), 60, 1)
    cases = {
        f"{i}": read_and_tokenize(write(root / "in", f"{i}.jsonl", copy)) for i, copy in enumerate(copies)
    }
    check(root, cases, must_refuse=False)


def test_safetensors_headers(root):
    cases = {}
    for number, (name, content) in enumerate(HEADERS.items()):
        path = write(root / "in", f"{number}.safetensors", content)
        cases[name] = lambda path=path: read_header(path)
    valid = safetensors(
        {"__metadata__": {"format": "pt"}, "v": entry((2, 1)), "w": entry((1,), 8, 12)}, b"\1" * 12
    )
    check(root, cases)
    paths = [write(root / "in", f"g{i}.safetensors", copy) for i, copy in enumerate(garbled(valid, 60, 2))]
    copies = {f"garbled {path.name}": lambda path=path: read_header(path) for path in paths}
    check(root, copies, must_refuse=False)


def test_index_files(root):
    write(root / "out", "x.safetensors", safetensors({"w": entry()}, b"\0" * 8))
    cases = {}
    for number, (name, content) in enumerate(INDEXES.items()):
        folder = root / "in" / str(number)
        write(folder, "model.safetensors.index.json", content)
        (folder / "link.safetensors").symlink_to(root / "out/x.safetensors")
        cases[name] = lambda folder=folder: open_weights(folder)
    assert check(root, cases) >= 19


def test_model_configurations(root):
    from tests.converters.tiny_models import COMMON

    base = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6, **COMMON}
    cases = {}
    for number, (name, change) in enumerate(CONFIGS.items()):
        content = json.dumps(base | change) if isinstance(change, dict) else change
        folder = write(root / "in" / str(number), "config.json", content).parent

        def call(folder=folder):
            hf, _ = read_config(folder)
            stored_quantization(folder)
            Decoder.abstract(family_for(hf).config_from_hf(hf), layers="scanned")

        cases[name] = call
    assert check(root, cases) >= 20


def test_tokenizer_files(root):
    folder = root / "in" / "valid"
    tiny.tiny_tokenizer().save_pretrained(str(folder))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    valid = json.loads(files["tokenizer.json"])
    broken = {
        "empty": "",
        "no JSON": "{",
        "list": "[]",
        "number": "3",
        "deep": "[" * DEEP,
        "not UTF-8": b"\xff" + files["tokenizer.json"],
        "no model": json.dumps(valid | {"model": None}),
        "model of nowhere": json.dumps(valid | {"model": {"type": "Mystery"}}),
        "vocabulary of text": json.dumps(valid | {"model": valid["model"] | {"vocab": {"a": "b"}}}),
        "negative id": json.dumps(valid | {"model": valid["model"] | {"vocab": {"a": -1}}}),
        "merge of nothing": json.dumps(valid | {"model": valid["model"] | {"merges": [["zz", "qq"]]}}),
        "decoder of nowhere": json.dumps(valid | {"decoder": {"type": "Mystery"}}),
        "truncated": files["tokenizer.json"][: len(files["tokenizer.json"]) // 2],
    }
    cases = {}
    for number, (name, content) in enumerate(broken.items()):
        place = root / "in" / str(number)
        for file, data in files.items():
            write(place, file, data)
        write(place, "tokenizer.json", content)
        cases[name] = lambda place=place: load_tokenizer(place)
    for number, (name, content) in enumerate(
        {"list": "[]", "no JSON": "{", "unknown class": '{"tokenizer_class": "os.system"}'}.items()
    ):
        place = root / "in" / f"config{number}"
        write(place, "tokenizer.json", "{")
        write(place, "tokenizer_config.json", content)
        cases[f"configuration {name}"] = lambda place=place: load_tokenizer(place)
    load_tokenizer(folder)  # the import of transformers is not the files' doing
    assert check(root, cases) >= 15
    remote = root / "in" / "remote"
    for file, data in files.items():
        write(remote, file, data)
    settings = json.loads(files["tokenizer_config.json"])
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    write(remote, "tokenizer_config.json", json.dumps(settings))
    write(remote, "evil.py", f"open({str(root / 'out/done')!r}, 'w')")
    check(root, {"code beside it": lambda: load_tokenizer(remote)}, must_refuse=False)
    assert not (root / "out/done").exists()


def test_job_files(root):
    paths = [write(root / "in", f"{number}.yaml", content) for number, content in enumerate(JOBS.values())]
    cases = {name: lambda path=path: read_job(path) for name, path in zip(JOBS, paths, strict=True)}
    cases["override without a value"] = lambda: read_job(None, ["model"])
    cases["override into a value"] = lambda: read_job(None, ["model=a", "model.b=c"])
    cases["override of an object"] = lambda: read_job(None, ["model=!!python/name:os.system"])
    assert check(root, cases) >= 30


def test_adapters(root):
    model = tiny_decoder(tiny.tiny_config(), seed=0)
    adapter = root / "in" / "valid"
    save_adapter(add_lora(model, LoRAConfig(rank=2, targets=("q_proj",))), adapter)
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    config = json.loads(files["adapter_config.json"])

    def changed(**values):
        return json.dumps(config | values)

    configs = {
        "empty": "",
        "list": "[]",
        "deep": "[" * DEEP,
        "another kind": changed(peft_type="PROMPT_TUNING"),
        "rank of text": changed(r="two"),
        "rank of nothing": changed(r=0),
        "huge rank": changed(r=10**12),
        "alpha infinite": changed(lora_alpha=float("inf")),
        "alpha is a list": changed(lora_alpha=[1]),
        "dropout of two": changed(lora_dropout=2),
        "targets of numbers": changed(target_modules=[1]),
        "regular expression broken": changed(target_modules="("),
        "targets of nothing": changed(target_modules=["nonesuch"]),
        "pattern is a list": changed(rank_pattern=[1]),
        "pattern broken": changed(rank_pattern={"(": 2}),
        "layers of text": changed(layers_to_transform=["a"]),
        "modules to save": changed(modules_to_save=["lm_head"]),
        "start that changed the base": changed(init_lora_weights="pissa"),
        "unknown key": changed(mystery=1),
        "tokens of text": changed(trainable_token_indices=["a"]),
        "tokens that are negative": changed(trainable_token_indices=[-1]),
        "tokens without rows": changed(trainable_token_indices=[1, 2]),
        "tokens without end": changed(trainable_token_indices={"embed_tokens": [2**60]}),
        "task of another kind": changed(task_type="SEQ_CLS"),
    }
    others = {
        "weights empty": {"adapter_model.safetensors": b""},
        "weights of another model": {
            "adapter_model.safetensors": safetensors({"base_model.model.x": entry()}, b"\0" * 8),
            "pronghorn.json": b"{}",
        },
        "weights exchanged": {"adapter_model.safetensors": files["adapter_model.safetensors"][:-4] + b"abcd"},
        "manifest broken": {"pronghorn.json": b"{"},
        "manifest is a list": {"pronghorn.json": b"[]"},
        "base of another hash": {
            "pronghorn.json": json.dumps(
                json.loads(files["pronghorn.json"]) | {"base_hash": "v1-0-0-0"}
            ).encode()
        },
    }
    cases = {}
    for number, (name, content) in enumerate(configs.items()):
        place = root / "in" / f"c{number}"
        for file, data in files.items():
            write(place, file, data)
        write(place, "adapter_config.json", content)
        cases[name] = lambda place=place: load_adapter(model, place)
    for number, (name, changes) in enumerate(others.items()):
        place = root / "in" / f"o{number}"
        for file, data in (files | changes).items():
            write(place, file, data)
        cases[name] = lambda place=place: load_adapter(model, place)
    link = root / "in" / "link"
    for file, data in files.items():
        if file != "adapter_model.safetensors":
            write(link, file, data)
    write(root / "out", "weights", files["adapter_model.safetensors"])
    (link / "adapter_model.safetensors").symlink_to(root / "out/weights")
    cases["link out of the folder"] = lambda: load_adapter(model, link)
    pickled = root / "in" / "pickled"
    write(pickled, "adapter_config.json", files["adapter_config.json"])
    write(pickled, "adapter_model.bin", b"\x80\x04cos\nsystem\n.")
    cases["pickled"] = lambda: load_adapter(model, pickled)
    cases["nothing there"] = lambda: adapter_tokenizer(root / "in" / "none", None)
    assert check(root, cases) >= 30


def test_gguf_files(root):
    folder = root / "in"

    def converting(number, content):
        path = write(folder, f"{number}.gguf", content)
        return lambda: convert_gguf(path, folder / f"converted{number}")

    assert check(root, {name: converting(name, content) for name, content in GGUF.items()}) >= 20
    gguf_files.write_model(folder / "valid.gguf")
    valid = (folder / "valid.gguf").read_bytes()
    copies = garbled(valid[:6000], 40, 3)
    cases = {f"garbled {i}": converting(i, copy + valid[6000:]) for i, copy in enumerate(copies)}
    check(root, cases, must_refuse=False)


def test_cached_sets(root):
    folder = root / "in" / "cache"
    contents = ["", "[]", "{", '{"sizes": {}}', '{"sizes": {"tokens": -1}, "format": {}}', "[" * DEEP]
    for number, content in enumerate(contents):
        write(folder / f"k{number}", "meta.json", content)

    def refuse(arrays):
        raise InputError("asked to make the set anew, as it should be")

    cases = {c[:20]: lambda n=n: cached(folder, f"k{n}", refuse) for n, c in enumerate(contents)}
    check(root, cases)


def test_there_are_at_least_two_hundred_cases_that_must_be_refused():
    named = [JSONL, HEADERS, INDEXES, CONFIGS, JOBS, GGUF, HOSTILE_TEMPLATES]
    assert sum(map(len, named)) >= 200
