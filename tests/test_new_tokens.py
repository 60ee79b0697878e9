"""New tokens: rows at the mean, trained and nothing else of embedding and head, the same in PEFT and after a merge."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn import jobs
from pronghorn.configuration import JobConfig, from_mapping
from pronghorn.converters.huggingface import load, load_model
from pronghorn.converters.merged import rebase, save_merged
from pronghorn.converters.peft import load_adapter, save_adapter
from pronghorn.errors import InputError
from pronghorn.fingerprint import base_hash
from pronghorn.lora import LoRAConfig, add_lora, merge, merge_lora, split
from pronghorn.new_tokens import add_tokens, extended_tokenizer, with_tokens
from pronghorn.training.losses import next_token
from tests import tiny
from tests.converters import tiny_models
from tests.tolerances import MODEL_LOGITS

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers warn of resized vocabularies
VOCAB, NEW = tiny_models.VOCAB, 3


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        tied: tiny_models.save(tiny_models.make("llama", tied=tied, num_hidden_layers=1), root / str(tied))
        for tied in (True, False)
    }


def _randomised(model, seed=5):
    graph, trainable, frozen = split(model)
    rng = np.random.default_rng(seed)
    trainable = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), trainable)
    return merge(graph, trainable, frozen)


def _adapted(folder, **options):
    model = with_tokens(load_model(folder, **options), VOCAB, NEW)
    return add_lora(model, LoRAConfig(rank=2, targets=("q_proj",)))


def _prompt():
    ids = tiny_models.prompt(60).copy()
    ids[:, ::7] = VOCAB + np.arange(ids[:, ::7].shape[1]) % NEW
    return ids


def _peft_logits(base, adapter):
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    model.resize_token_embeddings(VOCAB + NEW)
    return tiny_models.logits(peft.PeftModel.from_pretrained(model, str(adapter)).eval(), _prompt())


@pytest.mark.parametrize(("tied", "layers"), [(True, "scanned"), (False, "unrolled")])
def test_rows_start_at_the_mean_and_nothing_else_changes(bases, tied, layers):
    base = load_model(bases[tied], layers=layers)
    model = add_lora(with_tokens(base, VOCAB, NEW), LoRAConfig(rank=2, targets=("q_proj",)))
    before, after = (tiny_models.ours(m, tiny_models.prompt(20)) for m in (base, model))
    assert np.array_equal(before, after[..., :VOCAB])
    mean = np.asarray(base.embed_tokens.weight.get_value()).mean(0)
    assert np.allclose(np.asarray(model.embed_tokens.lora_new_rows.get_value()), mean, atol=1e-7)
    assert base_hash(model) == base_hash(base) and base.config.vocab_size == VOCAB


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_adapter_and_the_new_rows_are_trainable(bases, tied):
    _, trainable, _ = split(_adapted(bases[tied]))
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(trainable) if leaf.shape[0] == NEW)
    assert shapes == [(NEW, 32)] * (1 if tied else 2)


def test_gradient_of_the_rows_is_that_of_the_whole_weight(bases):
    tied = False
    graph, trainable, frozen = split(_randomised(_adapted(bases[tied])))
    full_graph, full, nothing = split(merge_lora(merge(graph, trainable, frozen)))
    ids = jnp.asarray(_prompt())

    batch = {"input_ids": ids, "labels": ids}

    def gradient(graph, trainable, frozen):
        return jax.jit(jax.grad(lambda t: next_token(graph)(t, frozen, batch)[0]))(trainable)

    ours, theirs = gradient(graph, trainable, frozen), gradient(full_graph, full, nothing)
    expected = [theirs["embed_tokens"]["weight"]] + ([] if tied else [theirs["lm_head"]["weight"]])
    actual = [ours["embed_tokens"]["lora_new_rows"]] + ([] if tied else [ours["lm_head"]["lora_new_rows"]])
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a[...], e[...][VOCAB:], rtol=2e-4, atol=2e-6)
        assert np.abs(np.asarray(a[...])).max() > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_our_adapter_gives_our_logits_in_peft_and_comes_back(bases, tmp_path, tied):
    model = _randomised(_adapted(bases[tied]))
    expected = tiny_models.ours(model, _prompt())
    save_adapter(model, tmp_path / "adapter")
    assert np.abs(_peft_logits(bases[tied], tmp_path / "adapter") - expected).max() <= MODEL_LOGITS
    again = load_adapter(load_model(bases[tied]), tmp_path / "adapter")
    assert np.array_equal(tiny_models.ours(again, _prompt()), expected)
    assert np.array_equal(tiny_models.ours(rebase(model, bases[tied]), _prompt()), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_adapter_with_token_rows_made_by_peft_gives_its_logits_here(bases, tmp_path, tied):
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(bases[tied]), dtype=torch.float32)
    model.resize_token_embeddings(VOCAB + NEW)
    ids = list(range(VOCAB, VOCAB + NEW))
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        trainable_token_indices=ids if tied else {"embed_tokens": ids, "lm_head": ids},
    )
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(str(tmp_path))
    ours = load_adapter(load_model(bases[tied]), tmp_path)
    expected = tiny_models.logits(model, _prompt())
    assert np.abs(tiny_models.ours(ours, _prompt()) - expected).max() <= MODEL_LOGITS


@pytest.mark.parametrize("tied", [True, False])
def test_merged_model_has_the_rows_and_is_tied_as_before(bases, tmp_path, tied):
    model = _randomised(_adapted(bases[tied]))
    report = save_merged(model, None, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert report["kl_max"] < 1e-6 and not report["untied"]
    assert (merged.config.vocab_size, merged.config.tie_word_embeddings) == (VOCAB + NEW, tied)
    assert (
        np.abs(tiny_models.ours(merged, _prompt()) - tiny_models.ours(model, _prompt())).max() <= MODEL_LOGITS
    )


def test_quantised_layers_take_new_tokens_and_a_quantised_embedding_is_refused(bases):
    model = _adapted(bases[True], quantization="nf4")
    assert model.config.vocab_size == VOCAB + NEW
    quantised = load_model(bases[True])
    layer = load_model(bases[True], quantization="nf4").segments[0].layers[0].mlp.up_proj
    quantised.embed_tokens.weight.set_value(layer.weight.get_value())
    with pytest.raises(InputError, match="embedding or head is quantised"):
        with_tokens(quantised, VOCAB, NEW)


def test_rows_that_the_model_has_beyond_its_tokenizer_are_used_first():
    model = load_model_of(vocab_size=len(tiny.tiny_tokenizer()) + 5)
    longer, tokenizer = add_tokens(model, tiny.tiny_tokenizer(), ["<a>", "new word"])
    assert longer.config.vocab_size == model.config.vocab_size
    assert tokenizer("x<a>new word")["input_ids"][1:] == [len(tokenizer) - 2, len(tokenizer) - 1]
    assert "<a>" in tokenizer.all_special_tokens or "<a>" in str(tokenizer.added_tokens_decoder)
    assert tokenizer.decode([len(tokenizer) - 1], skip_special_tokens=True) == "new word"
    assert tokenizer.decode([len(tokenizer) - 2], skip_special_tokens=True) == ""


def load_model_of(**changes):
    from tests.models.reference import tiny_decoder

    return tiny_decoder(tiny.tiny_config(**changes), seed=0)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "0 tokens"),
        (["<x>"] * 1025, "1025 tokens"),
        (["<x>", "<y>", "<x>"], "'<x>' is given twice"),
        (["<|im_end|>"], "is a token of the tokenizer already"),
        (["  "], "is no token"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(tokens, message):
    with pytest.raises(InputError, match=message):
        extended_tokenizer(tiny.tiny_tokenizer(), tokens)


def test_adapters_on_embedding_or_head_are_refused_beside_new_rows(bases):
    with pytest.raises(InputError, match="beside the trained rows of new tokens"):
        add_lora(with_tokens(load_model(bases[False]), VOCAB, 1), LoRAConfig(targets=("lm_head",)))
    with pytest.raises(InputError, match="add the tokens before the adapter"):
        with_tokens(add_lora(load_model(bases[False]), LoRAConfig(targets=("lm_head",))), VOCAB, 1)
    with pytest.raises(InputError, match="given new tokens already"):
        with_tokens(with_tokens(load_model(bases[False]), VOCAB, 1), VOCAB + 1, 1)


@pytest.mark.parametrize(
    "indices", [[97, 99], {"embed_tokens": [97], "lm_head": [98]}, {"q_proj": [1]}, [], [2**40]]
)
def test_other_trained_tokens_are_refused(bases, tmp_path, indices):
    save_adapter(_adapted(bases[True]), tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": indices}))
    with pytest.raises(InputError):
        load_adapter(load_model(bases[True]), tmp_path / "adapter")


def test_base_model_gets_a_shipped_template_with_its_markers_as_new_tokens(tmp_path):
    folder = tiny.write_model(tmp_path / "model", tie_word_embeddings=False, num_layers=1)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [tiny.chat("fox?", "fox!"), tiny.chat("a", "b")] * 4)
    settings = {
        "model": str(folder),
        "dtype": "float32",
        "new_tokens": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "lora": {"rank": 2, "targets": ["q_proj"]},
        "data": {"path": str(rows), "max_length": 48, "chat_template": "phi"},
        "train": {"max_steps": 2, "learning_rate": 0.01, "output_dir": str(tmp_path / "run")},
    }
    trainer = jobs.prepare_job(from_mapping(JobConfig, settings))
    before = np.asarray(trainer.model.embed_tokens.lora_new_rows.get_value())
    trainer.train()
    after = np.asarray(trainer.model.embed_tokens.lora_new_rows.get_value())
    assert np.abs(after[3] - before[3]).max() > 1e-3
    saved = jobs.save_results(trainer, tmp_path / "run", merge_into=tmp_path / "merged")
    assert saved["adapter_kl"] == 0 and saved["merged_kl"] < 1e-6
    model, tokenizer = load(folder, adapter=tmp_path / "run/adapter", dtype="float32")
    assert tokenizer.eos_token == "<|end|>" and tokenizer.eos_token_id == model.config.vocab_size - 1
    asked = [{"role": "user", "content": "fox?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\nfox?<|end|>\n<|assistant|>\n"
    merged, merged_tokenizer = load(tmp_path / "merged")
    assert len(merged_tokenizer) == merged.config.vocab_size == model.config.vocab_size
    going_on = settings | {"adapter": saved["adapter_dir"], "new_tokens": []}
    going_on["train"] = settings["train"] | {"output_dir": str(tmp_path / "second")}
    assert jobs.prepare_job(from_mapping(JobConfig, going_on)).total_steps == 2
    assert jobs.tokenizer_of(from_mapping(JobConfig, settings), folder, tiny.tiny_config())[1:] == (
        model.config.vocab_size,
        model.config.vocab_size - 4,
    )
    plain = settings["data"] | {"chat_template": None}
    with pytest.raises(InputError, match="not one of them occurs in the rows"):
        jobs.prepare_job(from_mapping(JobConfig, settings | {"new_tokens": ["<nowhere>"], "data": plain}))
