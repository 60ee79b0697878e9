"""Adapters of experts that are bare parameters in transformers (PEFT's `target_parameters`), read and written."""

import copy
import json

import jax
import numpy as np
import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from pronghorn.converters.combine import combine_adapters
from pronghorn.converters.huggingface import load_model
from pronghorn.converters.peft import load_adapter, save_adapter
from pronghorn.converters.safetensors_files import read_header
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig, add_lora, merge, merge_lora, split
from pronghorn.lora_sites import sites
from pronghorn.models import flat_arrays
from pronghorn.models.families import family_named
from pronghorn.models.tensor_names import by_our_names
from pronghorn.verification import verify_model
from tests.converters import tiny_models
from tests.models.reference import tiny_torch_model

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ALL = ("gate_proj", "up_proj", "down_proj")


# What a file calls a layer's feed-forward network, and sizes. Both families hold `[experts, in, out]`, which
# transformers marks as transposed for gpt-oss alone.
FAMILIES = {
    "gpt_oss": ("mlp", {"sliding_window": 17}),
    "llama4_text": (
        "feed_forward",
        {"intermediate_size_mlp": 32, "interleave_moe_layer_step": 1, "attention_chunk_size": 17},
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def torch_model(family):
    return tiny_torch_model(
        family,
        head_dim=12,
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=20,
        pad_token_id=None,
        **FAMILIES[family][1],
    )


@pytest.fixture(scope="module")
def folder(torch_model, tmp_path_factory):
    return tiny_models.save(torch_model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def merged_by_peft(torch_model, model, adapter):
    """Merged weights by our names, of an adapter that PEFT reads."""
    built = PeftModel.from_pretrained(copy.deepcopy(torch_model), str(adapter)).merge_and_unload()
    config = model.config
    family = family_named(config.family)
    state = {name: tensor.numpy() for name, tensor in built.state_dict().items()}
    ways = family.tensor_names, family.fused_tensors, family.interleaved_tensors
    return by_our_names(state, *(way(config) for way in ways))


def changed(model, merged):
    """Names of the weights that differ from the base's."""
    base = flat_arrays(model)
    return {name.removesuffix(".weight") for name in base if not np.array_equal(base[name], merged[name])}


def assert_merged_alike(ours, theirs):
    found = flat_arrays(merge_lora(ours))
    assert sorted(found) == sorted(theirs)
    for name, expected in theirs.items():
        assert np.max(np.abs(found[name] - expected)) <= 1e-6, name


def tensors(adapter):
    return {
        name: stored.read() for name, stored in read_header(adapter / "adapter_model.safetensors")[0].items()
    }


@pytest.mark.parametrize(
    ("parameters", "modules"),
    [
        (BOTH, ["q_proj"]),
        (BOTH[:1], []),
        (BOTH[1:], ["o_proj"]),
        (["model.layers.1.mlp.experts.gate_up_proj"], []),
    ],
    ids=["both", "gate and up", "down", "one layer"],
)
def test_what_peft_wrote_is_read_and_written_bit_for_bit(
    family, torch_model, model, tmp_path, parameters, modules
):
    parameters = [name.replace("mlp", FAMILIES[family][0]) for name in parameters]
    options = LoraConfig(
        r=3, lora_alpha=7, target_modules=modules, target_parameters=parameters, init_lora_weights=False
    )
    theirs = get_peft_model(copy.deepcopy(torch_model), options)
    theirs.save_pretrained(str(tmp_path / "peft"))
    adapted = load_adapter(model, tmp_path / "peft")
    expected = merged_by_peft(torch_model, model, tmp_path / "peft")
    parts = [leaf for name in parameters for leaf in (ALL[:2] if "gate_up" in name else ALL[2:])]
    layers = 1 if "layers" in parameters[0] else 2
    assert len(changed(model, expected)) == layers * (len(parts) + len(modules))
    assert_merged_alike(adapted, expected)
    ids = tiny_models.prompt(40)
    assert np.max(np.abs(tiny_models.ours(adapted, ids) - tiny_models.logits(theirs, ids))) <= 1e-4

    save_adapter(adapted, tmp_path / "ours")
    before, after = tensors(tmp_path / "peft"), tensors(tmp_path / "ours")
    assert sorted(before) == sorted(after)
    assert all(np.array_equal(array, after[name]) for name, array in before.items())
    again = merged_by_peft(torch_model, model, tmp_path / "ours")
    assert all(np.array_equal(array, again[name]) for name, array in expected.items())


@pytest.mark.parametrize(
    ("targets", "layers"),
    [((*ALL, "q_proj"), None), (("up_proj",), None), (("gate_proj", "down_proj"), (1,))],
    ids=["all", "up alone", "one layer"],
)
@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
def test_ours_are_read_by_peft_and_by_us(torch_model, folder, tmp_path, targets, layers, layout):
    model = load_model(folder, layers=layout)
    adapted = add_lora(model, LoRAConfig(rank=2, alpha=5, targets=targets, layers=layers))
    graph, lora, frozen = split(adapted)
    if layout == "scanned" and layers is not None:
        # A layer of the stack without an adapter has zeros, and keeps them.
        lora = jax.tree.map(lambda leaf: leaf.at[-1].add(0.05), lora)
    else:
        lora = jax.tree.map(lambda leaf: leaf + 0.05, lora)
    adapted = merge(graph, lora, frozen)
    save_adapter(adapted, tmp_path / "adapter")
    assert_merged_alike(adapted, merged_by_peft(torch_model, model, tmp_path / "adapter"))
    again = load_adapter(model, tmp_path / "adapter")
    for name, site in sites(adapted).items():
        one, other = site.factors, sites(again)[name].factors
        assert (one is None) == (other is None), name
        if one is not None:
            assert (
                one.scale == other.scale and np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)
            )


def test_gradients_of_the_factors_are_those_of_peft(model, folder, tmp_path):
    adapted = add_lora(model, LoRAConfig(rank=2, targets=(*ALL, "q_proj")))
    graph, lora, frozen = split(adapted)
    adapted = merge(graph, jax.tree.map(lambda leaf: leaf + 0.05, lora), frozen)
    save_adapter(adapted, tmp_path / "adapter")
    report = verify_model(str(folder), adapter=str(tmp_path / "adapter"), tokens=40)
    names = [difference.name for difference in report.gradients]
    assert "layers.1.mlp.experts.gate_up_proj.lora_B" in names and report.passed


def test_a_parameter_without_a_place_is_refused(model, tmp_path):
    adapted = add_lora(model, LoRAConfig(rank=2, targets=("experts.down_proj",)))
    save_adapter(adapted, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["target_parameters"] == ["experts.down_proj"] and config["target_modules"] == []
    path.write_text(json.dumps(config | {"target_parameters": ["mlp.router.weight"]}))
    with pytest.raises(InputError, match=r"target_parameters has 'mlp.router.weight'"):
        load_adapter(model, tmp_path / "adapter")
    path.write_text(json.dumps(config | {"target_parameters": None}))
    with pytest.raises(InputError, match="target_modules"):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 20, "mlp_only_layers": [0]}),
        ("mixtral", {"num_local_experts": 4, "intermediate_size": 20}),
    ],
)
def test_what_peft_wrote_of_experts_that_files_hold_one_by_one_is_read_and_written(tmp_path, family, sizes):
    torch_model = tiny_torch_model(
        family, head_dim=12, num_hidden_layers=2, num_experts_per_tok=2, pad_token_id=None, **sizes
    )
    options = LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=BOTH, init_lora_weights=False
    )
    theirs = get_peft_model(copy.deepcopy(torch_model), options)
    theirs.save_pretrained(str(tmp_path / "peft"))
    model = load_model(tiny_models.save(torch_model, tmp_path / "base"))
    adapted = load_adapter(model, tmp_path / "peft")
    ids = tiny_models.prompt(40)
    expected = tiny_models.logits(theirs, ids)
    assert np.max(np.abs(tiny_models.logits(torch_model, ids) - expected)) > 1e-2
    assert np.max(np.abs(tiny_models.ours(adapted, ids) - expected)) <= 1e-4
    save_adapter(adapted, tmp_path / "ours")
    before, after = tensors(tmp_path / "peft"), tensors(tmp_path / "ours")
    assert sorted(before) == sorted(after)
    assert all(np.array_equal(array, after[name]) for name, array in before.items())
    again = PeftModel.from_pretrained(copy.deepcopy(torch_model), str(tmp_path / "ours"))
    assert np.max(np.abs(tiny_models.logits(again, ids) - expected)) <= 1e-4


