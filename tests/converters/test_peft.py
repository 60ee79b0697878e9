"""Adapters exchanged with PEFT: its adapters give its logits here, ours give our logits there."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from pronghorn.converters.huggingface import load, load_model
from pronghorn.converters.peft import load_adapter, save_adapter
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig, add_lora, merge, merge_lora, split
from pronghorn.lora_sites import sites
from tests.converters import tiny_models
from tests.tolerances import MODEL_LOGITS

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about tied weights and embeddings by design


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{(family, tied): folder}."""
    root = tmp_path_factory.mktemp("bases")
    return {
        key: tiny_models.save(tiny_models.make(key[0], tied=key[1]), root / f"{key[0]}-{key[1]}")
        for key in (("llama", False), ("llama", True), ("qwen2", True))
    }


@pytest.fixture(scope="module")
def plain_logits(bases):
    """{(family, tied): our logits without an adapter}."""
    return {key: tiny_models.ours(base_model(folder), tiny_models.prompt()) for key, folder in bases.items()}


@functools.cache
def base_model(folder, layers="unrolled"):
    """The model of a folder, loaded once: adding an adapter leaves it as it is."""
    return load_model(folder, layers=layers)


def transformers_model(folder):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def peft_made(base, folder, **options):
    """An adapter with random factors, made and saved by PEFT; returns its logits on the prompt."""
    import peft
    import torch

    torch.manual_seed(3)
    defaults = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    config = peft.LoraConfig(**(defaults | options))
    model = peft.get_peft_model(transformers_model(base), config).eval()
    model.save_pretrained(str(folder))
    return tiny_models.logits(model, tiny_models.prompt())


def peft_logits(base, adapter):
    import peft

    model = peft.PeftModel.from_pretrained(transformers_model(base), str(adapter)).eval()
    return tiny_models.logits(model, tiny_models.prompt())


def randomised(model, seed=5):
    """`model` with every adapter factor random, moving the weights by about a tenth, as training does."""
    graph, trainable, frozen = split(model)
    rng = np.random.default_rng(seed)
    trainable = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32), trainable)
    return merge(graph, trainable, frozen)


