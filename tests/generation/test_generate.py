"""The compiled loop gives what calling the model token by token gives."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pronghorn.errors import InputError, RunError
from pronghorn.generation import Sampling, default_stop_tokens, generate, generate_batch, generate_tokens
from pronghorn.models.config import DecoderConfig, RopeConfig
from pronghorn.models.decoder import Decoder, Source

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=53,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    tie_word_embeddings=False,  # a tied random head repeats its input
)
PROMPTS = [[7, 3, 11], [1], list(range(40)), [5, 5, 9, 30, 2]]


def _model(config=CONFIG, layers="unrolled", seed=0):
    """Weights of std 1/4, large enough that greedy text changes from token to token; filled without compiling."""
    random = np.random.default_rng(seed)
    graph, state = nnx.split(Decoder.abstract(config, dtype=jnp.float32, layers=layers))
    filled = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.25, leaf.shape), leaf.dtype), state)
    return nnx.merge(graph, filled)


@pytest.fixture(scope="module")
def model():
    return _model()


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph, state, ids):
    return nnx.merge(graph, state)(ids)


def _one_by_one(model, prompt, count):
    """Greedy tokens without a cache; what stands behind the last token is masked by attention, so one shape does."""
    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(_logits(*nnx.split(model), padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


def test_greedy_tokens_are_those_of_calling_the_model_again_for_each(model):
    expected = _one_by_one(model, PROMPTS[0], 12)
    assert len(set(expected)) > 3
    assert generate_tokens(model, [PROMPTS[0]], max_new_tokens=12) == [expected]


def test_prompts_of_different_lengths_in_one_batch_do_not_disturb_each_other(model):
    together = generate_tokens(model, PROMPTS, max_new_tokens=9)
    assert together == [generate_tokens(model, [prompt], max_new_tokens=9)[0] for prompt in PROMPTS]


def test_scanned_layers_and_sliding_windows_give_the_same_as_the_model():
    config = dataclasses.replace(
        CONFIG, num_layers=4, sliding_window=5, layer_kinds=("sliding", "full", "sliding", "full")
    )
    model = _model(config, layers="scanned")
    assert generate_tokens(model, [PROMPTS[0]], max_new_tokens=10) == [_one_by_one(model, PROMPTS[0], 10)]


def test_rows_stay_apart_where_rope_depends_on_the_length():
    rope = RopeConfig(kind="dynamic", factor=2.0, original_max_position_embeddings=16)
    model = _model(dataclasses.replace(CONFIG, rope=rope))
    alone = generate_tokens(model, [PROMPTS[0]], max_new_tokens=6)
    assert generate_tokens(model, [PROMPTS[2], PROMPTS[0]], max_new_tokens=6)[1:] == alone


def test_a_prompt_prefilled_in_pieces_is_the_prompt_prefilled_at_once(model, monkeypatch):
    import sys

    module = sys.modules["pronghorn.generation.generate"]
    expected = generate_tokens(model, PROMPTS, max_new_tokens=5)
    monkeypatch.setattr(module, "_PIECE", 8)
    assert generate_tokens(model, PROMPTS, max_new_tokens=5) == expected


def test_a_row_ends_with_its_stop_token_and_the_others_go_on(model):
    free = generate_tokens(model, PROMPTS, max_new_tokens=12)
    stop = free[0][4]
    found = generate_tokens(model, PROMPTS, max_new_tokens=12, stop_token_ids=[stop, 52])
    for row, without in zip(found, free, strict=True):
        cut = next((i + 1 for i, token in enumerate(without) if token in (stop, 52)), 12)
        assert row == without[:cut]
    assert len(found[0]) < 12


def test_lengths_within_a_bucket_share_one_program(model):
    import sys

    module = sys.modules["pronghorn.generation.generate"]
    generate_tokens(model, PROMPTS, max_new_tokens=5, stop_token_ids=[1])
    before = module._prefill._cache_size(), module._decode._cache_size()
    generate_tokens(model, [[4] * 33, [3] * 17, [2]], max_new_tokens=29, stop_token_ids=[1, 2])
    assert (module._prefill._cache_size(), module._decode._cache_size()) == before


def test_sampling_repeats_with_its_seed_and_changes_with_another(model):
    def sample(seed):
        return generate_tokens(model, PROMPTS, max_new_tokens=16, sampling=Sampling(1.0, 0.9, 40, seed))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_two_rows_with_the_same_prompt_are_drawn_apart(model):
    prompts = [[7, 3]] * 3 + [[1] * 40]
    rows = generate_tokens(model, prompts, max_new_tokens=16, sampling=Sampling(temperature=1.0))
    assert len({tuple(row) for row in rows[:3]}) == 3


def test_a_model_that_gives_nan_is_stopped(model):
    broken = _model()
    broken.norm.weight[...] = jnp.full(16, jnp.nan)
    with pytest.raises(RunError, match="not finite"):
        generate_tokens(broken, PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize(
    "prompts, new, said",
    [
        ([[]], 4, "prompt 0 is empty"),
        ([[1], [2, 53]], 4, "prompt 1 has a token outside"),
        ([[-1]], 4, "outside"),
        ([[1] * 60], 8, "context of 64"),
        ([[1]], 0, "max_new_tokens=0"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(model, prompts, new, said):
    with pytest.raises(InputError, match=said):
        generate_tokens(model, prompts, max_new_tokens=new)


def test_the_context_may_be_filled_to_its_last_position(model):
    assert len(generate_tokens(model, [[1] * 56], max_new_tokens=8)[0]) == 8


class Letters:
    """A tokenizer of 50 letters; token 50 is eos, 51 begins a text."""

    eos_token_id = 50
    special_tokens_map = {"eos_token": "$"}  # noqa: RUF012
    chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789:;,.!?()[]{}<>"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [51] * add_special_tokens + [self.alphabet.index(letter) for letter in text]}

    def decode(self, ids, skip_special_tokens=False):
        assert skip_special_tokens
        return "".join(self.alphabet[i] for i in ids if i < 50)

    def get_chat_template(self, chat_template=None, tools=None):
        return self.chat_template


def test_messages_go_through_the_template_and_text_is_continued(model):
    tokenizer = Letters()
    said = generate(
        model, tokenizer, [{"role": "user", "content": "hello"}], max_new_tokens=7, stop_token_ids=()
    )
    ids = tokenizer("hello:", add_special_tokens=False)["input_ids"]
    assert said == tokenizer.decode(_one_by_one(model, ids, 7), skip_special_tokens=True)
    continued = generate(model, tokenizer, "hello", max_new_tokens=7, stop_token_ids=())
    assert continued == tokenizer.decode(_one_by_one(model, tokenizer("hello")["input_ids"], 7), True)


def test_a_batch_may_mix_texts_and_messages(model):
    tokenizer = Letters()
    prompts = ["hello", [{"role": "user", "content": "you"}]]
    expected = [generate(model, tokenizer, prompt, max_new_tokens=6) for prompt in prompts]
    assert generate_batch(model, tokenizer, prompts, max_new_tokens=6) == expected


def test_every_token_that_ends_an_answer_is_found(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 50, "x", -1]}))
    model = _model()
    model.source = Source(str(tmp_path), json.dumps({"eos_token_id": 9}), "float32")
    assert default_stop_tokens(model, Letters()) == [4, 9, 50]
    (tmp_path / "generation_config.json").write_text("[")
    assert default_stop_tokens(model, Letters()) == [9, 50]


def test_a_stop_token_of_the_tokenizer_ends_the_answer_by_default(model):
    class Ends(Letters):
        eos_token_id = None

    free = np.asarray(_one_by_one(model, Letters()("hello")["input_ids"], 8))
    Ends.eos_token_id = int(free[3])
    answer = generate(model, Ends(), "hello", max_new_tokens=8)
    cut = int(np.argmax(free == free[3])) + 1
    assert answer == Letters().decode(free[:cut].tolist(), skip_special_tokens=True)