def test_factors_of_llama_4_change_places_since_peft_takes_their_array_for_its_transpose(tmp_path):
    """PEFT trains them from zeros of the factor that reads what an expert writes; ours from zeros of the other."""
    torch_model = tiny_torch_model(
        "llama4_text",
        head_dim=12,
        num_hidden_layers=1,
        intermediate_size=20,
        num_local_experts=2,
        interleave_moe_layer_step=1,
        pad_token_id=None,
    )
    model = load_model(tiny_models.save(torch_model, tmp_path / "base"))
    adapted = add_lora(model, LoRAConfig(rank=3, targets=("experts.down_proj",)))
    save_adapter(adapted, tmp_path / "ours")
    stored = {name.rpartition("lora_")[2]: array for name, array in tensors(tmp_path / "ours").items()}
    ours = sites(adapted)["layers.0.mlp.experts.down_proj"].factors
    width, hidden = 20, 48
    assert stored["A.weight"].shape == (2 * 3, hidden) and not np.any(stored["A.weight"])
    assert stored["B.weight"].shape == (width, 3 * 2)
    assert np.array_equal(stored["B.weight"].reshape(width, 3, 2).transpose(2, 1, 0), ours.a)


MIXTURES = {
    # Nothing but experts has their names.
    "mixtral": {"num_local_experts": 4, "intermediate_size": 20},
    # A dense layer has them.
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 20, "mlp_only_layers": [0]},
    # A network that every token goes through has them; PEFT converts nothing in this family.
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28},
}
EXPERTS = tuple(f"experts.{leaf}" for leaf in ALL)


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request, tmp_path_factory):
    """(torch model, folder, our model): two layers, the last one a mixture."""
    torch_model = tiny_torch_model(
        request.param,
        head_dim=12,
        num_hidden_layers=2,
        num_experts_per_tok=2,
        pad_token_id=None,
        **MIXTURES[request.param],
    )
    folder = tiny_models.save(torch_model, tmp_path_factory.mktemp("mixture"))
    return torch_model, folder, load_model(folder)