PEFT_CASES = {
    "all linears by name": (("llama", False), {"target_modules": list(ALL)}),
    "all-linear": (("llama", False), {"target_modules": "all-linear", "lora_dropout": 0.1}),
    "regular expression": (("llama", False), {"target_modules": r".*\.(0|2)\..*(q|down)_proj"}),
    "rsLoRA": (("llama", False), {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "patterns": (
        ("llama", False),
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "some layers": (
        ("llama", False),
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    ),
    "excluded": (
        ("llama", False),
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
    ),
    "head and embedding": (("llama", False), {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "tied head": (("llama", True), {"target_modules": ["q_proj", "lm_head"]}),
    "tied embedding": (("llama", True), {"target_modules": ["v_proj", "embed_tokens"]}),
    "tied head and embedding, biases": (
        ("qwen2", True),
        {"target_modules": ["k_proj", "lm_head", "embed_tokens"]},
    ),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_an_adapter_made_by_peft_gives_its_logits_here(bases, plain_logits, tmp_path, case):
    base, options = PEFT_CASES[case]
    expected = peft_made(bases[base], tmp_path, **options)
    model = load_adapter(base_model(bases[base]), tmp_path)
    actual = tiny_models.ours(model, tiny_models.prompt())
    assert np.abs(actual - expected).max() <= MODEL_LOGITS
    assert np.abs(plain_logits[base] - expected).max() > 100 * MODEL_LOGITS
    save_adapter(model, tmp_path / "again")
    assert_same_adapter(tmp_path, tmp_path / "again")


def assert_same_adapter(one, other):
    """Equal factors, bit for bit (base weights that PEFT stores beside them aside)."""
    a = safetensors.numpy.load_file(one / "adapter_model.safetensors")
    b = safetensors.numpy.load_file(other / "adapter_model.safetensors")
    a = {name: value for name, value in a.items() if "lora_" in name}
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


OUR_CASES = {
    "all-linear": (("llama", False), LoRAConfig(rank=4, alpha=6, dropout=0.1)),
    "rsLoRA with a fractional alpha": (("llama", False), LoRAConfig(rank=3, alpha=2.5, use_rslora=True)),
    "some layers": (("llama", False), LoRAConfig(rank=4, targets=("q_proj", "up_proj"), layers=(0, 2))),
    "pattern": (("llama", False), LoRAConfig(rank=4, targets=("layers.[01].mlp.*", "layers.2.self_attn.k_proj"))),
    "head and embedding": (("llama", False), LoRAConfig(rank=4, targets=("q_proj", "lm_head", "embed_tokens"))),
    "tied head": (("llama", True), LoRAConfig(rank=4, targets=("q_proj", "lm_head"))),
    "tied embedding": (("qwen2", True), LoRAConfig(rank=4, targets=("v_proj", "embed_tokens"))),
    "tied, both, some layers": (
        ("llama", True), LoRAConfig(rank=4, targets=("v_proj", "lm_head", "embed_tokens"), layers=(1,))
    ),
}  # fmt: skip


SCANNED = ("all-linear", "some layers", "head and embedding", "tied, both, some layers")


@pytest.mark.parametrize(
    ("case", "layers"),
    [*((case, "unrolled") for case in OUR_CASES), *((case, "scanned") for case in SCANNED)],
)
def test_our_adapter_gives_our_logits_in_peft(bases, tmp_path, case, layers):
    base, config = OUR_CASES[case]
    model = add_lora(base_model(bases[base], layers=layers), config)
    model = randomised(model)
    if config.layers is not None and layers == "scanned":
        model = zero_other_layers(model, config.layers)
    save_adapter(model, tmp_path)
    expected = tiny_models.ours(model, tiny_models.prompt())
    assert np.abs(peft_logits(bases[base], tmp_path) - expected).max() <= MODEL_LOGITS
    other = "unrolled" if layers == "scanned" else "scanned"
    save_adapter(load_adapter(base_model(bases[base], layers=other), tmp_path), tmp_path / "again")
    assert_same_adapter(tmp_path, tmp_path / "again")


def zero_other_layers(model, layers):
    """Undo `randomised` in the layers of a stack that have no adapter (training keeps them at zero)."""
    for site in sites(model).values():
        if site.index is not None and site.layer not in layers and site.factors is not None:
            for name in ("lora_A", "lora_B"):
                variable = getattr(site.module, name)
                variable.set_value(variable.get_value().at[site.index].set(0.0))
    return model


def test_the_configuration_says_how_the_adapter_was_made(bases, tmp_path):
    config = LoRAConfig(
        rank=4, alpha=8, targets=("q_proj", "up_proj"), dropout=0.1, use_rslora=True, layers=(0, 2)
    )
    save_adapter(add_lora(base_model(bases["llama", False]), config), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["q_proj", "up_proj"] and saved["layers_to_transform"] == [0, 2]
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"], saved["use_rslora"]) == (4, 8, 0.1, True)
    assert saved["base_model_name_or_path"] == str(bases["llama", False])
    assert type(saved["lora_alpha"]) is int
    model = load_adapter(base_model(bases["llama", False]), tmp_path)
    assert (model.adapter.rank, model.adapter.alpha, model.adapter.layers) == (4, 8.0, (0, 2))
    assert model.adapter.dropout == 0.1 and model.adapter.use_rslora
    manifest = json.loads((tmp_path / "pronghorn.json").read_text())
    assert manifest["base_hash"] == model.adapter.base_hash and len(manifest["sha256"]) == 64


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["v_proj", "lm_head"], ["embed_tokens"]])
def test_merging_equals_the_live_model_and_peft(bases, tmp_path, targets):
    import peft

    base = bases["llama", False]
    peft_made(base, tmp_path, target_modules=targets)
    live = load_adapter(base_model(base), tmp_path)
    merged = tiny_models.ours(merge_lora(live), tiny_models.prompt())
    assert np.abs(merged - tiny_models.ours(live, tiny_models.prompt())).max() <= 1e-5
    theirs = peft.PeftModel.from_pretrained(transformers_model(base), str(tmp_path)).merge_and_unload()
    assert np.abs(merged - tiny_models.logits(theirs, tiny_models.prompt())).max() <= MODEL_LOGITS


# What has to be refused.


def refusal(function, *arguments, **options):
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


@pytest.fixture
def adapter(bases, tmp_path):
    """A small adapter of ours for the untied llama."""
    model = add_lora(base_model(bases["llama", False]), LoRAConfig(rank=2, targets=("q_proj",)))
    return save_adapter(randomised(model), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "lacks one of its factors"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"peft_type": "IA3"}, "LORA"),
        ({"task_type": "SEQ_CLS"}, "CAUSAL_LM"),
        ({"init_lora_weights": "pissa"}, "changed the base"),
        ({"a_new_kind_of_lora": {"x": 1}}, "a_new_kind_of_lora"),
        ({"r": 0}, "r=0"),
        ({"r": None}, "r=None"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": "("}, "regular expression"),
        ({"target_modules": ["q_proj", "v_proj"]}, "incomplete"),
        ({"rank_pattern": {"q_proj": 3}}, "rank 3"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "disagree"),
    ],
)
def test_an_unusable_configuration_is_refused(bases, adapter, changes, words):
    tiny_models.edit_json(adapter / "adapter_config.json", **changes)
    assert words in refusal(load_adapter, base_model(bases["llama", False]), adapter)


def test_an_adapter_for_another_architecture_is_refused(bases, adapter, tmp_path):
    wide = tiny_models.save(tiny_models.make("llama", hidden_size=40, head_dim=8), tmp_path / "wide")
    assert "another model" in refusal(load_adapter, load_model(wide), adapter, check_base=False)
    assert "another base model" in refusal(load_adapter, load_model(wide), adapter)
    shallow = tiny_models.save(tiny_models.make("llama", num_hidden_layers=2), tmp_path / "shallow")
    assert "another model" in refusal(load_adapter, load_model(shallow), adapter)


def test_an_adapter_trained_on_other_weights_of_the_same_shapes_is_refused(bases, adapter, tmp_path):
    other = load_model(tiny_models.save(tiny_models.make("llama", seed=9), tmp_path / "other"))
    assert "another base model" in refusal(load_adapter, other, adapter)
    assert load_adapter(other, adapter, check_base=False).adapter.rank == 2


def test_the_base_is_known_again_in_bfloat16_and_scanned(bases, adapter):
    for options in ({"dtype": "bfloat16"}, {"layers": "scanned"}):
        assert load_adapter(load_model(bases["llama", False], **options), adapter).adapter.rank == 2


def test_a_damaged_adapter_is_refused(bases, adapter):
    path, model = adapter / "adapter_model.safetensors", base_model(bases["llama", False])
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "hash" in refusal(load_adapter, model, adapter)
    path.write_bytes(data[:-9])
    assert "damaged" in refusal(load_adapter, model, adapter)
    path.unlink()
    assert "adapter_model.safetensors" in refusal(load_adapter, model, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert "pickled" in refusal(load_adapter, model, adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert "JSON" in refusal(load_adapter, model, adapter)
    assert "no such folder" in refusal(load_adapter, model, adapter / "nowhere")


def test_values_that_are_not_finite_are_refused(bases, adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    next(iter(tensors.values()))[0, 0] = np.nan
    safetensors.numpy.save_file(tensors, path)
    (adapter / "pronghorn.json").unlink()
    assert "not finite" in refusal(load_adapter, base_model(bases["llama", False]), adapter)


def test_a_stored_embedding_that_is_not_the_models_is_refused(bases, tmp_path):
    peft_made(bases["llama", False], tmp_path, target_modules=["embed_tokens"])
    other = tiny_models.save(tiny_models.make("llama", seed=9), tmp_path / "other")
    assert "not this model's" in refusal(load_adapter, load_model(other), tmp_path)


def test_a_stack_refuses_layers_of_different_rank(bases, tmp_path):
    peft_made(bases["llama", False], tmp_path, target_modules=["q_proj"], rank_pattern={r"layers\.1\..*": 2})
    assert 'layers="unrolled"' in refusal(
        load_adapter, base_model(bases["llama", False], layers="scanned"), tmp_path
    )


def test_a_model_without_an_adapter_has_none_to_save(bases, tmp_path):
    assert "no adapter" in refusal(save_adapter, base_model(bases["llama", False]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_not_overwritten(bases, adapter, tmp_path):
    model = load_adapter(base_model(bases["llama", False]), adapter)
    save_adapter(model, adapter)  # our own, complete: replaced
    (adapter / "notes.txt").write_text("mine")
    assert "not empty" in refusal(save_adapter, model, adapter)
    assert (adapter / "notes.txt").read_text() == "mine"
    save_adapter(model, adapter, overwrite=True)
    assert not (adapter / "notes.txt").exists()


def test_a_changed_chat_template_travels_with_the_adapter(tmp_path):
    base = tiny_models.save(tiny_models.make("llama"), tmp_path / "base")
    tokenizer = tiny_models.add_tokenizer(base)
    model = add_lora(base_model(base), LoRAConfig(rank=2, targets=("q_proj",)))
    save_adapter(model, tmp_path / "same", tokenizer=tokenizer)
    assert not (tmp_path / "same/tokenizer.json").exists()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    save_adapter(model, tmp_path / "changed", tokenizer=tokenizer)
    _, loaded = load(base, adapter=tmp_path / "changed", dtype="float32")
    assert loaded.chat_template == tokenizer.chat_template
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "changed" / name).unlink(missing_ok=True)
    assert "chat template" in refusal(load, base, adapter=tmp_path / "changed", dtype="float32")


def test_a_bfloat16_adapter_becomes_fp32_masters(bases, adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = {k: v.astype(jnp.bfloat16) for k, v in safetensors.numpy.load_file(path).items()}
    safetensors.flax.save_file({k: jnp.asarray(v) for k, v in tensors.items()}, path)
    (adapter / "pronghorn.json").unlink()
    model = load_adapter(base_model(bases["llama", False]), adapter)
    a = sites(model)["layers.0.self_attn.q_proj"].factors.a
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert a.dtype == jnp.float32 and np.array_equal(np.asarray(a), tensors[key].astype(np.float32))
