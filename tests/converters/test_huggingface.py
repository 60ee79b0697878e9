"""Hugging Face folders in and out: equal logits, equal bits, and one sentence for whatever is wrong."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.converters import sources
from pronghorn.converters.huggingface import load, load_model, load_tokenizer, resolve_model_path, save_model
from pronghorn.converters.safetensors_files import (
    INDEX_NAME,
    StoredTensor,
    TensorSpec,
    open_weights,
    write_weights,
)
from pronghorn.errors import InputError, RunError
from pronghorn.lora import LoRAConfig, add_lora
from pronghorn.models.decoder import Decoder
from pronghorn.models.parameters import named_parameters
from tests.converters import tiny_models
from tests.tolerances import MODEL_LOGITS

KINDS = [(family, tied) for family in ("llama", "qwen2", "mistral") for tied in (False, True)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{(family, tied, dtype): folder}."""
    root = tmp_path_factory.mktemp("bases")
    folders = {}
    for family, tied in KINDS:
        for dtype in ("float32", "bfloat16"):
            model = tiny_models.make(family, tied=tied, dtype=dtype)
            folders[family, tied, dtype] = tiny_models.save(model, root / f"{family}-{tied}-{dtype}")
    return folders


@pytest.fixture
def base(bases, tmp_path):
    """A copy of the untied fp32 llama, to be spoilt."""
    return shutil.copytree(bases["llama", False, "float32"], tmp_path / "base")


def bits(folder):
    return {name: (str(t.dtype), t.shape, t.read().tobytes()) for name, t in open_weights(folder).items()}


def rewrite(folder, change):
    """Write the tensors of `folder` again after `change(dict of arrays)`."""
    arrays = {name: tensor.read() for name, tensor in open_weights(folder).items()}
    change(arrays)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    write_weights(folder, specs, arrays.__getitem__)