OPTIONS = {
    "all linears": {},
    "experts": {"targets": EXPERTS},
    "ranks": {"targets": (*EXPERTS, "all-linear"), "use_rslora": True, "rank_pattern": {"down_proj": 3}},
    "dropout": {"dropout": 0.1},
    "last layer": {"targets": EXPERTS, "layers": (1,)},
    "up alone": {"targets": EXPERTS[1:2]},
    "alphas": {"targets": (*EXPERTS, "q_proj"), "alpha_pattern": {"re:.*experts.*": 2.5}},
}


@pytest.mark.parametrize(
    ("mixture", "options"),
    [
        pytest.param(family, options, id=f"{family}, {name}")
        for family in MIXTURES
        for name, options in OPTIONS.items()
        if family == "qwen3_moe" or name in ("all linears", "experts", "ranks")
    ],
    indirect=["mixture"],
)
def test_linears_that_share_names_with_experts_mean_the_same_to_peft_and_to_us(mixture, tmp_path, options):
    torch_model, _, model = mixture
    adapted = add_lora(model, LoRAConfig(**{"rank": 2, "alpha": 5} | options))
    graph, lora, frozen = split(adapted)
    adapted = merge(graph, jax.tree.map(lambda leaf: leaf + 0.05, lora), frozen)
    save_adapter(adapted, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(copy.deepcopy(torch_model), str(tmp_path / "adapter"))
    ids = tiny_models.prompt(40)
    found = tiny_models.ours(adapted, ids)
    assert np.max(np.abs(found - tiny_models.ours(model, ids))) > 1e-2
    assert np.max(np.abs(found - tiny_models.logits(theirs, ids))) <= 1e-4
    again = load_adapter(model, tmp_path / "adapter")
    assert again.adapter.dropout == options.get("dropout", 0.0)
    assert np.array_equal(tiny_models.ours(again, ids), found)


def test_gradients_of_linears_that_share_names_with_experts_are_those_of_peft(mixture, tmp_path):
    _, folder, model = mixture
    adapted = add_lora(model, LoRAConfig(rank=2, targets=(*EXPERTS, "all-linear")))
    graph, lora, frozen = split(adapted)
    adapted = merge(graph, jax.tree.map(lambda leaf: leaf + 0.05, lora), frozen)
    save_adapter(adapted, tmp_path / "adapter")
    report = verify_model(str(folder), adapter=str(tmp_path / "adapter"), tokens=40)
    names = [difference.name for difference in report.gradients]
    assert "layers.1.mlp.experts.gate_up_proj.lora_B" in names and report.passed


def test_adapters_of_linears_that_share_names_with_experts_are_combined(tmp_path, mixture):
    _, _, model = mixture
    if model.config.family == "mixtral":
        pytest.skip("nothing shares their names")
    for rank in (2, 3):
        adapted = add_lora(model, LoRAConfig(rank=rank, seed=rank, rank_pattern={"down_proj": 1}))
        graph, lora, frozen = split(adapted)
        adapted = merge(graph, jax.tree.map(lambda leaf: leaf + 0.05, lora), frozen)
        save_adapter(adapted, tmp_path / f"a{rank}")
    folders = [tmp_path / "a2", tmp_path / "a3"]
    combine_adapters(folders, [0.5, -2.0], tmp_path / "both")
    base, both, *single = (
        flat_arrays(merge_lora(load_adapter(model, path)) if path else model)
        for path in (None, tmp_path / "both", *folders)
    )
    for name, array in both.items():
        expected = base[name] + 0.5 * (single[0][name] - base[name]) - 2.0 * (single[1][name] - base[name])
        assert np.max(np.abs(array - expected)) <= 1e-6, name


def test_dropout_beside_parameters_is_that_of_the_manifest(mixture, tmp_path):
    _, _, model = mixture
    save_adapter(add_lora(model, LoRAConfig(rank=2, dropout=0.25)), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["lora_dropout"] == 0.0) == bool(config["target_parameters"])
    manifest = tmp_path / "adapter" / "pronghorn.json"
    for wrong in (1.5, "0.1", None):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"dropout": wrong}))
        assert load_adapter(model, tmp_path / "adapter").adapter.dropout == config["lora_dropout"]


