"""A merged folder is the live model, and a bad merge never gets the name that was asked for."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.converters import merged as merging
from pronghorn.converters.huggingface import load, load_model
from pronghorn.converters.merged import KL_LIMITS, compare_models, save_merged
from pronghorn.errors import InputError, RunError
from pronghorn.lora import LoRAConfig, add_lora, merge, merge_lora, split
from pronghorn.models.parameters import named_parameters
from tests.converters import tiny_models
from tests.tolerances import MODEL_LOGITS

SMALL = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{tied: a folder with a tokenizer}."""
    root = tmp_path_factory.mktemp("bases")
    for tied in (False, True):
        tiny_models.save(tiny_models.make("llama", tied=tied, **SMALL), root / str(tied))
        tiny_models.add_tokenizer(root / str(tied))
    return {tied: root / str(tied) for tied in (False, True)}


def adapted(folder, config=None, *, scale=0.1, **options):
    """A model of `folder` with random adapter factors."""
    model = add_lora(
        load_model(folder, **options), config or LoRAConfig(rank=4, targets=("q_proj", "up_proj"))
    )
    graph, trainable, frozen = split(model)
    rng = np.random.default_rng(0)
    trainable = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), jnp.float32), trainable
    )
    return merge(graph, trainable, frozen)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_transformers_reads_the_merged_folder_and_gives_the_live_logits(bases, tmp_path, layers):
    import transformers

    _, tokenizer = load(bases[False], dtype=None)
    live = adapted(bases[False], layers=layers)
    report = save_merged(live, tokenizer, tmp_path / "out")
    reference = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out")).eval()
    expected = tiny_models.ours(live, tiny_models.prompt())
    assert np.abs(tiny_models.logits(reference, tiny_models.prompt()) - expected).max() <= MODEL_LOGITS
    assert report["kl_mean"] <= 1e-6 and report["kl_max"] <= 1e-4 and report["tokens"] == 500
    assert report["adapter_kl_mean"] > 1e-3 and report["top1_agreement"] == 1.0 and not report["untied"]
    assert json.loads((tmp_path / "out/merge_check.json").read_text()) == report
    assert (tmp_path / "out/config.json").read_bytes() == (bases[False] / "config.json").read_bytes()
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == (
        bases[False] / "chat_template.jinja"
    ).read_bytes()


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens", "q_proj")])
def test_a_tied_model_with_an_adapted_end_is_written_untied(bases, tmp_path, targets):
    import transformers

    live = adapted(bases[True], LoRAConfig(rank=4, targets=targets))
    report = save_merged(live, None, tmp_path / "out")
    assert report["untied"]
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    reference = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out")).eval()
    expected = tiny_models.ours(live, tiny_models.prompt())
    assert np.abs(tiny_models.logits(reference, tiny_models.prompt()) - expected).max() <= MODEL_LOGITS


def test_a_bfloat16_merge_passes_its_own_limit_and_rounds_once(bases, tmp_path):
    live = adapted(bases[False], dtype="bfloat16")
    report = save_merged(live, None, tmp_path / "out")
    assert report["dtype"] == "bfloat16" and 0 < report["kl_mean"] <= report["kl_mean_limit"]
    name = "layers.1.mlp.up_proj.weight"
    live_parameters = named_parameters(live)
    w, a, b = (
        np.asarray(live_parameters[name.replace("weight", part)].get(), np.float64)
        for part in ("weight", "lora_A", "lora_B")
    )
    saved = np.asarray(named_parameters(load_model(tmp_path / "out"))[name].get(), np.float64)
    exact = w + b @ a
    ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    assert (np.abs(saved - exact) <= 0.501 * ulp).all()


def test_a_merge_that_loses_the_adapter_is_moved_aside(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pronghorn.converters.huggingface.merged_weight", lambda site: site.module.weight.get_value()
    )
    with pytest.raises(RunError, match=r"departs from the live one.*rejected") as caught:
        save_merged(adapted(bases[False]), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    [rejected] = tmp_path.iterdir()
    assert str(rejected) in str(caught.value) and (rejected / "merge_check.json").is_file()


def test_a_bfloat16_merge_that_loses_the_adapter_is_caught_too(bases):
    live = adapted(bases[False], dtype="bfloat16")
    report = compare_models(live, load_model(bases[False], dtype="bfloat16"), tiny_models.prompt())
    assert report["kl_mean"] == pytest.approx(report["adapter_kl_mean"])
    assert merging._fault(report)


def test_nan_is_above_every_limit():
    report = {
        "kl_mean": float("nan"),
        "kl_max": 0.0,
        "kl_mean_limit": 1.0,
        "kl_max_limit": 1.0,
        "dtype": "float32",
    }
    assert merging._fault(report)


def test_a_template_that_changes_on_the_way_is_refused(bases, tmp_path, monkeypatch):
    _, tokenizer = load(bases[False], dtype=None)
    original = merging.load_tokenizer

    def changed(folder):
        saved = original(folder)
        saved.chat_template = saved.chat_template.replace("</s>", "</s> ")
        return saved

    monkeypatch.setattr(merging, "load_tokenizer", changed)
    with pytest.raises(RunError, match="template"):
        save_merged(adapted(bases[False]), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_template_set_in_memory_is_saved(bases, tmp_path):
    _, tokenizer = load(bases[False], dtype=None)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]\n{% endfor %}"
    save_merged(adapted(bases[False]), tokenizer, tmp_path / "out")
    _, again = load(tmp_path / "out", dtype=None)
    assert again.chat_template == tokenizer.chat_template


def test_a_folder_in_use_is_refused_before_anything_is_computed(bases, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        save_merged(None, None, out)
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_model_trained_whole_is_saved_and_compared_as_well(bases, tmp_path):
    report = save_merged(load_model(bases[True]), None, tmp_path / "out")
    assert report["adapter_kl_mean"] == 0.0 and report["kl_max"] <= KL_LIMITS["float32"][2]
    shutil.rmtree(tmp_path / "out")


def test_merge_lora_in_memory_has_the_weights_of_the_folder(bases, tmp_path):
    live = adapted(bases[True], LoRAConfig(rank=4, targets=("all-linear", "lm_head", "embed_tokens")))
    save_merged(live, None, tmp_path / "out")
    in_memory = tiny_models.ours(merge_lora(live), tiny_models.prompt(64))
    from_disk = tiny_models.ours(load_model(tmp_path / "out"), tiny_models.prompt(64))
    assert np.array_equal(in_memory, from_disk)