def refusal(function, *arguments, **options):
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_logits_are_those_of_transformers(bases, family, tied):
    import torch
    import transformers

    folder = bases[family, tied, "float32"]
    reference = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    expected = tiny_models.logits(reference, tiny_models.prompt())
    for layers in ("unrolled", "scanned") if tied else ("unrolled",):
        model = load_model(folder, layers=layers)
        assert model.dtype == jnp.float32 and (model.lm_head is None) == tied
        assert np.abs(tiny_models.ours(model, tiny_models.prompt()) - expected).max() <= MODEL_LOGITS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_saving_keeps_every_bit_and_the_config_its_bytes(bases, tmp_path, family, tied, dtype):
    folder = bases[family, tied, dtype]
    for layers in ("unrolled", "scanned"):
        save_model(load_model(folder, layers=layers), tmp_path / layers)
        assert bits(tmp_path / layers) == bits(folder)
        for name in ("config.json", "generation_config.json"):
            assert (tmp_path / layers / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_is_saved(bases, tmp_path, tied):
    import torch
    import transformers

    folder = bases["qwen2", tied, "bfloat16"]
    save_model(load_model(folder), tmp_path / "out", max_shard_bytes=9000)
    assert (tmp_path / "out" / INDEX_NAME).is_file()
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype="auto")
        for path in (folder, tmp_path / "out")
    ]
    states = [model.state_dict() for model in models]
    assert models[1].dtype == torch.bfloat16 and states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_sharded_checkpoint_of_transformers_is_read(bases, tmp_path):
    folder = tiny_models.save(tiny_models.make("llama"), tmp_path / "sharded", max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert bits(folder) == bits(bases["llama", False, "float32"])
    save_model(load_model(folder), tmp_path / "out")
    assert bits(tmp_path / "out") == bits(folder)


def test_loading_into_stacks_holds_one_tensor_and_what_is_read_ahead(bases, monkeypatch):
    import weakref

    monkeypatch.setattr("pronghorn.converters.read_ahead.BUDGET_BYTES", 1)  # one tensor

    original, alive, most = StoredTensor.read, [], []

    def read(tensor):
        most.append(sum(reference() is not None for reference in alive))
        array = original(tensor)
        alive.append(weakref.ref(array))
        return array

    monkeypatch.setattr(StoredTensor, "read", read)
    load_model(bases["llama", False, "float32"], layers="scanned", dtype="bfloat16")
    assert len(most) == 30 and max(most) <= 2


def test_a_dtype_casts_every_weight_once(bases, tmp_path):
    folder = bases["llama", False, "float32"]
    model = load_model(folder, dtype="bfloat16")
    assert model.dtype == jnp.bfloat16 and model.source.dtype == "float32"
    stored = open_weights(folder)["model.layers.2.mlp.up_proj.weight"].read()
    value = named_parameters(model)["layers.2.mlp.up_proj.weight"].get()
    assert value.dtype == jnp.bfloat16 and np.array_equal(np.asarray(value), stored.astype(jnp.bfloat16))
    save_model(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    save_model(load_model(folder), tmp_path / "cast", dtype="bfloat16")
    assert bits(tmp_path / "cast") == bits(tmp_path / "out")


def test_a_checkpoint_of_mixed_dtypes_keeps_them(base, tmp_path):
    def change(arrays):
        for name in arrays:
            if "norm" not in name:
                arrays[name] = arrays[name].astype(jnp.bfloat16)

    rewrite(base, change)
    tiny_models.edit_json(base / "config.json", dtype="bfloat16")
    for layers in ("unrolled", "scanned"):
        model = load_model(base, layers=layers)
        assert model.dtype == jnp.bfloat16
        save_model(model, tmp_path / layers)
        assert bits(tmp_path / layers) == bits(base)


def test_a_value_that_float16_cannot_hold_is_refused(base, tmp_path):
    rewrite(base, lambda arrays: arrays["model.layers.0.mlp.up_proj.weight"].__setitem__((0, 0), 1e6))
    assert "65504" in refusal(load_model, base, dtype="float16")
    assert "65504" in refusal(save_model, load_model(base), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_source_is_written_as_transformers_reads_it(bases, tmp_path):
    import torch
    import transformers

    origin = load_model(bases["mistral", False, "float32"])
    model = Decoder(origin.config, dtype=jnp.float32)
    save_model(model, tmp_path / "out")
    reference = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype="auto").eval()
    assert reference.dtype == torch.float32
    difference = tiny_models.logits(reference, tiny_models.prompt()) - tiny_models.ours(
        model, tiny_models.prompt()
    )
    assert np.abs(difference).max() <= MODEL_LOGITS


def test_tokenizer_template_and_licence_are_carried_byte_for_byte(base, tmp_path):
    tiny_models.add_tokenizer(base)
    (base / "LICENSE.txt").write_text("a licence")
    (base / "secret.txt").write_text("not the model's")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    model, tokenizer = load(base, dtype=None)
    save_model(model, tmp_path / "out", tokenizer_from=tokenizer)
    carried = [
        "LICENSE.txt",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted([*carried, "config.json", "model.safetensors", "pronghorn.json"])
    again = load_tokenizer(tmp_path / "out")
    messages = [{"role": "user", "content": "w1 w2"}]
    assert again.apply_chat_template(messages, tokenize=False) == "<user>w1 w2</s>"


def test_a_link_to_a_file_outside_is_not_carried(base, tmp_path):
    tiny_models.add_tokenizer(base)
    (tmp_path / "passwords").write_text("secret")
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.jinja").symlink_to(tmp_path / "passwords")
    assert "link" in refusal(save_model, load_model(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer_gives_none(bases):
    assert load(bases["llama", True, "float32"])[1] is None


def test_a_broken_tokenizer_is_refused_in_words(base):
    tiny_models.add_tokenizer(base)
    (base / "tokenizer.json").write_text('{"model": 3}')
    assert "tokenizer" in refusal(load_tokenizer, base)


def test_a_source_that_is_gone_is_not_forgotten_silently(base, tmp_path):
    tiny_models.add_tokenizer(base)
    model, tokenizer = load(base, dtype=None)
    shutil.rmtree(base)
    assert "tokenizer_from" in refusal(save_model, model, tmp_path / "out")
    save_model(model, tmp_path / "out", tokenizer_from=tokenizer)
    assert load_tokenizer(tmp_path / "out").chat_template == tokenizer.chat_template


# What is refused on the way in.


def drop(name):
    return lambda arrays: arrays.pop(name)


def add(name, shape):
    return lambda arrays: arrays.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), "lack model.layers.1.mlp.up_proj.weight"),
        (drop("lm_head.weight"), "lack lm_head.weight"),
        (add("model.layers.3.mlp.up_proj.weight", (48, 32)), "have model.layers.3.mlp.up_proj.weight"),
        (add("model.layers.1.self_attn.q_proj.bias", (32,)), "have model.layers.1.self_attn.q_proj.bias"),
        (add("model.layers.1.mlp.up_proj.weight", (32, 48)), "shape [32, 48]"),
        (add("model.embed_tokens.weight", (99, 32)), "99 rows and config.json says vocab_size 97"),
        (
            lambda arrays: arrays.update({"model.norm.weight": np.zeros(32, np.uint8)}),
            "dtype uint8",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(base, change, words):
    rewrite(base, change)
    assert words in refusal(load_model, base)


def test_rotary_buffers_and_a_tied_head_stored_twice_are_accepted(bases, tmp_path):
    folder = shutil.copytree(bases["llama", True, "float32"], tmp_path / "tied")
    original = bits(folder)

    def change(arrays):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    rewrite(folder, change)
    save_model(load_model(folder), tmp_path / "out")
    assert bits(tmp_path / "out") == original
    rewrite(folder, lambda arrays: arrays["lm_head.weight"].__setitem__((3, 3), 9.0))
    assert '"tie_word_embeddings": false' in refusal(load_model, folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not valid JSON"), ("[]", "no JSON object"), ("\udcff", "UTF-8"), (None, "no such file")],
)
def test_a_broken_config_is_refused(base, text, words):
    (base / "config.json").unlink()
    if text is not None:
        (base / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert words in refusal(load_model, base)


def test_remote_code_and_unknown_architectures_are_refused(base):
    tiny_models.edit_json(base / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "auto_map" in refusal(load_model, base)
    tiny_models.edit_json(base / "config.json", auto_map=None, model_type="mamba")
    assert "mamba" in refusal(load_model, base)


def test_an_adapter_folder_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "base model" in refusal(load_model, tmp_path)


@pytest.mark.parametrize(
    "option", [{"dtype": "int8"}, {"dtype": "bf16"}, {"layers": "rolled"}, {"quantization": "nf3"}]
)
def test_an_unknown_option_is_refused(base, option):
    assert next(iter(option.values())) in refusal(load, base, **option)


# What is refused on the way out.


def test_a_model_with_an_adapter_is_not_saved_without_it(bases, tmp_path):
    model = add_lora(load_model(bases["llama", False, "float32"]), LoRAConfig(rank=2, targets=("q_proj",)))
    assert "save_merged" in refusal(save_model, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_our_own_files_are_replaced(bases, tmp_path):
    model, out = load_model(bases["llama", False, "float32"]), tmp_path / "out"
    save_model(model, out, max_shard_bytes=9000)
    save_model(model, out)
    assert not (out / INDEX_NAME).exists() and (out / "model.safetensors").is_file()
    (out / "notes.txt").write_text("mine")
    assert "not empty" in refusal(save_model, model, out)
    save_model(model, out, overwrite=True)
    assert not (out / "notes.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_save_that_fails_half_way_leaves_the_old_folder(bases, tmp_path, monkeypatch):
    model, out = load_model(bases["llama", False, "float32"]), tmp_path / "out"
    save_model(model, out)
    before = bits(out)

    def full(*arguments, **options):
        raise RunError("the disk is full")

    monkeypatch.setattr("pronghorn.converters.huggingface.write_weights", full)
    with pytest.raises(RunError):
        save_model(model, out)
    assert bits(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_save_leaves_nothing_under_the_asked_name(bases, tmp_path):
    """kill -9 after half of the weights: the name does not exist, and a second save succeeds."""
    import subprocess
    import sys

    code = """
import os, signal, sys
from pronghorn.converters import huggingface, safetensors_files
write_file, calls = safetensors_files.write_file, []
def dying(*arguments, **options):
    write_file(*arguments, **options)
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
safetensors_files.write_file = dying
huggingface.save_model(huggingface.load_model(sys.argv[1]), sys.argv[2], max_shard_bytes=9000)
"""
    folder = bases["llama", False, "float32"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "out")], capture_output=True
    )
    assert done.returncode == -9
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
    save_model(load_model(folder), tmp_path / "out")
    assert bits(tmp_path / "out") == bits(folder)


# Names.


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "missing.gguf", "a/b/c", "~/nowhere"])
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(sources, "_hub_folder", lambda name: pytest.fail(f"asked the hub for {name!r}"))
    assert "no such file or folder" in refusal(resolve_model_path, name)


def test_a_file_that_is_no_model_and_an_empty_name_are_refused(base):
    assert "empty" in refusal(resolve_model_path, "")
    assert "is a file" in refusal(resolve_model_path, base / "config.json")


def hub_cache(root, folder):
    """`folder` laid out as the hub's cache does for the name org/tiny."""
    repository = root / "models--org--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    for path in folder.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


def test_a_cached_hub_name_is_used_without_a_network(bases, tmp_path, monkeypatch):
    import huggingface_hub

    folder = bases["llama", False, "float32"]
    snapshot = hub_cache(tmp_path, folder)
    original = huggingface_hub.snapshot_download

    def offline(name, *, local_files_only=False, **options):
        if not local_files_only:
            raise ConnectionError("no network")
        return original(name, local_files_only=True, cache_dir=tmp_path, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert resolve_model_path("org/tiny") == snapshot
    save_model(load_model("org/tiny"), tmp_path / "out")
    assert bits(tmp_path / "out") == bits(folder)
    assert "cannot be reached (ConnectionError)" in refusal(resolve_model_path, "org/other")
    (snapshot / "model.safetensors").unlink()  # a download that was cut short is not whole
    assert "cannot be reached" in refusal(resolve_model_path, "org/tiny")


def test_a_gguf_file_is_converted_once_into_the_cache(tmp_path, monkeypatch):
    calls = []

    def convert(path, folder, dtype):
        calls.append((path, dtype))
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pronghorn.converters.gguf.convert_gguf", convert)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    first = resolve_model_path(tmp_path / "m.gguf")
    assert resolve_model_path(tmp_path / "m.gguf") == first and first.is_relative_to(tmp_path / "cache")
    assert resolve_model_path(tmp_path / "m.gguf", gguf_dtype="float32") != first
    (tmp_path / "m.gguf").write_bytes(b"GGUF2")
    assert resolve_model_path(tmp_path / "m.gguf") != first
    assert [dtype for _, dtype in calls] == ["bfloat16", "float32", "bfloat16"]