def test_experts_whose_files_have_other_names_than_the_memory_of_transformers(tmp_path):
    built = tiny_torch_model(
        "granitemoehybrid",
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=20,
        shared_intermediate_size=24,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_state=8,
        mamba_chunk_size=16,
        pad_token_id=None,
    )
    model = load_model(tiny_models.save(built, tmp_path / "base"))
    family = family_named("granite4")
    ways = family.names_in_memory, family.fused_tensors, family.interleaved_tensors

    def merged(adapter):
        found = PeftModel.from_pretrained(copy.deepcopy(built), str(adapter)).merge_and_unload().state_dict()
        state = {name: tensor.numpy() for name, tensor in found.items()}
        return by_our_names(state, *(way(model.config) for way in ways))

    both = ["experts.gate_up_proj", "experts.down_proj"]
    options = LoraConfig(
        r=3, lora_alpha=7, target_modules=["in_proj"], target_parameters=both, init_lora_weights=False
    )
    get_peft_model(copy.deepcopy(built), options).save_pretrained(str(tmp_path / "peft"))
    adapted, expected = load_adapter(model, tmp_path / "peft"), merged(tmp_path / "peft")
    assert len(changed(model, expected)) == 2 * 3 + 1
    assert_merged_alike(adapted, expected)
    save_adapter(adapted, tmp_path / "ours")
    assert_merged_alike(adapted, merged(tmp_path / "ours"))
    graph, lora, frozen = split(add_lora(model, LoRAConfig(rank=2, targets=("experts.up_proj",))))
    alone = merge(graph, jax.tree.map(lambda leaf: leaf + 0.1, lora), frozen)
    save_adapter(alone, tmp_path / "up")
    again = merged(tmp_path / "up")
    assert changed(model, again) == {f"layers.{index}.mlp.experts.up_proj" for index in range(2)}
    assert_merged_alike(alone, again)
