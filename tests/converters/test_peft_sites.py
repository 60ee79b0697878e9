"""Adapters on linears that transformers has as one and we have as several: exact both ways, or refused."""

import copy
import dataclasses
import functools

import numpy as np
import pytest

from pronghorn.converters.huggingface import load_model
from pronghorn.converters.peft import WEIGHTS_NAME, load_adapter, save_adapter
from pronghorn.converters.peft_config import read_config
from pronghorn.converters.peft_sites import peft_sites
from pronghorn.converters.safetensors_files import read_header
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig, add_lora, attach, merge_lora
from pronghorn.lora_sites import sites
from pronghorn.models import flat_arrays
from pronghorn.models.families import family_named
from pronghorn.models.tensor_names import by_our_names
from pronghorn.verification import verify_model
from tests.converters.test_peft import randomised
from tests.models.reference import tiny_torch_model

pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def phi3():
    return tiny_torch_model("phi3", num_hidden_layers=1, pad_token_id=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phi3")
    phi3().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return load_model(folder)


def merged_by_peft(adapter, model):
    """PEFT's merged weights by our names."""
    from peft import PeftModel

    state = PeftModel.from_pretrained(copy.deepcopy(phi3()), str(adapter)).merge_and_unload().state_dict()
    family = family_named(model.config.family)
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    return by_our_names(arrays, family.tensor_names(model.config), family.fused_tensors(model.config))


def made_by_peft(folder, **options):
    import peft

    options = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "init_lora_weights": False} | options
    peft.get_peft_model(copy.deepcopy(phi3()), peft.LoraConfig(**options)).save_pretrained(str(folder))
    return folder


def assert_merges_alike(adapter, model):
    expected = merged_by_peft(adapter, model)
    for name, array in flat_arrays(merge_lora(model)).items():
        np.testing.assert_allclose(np.asarray(array), expected[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("targets", "rank"),
    [("all-linear", 9), (("q_proj", "v_proj", "up_proj"), 6)],
)
def test_own_factors_of_each_part_are_blocks_of_one_and_come_back_bit_for_bit(
    base, tmp_path, targets, rank, use_rslora
):
    model = randomised(add_lora(base, LoRAConfig(rank=3, alpha=5, targets=targets, use_rslora=use_rslora)))
    save_adapter(model, tmp_path / "adapter")
    assert read_config(tmp_path / "adapter")["rank_pattern"]["qkv_proj"] == rank
    assert_merges_alike(tmp_path / "adapter", model)
    again = load_adapter(base, tmp_path / "adapter")
    for name, site in sites(model).items():
        factors, read = site.factors, sites(again)[name].factors
        assert (factors is None) == (read is None), name
        if factors is not None:
            assert np.array_equal(factors.a, read.a) and np.array_equal(factors.b, read.b), name
            assert factors.scale == pytest.approx(read.scale, rel=1e-15)


def test_one_a_for_all_parts_is_read_cut_and_written_back_as_it_was(base, tmp_path):
    made_by_peft(tmp_path / "theirs", rank_pattern={"qkv_proj": 4}, use_rslora=True)
    model = load_adapter(base, tmp_path / "theirs")
    assert_merges_alike(tmp_path / "theirs", model)
    save_adapter(model, tmp_path / "ours")
    theirs, ours = (read_header(tmp_path / made / WEIGHTS_NAME)[0] for made in ("theirs", "ours"))
    assert set(theirs) == set(ours)
    for name, stored in theirs.items():
        assert stored.read().tobytes() == ours[name].read().tobytes(), name


def test_parts_with_different_scales_are_refused(base, tmp_path):
    model = add_lora(base, LoRAConfig(rank=2, targets=("q_proj", "k_proj")))
    factors = {name: site.factors for name, site in sites(model).items() if site.factors is not None}
    name = "layers.0.self_attn.k_proj"
    factors[name] = factors[name]._replace(scale=3.0)
    model = attach(base, factors, dataclasses.replace(model.adapter, alpha_pattern=((name, 6.0),)))
    with pytest.raises(InputError, match=r"qkv_proj is one linear .* save_merged"):
        save_adapter(model, tmp_path / "adapter")


def test_gradients_of_both_forms_are_compared_with_peft(base, folder, tmp_path):
    model = randomised(add_lora(base, LoRAConfig(rank=2)))
    factors = {name: site.factors for name, site in sites(model).items() if site.adapted}
    one_a = factors["layers.0.self_attn.q_proj"].a
    for part in "kv":
        name = f"layers.0.self_attn.{part}_proj"
        factors[name] = factors[name]._replace(a=one_a)
    save_adapter(attach(base, factors, model.adapter), tmp_path / "adapter")
    assert read_config(tmp_path / "adapter")["rank_pattern"] == {"gate_up_proj": 4}
    report = verify_model(str(folder), adapter=str(tmp_path / "adapter"), tokens=40)
    assert report.passed, str(report)
    places = [name for name in peft_sites(base) if name.startswith("layers.")]
    assert {d.name for d in report.gradients} == {f"{name}.lora_{x}" for name in places for x in "AB"}


def test_targets_may_be_named_as_in_transformers(base):
    model = add_lora(base, LoRAConfig(rank=2, targets=("qkv_proj", "down_proj")))
    adapted = {name for name, site in sites(model).items() if site.adapted}
    assert adapted == {f"layers.0.self_attn.{x}_proj" for x in "qkv"} | {"layers.0.mlp.down_proj"}
