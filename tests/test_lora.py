"""Adapters as pytrees: what is chosen, how it starts, and that nothing else changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.fingerprint import base_hash, same_base
from pronghorn.lora import LoRAConfig, LoRAParam, add_lora, merge, merge_lora, shallow_copy, split
from pronghorn.lora_sites import select, sites
from pronghorn.models.config import DecoderConfig
from pronghorn.models.decoder import Decoder
from pronghorn.models.parameters import assign, flat_arrays, named_parameters

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position_embeddings=64,
)


IDS = np.random.default_rng(0).integers(0, 37, (2, 9))
LINEARS = 7


def model_of(*, tied=False, layers="unrolled", dtype=jnp.float32, seed=0, num_layers=3):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied, num_layers=num_layers, layer_kinds=())
    model = Decoder.abstract(config, dtype=dtype, layers=layers)
    rng = np.random.default_rng(seed)
    values = {n: rng.normal(0, 0.2, p.shape).astype(np.float32) for n, p in named_parameters(model).items()}
    assign(model, values)
    return model


def randomised(model):
    graph, trainable, frozen = split(model)
    rng = np.random.default_rng(1)
    trainable = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32), trainable)
    return merge(graph, trainable, frozen)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph, trainable, frozen):
    return merge(graph, trainable, frozen)(IDS)


def logits(model):
    """fp32 logits; models of one structure share one compiled program."""
    return np.asarray(_forward(*split(model)))


def refusal(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"targets": ()}, "targets"),
        ({"targets": ("q_proj", "")}, "targets"),
        ({"layers": ()}, "layers"),
    ],
)
def test_an_impossible_configuration_is_refused(changes, words):
    assert words in refusal(lambda: LoRAConfig(**changes))


@pytest.mark.parametrize(
    ("alpha", "rslora", "scale"), [(None, False, 1.0), (32, False, 2.0), (None, True, 4.0), (8, True, 2.0)]
)
def test_the_scale_is_alpha_over_rank_or_its_root(alpha, rslora, scale):
    assert LoRAConfig(rank=16, alpha=alpha, use_rslora=rslora).scale == scale


@pytest.mark.parametrize(
    ("targets", "layers", "count"),
    [
        ("all-linear", None, 3 * LINEARS),
        ("all-linear", (1,), LINEARS),
        ("q_proj", None, 3),
        (("q_proj", "mlp.up_proj"), (0, 2), 4),
        (("layers.*.mlp.*",), None, 9),
        (("layers.[01].self_attn.?_proj",), None, 8),
        ((r"re:layers\.(0|2)\..*(q|down)_proj",), None, 4),
        (("model.layers.2.self_attn.q_proj",), None, 1),
        (("lm_head",), (0,), 1),
        (("embed_tokens", "lm_head", "all-linear"), None, 3 * LINEARS + 2),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_targets_choose_by_name_pattern_and_layer(targets, layers, count, tied):
    names = select(model_of(tied=tied), LoRAConfig(targets=targets, layers=layers))
    assert len(names) == len(set(names)) == count


def test_all_linear_leaves_the_head_and_the_embedding_alone():
    names = select(model_of(), LoRAConfig())
    assert not {"lm_head", "embed_tokens"} & set(names)


@pytest.mark.parametrize("target", ["q_prj", "layers.9.*", "proj", "re:(", "layernorm", "re:q_proj"])
def test_a_target_that_matches_nothing_is_refused_with_what_exists(target):
    message = refusal(select, model_of(), LoRAConfig(targets=(target, "q_proj")))
    assert target in message
    assert "regular expression" in message or all(
        name in message for name in ("self_attn.q_proj", "lm_head", "all-linear")
    )


def test_a_layer_that_does_not_exist_is_refused():
    assert "0 to 2" in refusal(select, model_of(), LoRAConfig(layers=(0, 3)))


def test_adding_adapters_changes_no_output_and_not_the_model_given():
    model = model_of()
    before = {name: np.asarray(value) for name, value in flat_arrays(model).items()}
    expected = logits(model)
    new = add_lora(model, LoRAConfig(rank=2, targets=("all-linear", "lm_head", "embed_tokens")))
    assert np.array_equal(logits(new), expected)
    assert model.adapter is None and flat_arrays(model).keys() == before.keys()
    assert all(np.array_equal(before[name], value) for name, value in flat_arrays(model).items())
    assert new.embed_tokens.weight.get_value() is model.embed_tokens.weight.get_value()


def test_writing_into_the_new_model_does_not_reach_the_old_one():
    model = model_of()
    new = add_lora(model, LoRAConfig(rank=2))
    assign(new, {"norm.weight": np.zeros(24, np.float32)}, strict=False)
    assert np.asarray(model.norm.weight.get_value()).all()


def test_factors_start_as_in_peft():
    config = LoRAConfig(rank=64, targets=("q_proj", "down_proj", "embed_tokens"))
    places = sites(add_lora(model_of(), config))
    for name, fan_in in (("layers.0.self_attn.q_proj", 24), ("layers.2.mlp.down_proj", 40)):
        a, b, *_ = places[name].factors
        assert a.shape == (64, fan_in) and a.dtype == jnp.float32 and not np.any(b)
        bound = fan_in**-0.5
        assert 0.98 * bound < np.abs(a).max() <= bound and np.std(a) == pytest.approx(
            bound / 3**0.5, rel=0.05
        )
    a, b, *_ = places["embed_tokens"].factors
    assert (
        a.shape == (64, 37)
        and b.shape == (24, 64)
        and not np.any(a)
        and np.std(b) == pytest.approx(1, rel=0.1)
    )


def test_a_start_depends_on_seed_and_name_only():
    def start(**options):
        places = sites(
            add_lora(model_of(layers=options.pop("layers_as", "unrolled")), LoRAConfig(rank=2, **options))
        )
        return np.asarray(places["layers.1.mlp.up_proj"].factors.a)

    usual = start()
    assert np.array_equal(usual, start(targets=("up_proj",), layers=(1,)))
    assert np.array_equal(usual, start(layers_as="scanned"))
    assert not np.array_equal(usual, start(seed=1))
    places = sites(add_lora(model_of(), LoRAConfig(rank=2)))
    assert not np.array_equal(usual, places["layers.2.mlp.up_proj"].factors.a)


def test_split_gives_the_adapters_and_nothing_else():
    model = add_lora(model_of(), LoRAConfig(rank=2, targets=("q_proj", "lm_head")))
    graph, trainable, frozen = split(model)
    assert len(jax.tree.leaves(trainable)) == 2 * 4
    assert all(leaf.dtype == jnp.float32 and 2 in leaf.shape for leaf in jax.tree.leaves(trainable))
    assert len(jax.tree.leaves(frozen)) == len(flat_arrays(model_of()))
    assert hash(graph) == hash(split(model)[0]) and graph == split(model)[0]
    assert np.array_equal(logits(merge(graph, trainable, frozen)), logits(model))


def test_split_without_adapters_trains_everything():
    _, trainable, frozen = split(model_of())
    assert len(jax.tree.leaves(trainable)) == len(flat_arrays(model_of())) and not jax.tree.leaves(frozen)


@pytest.mark.parametrize(("layers", "tied"), [("unrolled", True), ("scanned", False)])
def test_every_adapter_gets_a_gradient_and_no_base_weight_does(layers, tied):
    config = LoRAConfig(rank=2, targets=("all-linear", "lm_head", "embed_tokens"))
    graph, trainable, frozen = split(
        randomised(add_lora(model_of(tied=tied, layers=layers, num_layers=2), config))
    )
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(merge(graph, t, frozen)(IDS) ** 2)))(trainable)
    assert jax.tree.structure(gradient) == jax.tree.structure(trainable)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all() and np.any(leaf)


ENDS = [("all-linear",), ("lm_head",), ("embed_tokens",), ("q_proj", "lm_head", "embed_tokens")]


@pytest.mark.parametrize(
    ("layers", "tied", "targets"),
    [
        *(("unrolled", tied, targets) for tied in (False, True) for targets in ENDS),
        ("scanned", False, ENDS[0]),
        ("scanned", True, ENDS[3]),
    ],
)
def test_merging_equals_the_live_model(layers, targets, tied):
    plain = model_of(tied=tied, layers=layers, num_layers=2)
    live = randomised(add_lora(plain, LoRAConfig(rank=2, alpha=5, targets=targets)))
    expected = logits(live)
    merged = merge_lora(live)
    assert np.abs(logits(merged) - expected).max() <= 1e-5
    assert np.abs(logits(merged) - logits(plain)).max() > 1e-2
    assert merged.adapter is None and not any("lora" in name for name in flat_arrays(merged))
    unties = tied and bool({"lm_head", "embed_tokens"} & set(targets))
    assert (
        merged.config.tie_word_embeddings == (tied and not unties) and live.config.tie_word_embeddings == tied
    )
    assert (merged.lm_head is None) == (tied and not unties)
    assert np.array_equal(logits(live), expected)


def test_an_adapter_on_one_end_of_a_tied_model_leaves_the_other_as_it_was():
    plain = model_of(tied=True)
    weight = np.asarray(plain.embed_tokens.weight.get_value())
    head_only = merge_lora(randomised(add_lora(plain, LoRAConfig(rank=2, targets=("lm_head",)))))
    assert np.array_equal(head_only.embed_tokens.weight.get_value(), weight)
    assert not np.array_equal(head_only.lm_head.weight.get_value(), weight)
    embedding_only = merge_lora(randomised(add_lora(plain, LoRAConfig(rank=2, targets=("embed_tokens",)))))
    assert np.array_equal(embedding_only.lm_head.weight.get_value(), weight)
    assert not np.array_equal(embedding_only.embed_tokens.weight.get_value(), weight)


def test_merging_rounds_a_16_bit_weight_once():
    live = randomised(add_lora(model_of(dtype=jnp.bfloat16), LoRAConfig(rank=2, targets=("up_proj",))))
    site = sites(live)["layers.1.mlp.up_proj"]
    a, b, scale = (np.asarray(x, np.float64) for x in site.factors[:3])
    exact = np.asarray(site.module.weight.get_value(), np.float64) + scale * (b @ a)
    merged = sites(merge_lora(live))["layers.1.mlp.up_proj"].module.weight.get_value()
    assert merged.dtype == jnp.bfloat16
    ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    assert (np.abs(np.asarray(merged, np.float64) - exact) <= 0.501 * ulp).all()


def test_untouched_weights_are_shared_after_merging():
    live = add_lora(model_of(), LoRAConfig(rank=2, targets=("q_proj",)))
    merged = merge_lora(live)
    assert merged.embed_tokens.weight.get_value() is live.embed_tokens.weight.get_value()


def test_layers_of_a_stack_without_an_adapter_never_move():
    config = LoRAConfig(rank=2, targets=("up_proj",), layers=(1,))
    graph, trainable, frozen = split(add_lora(model_of(layers="scanned"), config))
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(merge(graph, t, frozen)(IDS) ** 2)))
    for _ in range(2):
        trainable = jax.tree.map(lambda leaf, g: leaf - 1e-3 * g, trainable, gradient(trainable))
    for site in sites(merge(graph, trainable, frozen)).values():
        if site.factors is not None:
            assert bool(np.any(site.factors.b)) == bool(np.any(site.factors.a)) == (site.layer == 1)


def test_a_second_adapter_is_refused():
    assert "merge_lora" in refusal(add_lora, add_lora(model_of(), LoRAConfig(rank=2)), LoRAConfig())


def test_the_adapter_says_how_it_was_made_and_is_hashable():
    model = model_of()
    info = add_lora(
        model, LoRAConfig(rank=2, use_rslora=True, dropout=0.1, targets="q_proj", layers=(0,))
    ).adapter
    assert (info.rank, info.alpha, info.use_rslora, info.dropout) == (2, 2.0, True, 0.1)
    assert info.targets == ("q_proj",) and info.layers == (0,) and info.base_hash == base_hash(model)
    assert hash(info) == hash(dataclasses.replace(info))


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_an_abstract_model_takes_adapters_without_allocating(layers):
    model = add_lora(
        Decoder.abstract(CONFIG, layers=layers), LoRAConfig(rank=2, targets=("q_proj", "embed_tokens"))
    )
    _, trainable, frozen = split(model)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((trainable, frozen)))
    real = split(add_lora(model_of(layers=layers), LoRAConfig(rank=2, targets=("q_proj", "embed_tokens"))))[1]
    shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert shapes(trainable) == shapes(real)


def test_axes_of_the_factors_are_named():
    model = add_lora(model_of(layers="scanned"), LoRAConfig(rank=2, targets=("q_proj", "embed_tokens")))
    named = {name: leaf for name, leaf in named_parameters(model).items() if "lora" in name}
    assert named["layers.0.self_attn.q_proj.lora_A"].variable.logical_axes == ("layers", "rank", "hidden")
    assert named["layers.0.self_attn.q_proj.lora_B"].variable.logical_axes == ("layers", "heads", "rank")
    assert named["embed_tokens.lora_embedding_A"].logical_axes == ("rank", "vocab")
    assert all(isinstance(leaf.variable, LoRAParam) for leaf in named.values())


def test_the_base_hash_knows_weights_layout_and_adapters_apart():
    usual = base_hash(model_of())
    assert usual == base_hash(model_of(layers="scanned")) == base_hash(model_of(dtype=jnp.bfloat16))
    assert usual == base_hash(randomised(add_lora(model_of(), LoRAConfig(rank=2))))
    assert usual == base_hash(shallow_copy(model_of()))
    assert usual != base_hash(model_of(seed=1)) and usual != base_hash(model_of(tied=True))
    other = model_of()
    other.config = dataclasses.replace(CONFIG, rms_norm_eps=1e-5)
    assert usual != base_hash(other)
    tied = model_of(tied=True)
    assert base_hash(tied) == base_hash(randomised(add_lora(tied, LoRAConfig(rank=2, targets=("lm_head",)))))


def test_a_quantised_or_abstract_base_is_compared_where_it_can_be():
    assert same_base("v1-aa-bb-cc", "v1-aa-bb-quantized") and same_base(
        "v1-aa-abstract-abstract", "v1-aa-bb-cc"
    )
    assert not same_base("v1-aa-bb-cc", "v1-aa-bd-quantized") and not same_base("v1-aa-bb-cc", "v1-ab-bb-cc")
    assert not same_base("nonsense", "v1-aa-bb-cc") and not same_base("v2-aa-bb-cc", "v1-aa-bb-cc")
