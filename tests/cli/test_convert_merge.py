"""`convert` keeps every bit that it is not asked to change; `merge` writes what `train --merge` does."""

import json

import numpy as np
import pytest

from pronghorn.converters.huggingface import load_model
from pronghorn.converters.safetensors_files import open_weights
from pronghorn.models import named_parameters
from tests.cli.conftest import invoke, tree


def weights(folder):
    return {name: tensor.read() for name, tensor in open_weights(folder).items()}


def convert(source, out, *options):
    finished = invoke("convert", source, out, "--json", out.with_suffix(".json"), *options)
    assert finished.code == 0, finished.err
    return json.loads(out.with_suffix(".json").read_text())


def test_converted_folder_is_bit_exact(model_dir, tmp_path):
    numbers = convert(model_dir, tmp_path / "out")
    before, after = tree(model_dir), tree(tmp_path / "out")
    assert before == after
    expected = sum(np.prod(p.shape) for p in named_parameters(load_model(model_dir)).values())
    assert numbers["parameters"] == expected and numbers["dtype"] == "float32"


def test_16_bit_weights_survive_a_second_conversion_bit_by_bit(model_dir, tmp_path):
    numbers = convert(model_dir, tmp_path / "once", "--dtype", "bfloat16")
    convert(tmp_path / "once", tmp_path / "twice")
    once, twice = weights(tmp_path / "once"), weights(tmp_path / "twice")
    assert numbers["dtype"] == "bfloat16" and {str(array.dtype) for array in once.values()} == {"bfloat16"}
    assert once.keys() == twice.keys()
    assert all(once[name].tobytes() == twice[name].tobytes() for name in once)


def test_shards_hold_the_same_weights(model_dir, tmp_path):
    convert(model_dir, tmp_path / "out", "--max-shard-gib", 50_000 / 2**30)
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "out/model.safetensors.index.json").is_file()
    before, after = weights(model_dir), weights(tmp_path / "out")
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


@pytest.fixture(scope="module")
def merged(run, model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("merge") / "merged"
    numbers = out.with_suffix(".json")
    finished = invoke("merge", model_dir, run.folder / "adapter", out, "--json", numbers)
    assert finished.code == 0, finished.err
    return out, json.loads(numbers.read_text()), finished.out


def test_merge_gives_the_weights_that_train_merge_gave(merged, run):
    out, _, _ = merged
    assert (out / "model.safetensors").read_bytes() == (run.merged / "model.safetensors").read_bytes()


def test_merge_tells_the_divergence_that_it_wrote_beside_the_weights(merged):
    out, numbers, shown = merged
    assert json.loads((out / "merge_check.json").read_text()) == numbers
    assert numbers["kl_mean"] <= 1e-6 < 1e-3 < numbers["adapter_kl_mean"]
    assert f"mean KL to the live model {numbers['kl_mean']:.3e}" in shown


@pytest.mark.parametrize(
    "options,base", [((), "dequantised"), (("--onto", "BASE", "--write", "nf4"), "BASE")]
)
def test_merge_offers_both_bases_of_a_quantised_model(run, model_dir, tmp_path, options, base):
    chosen = [str(model_dir) if option == "BASE" else option for option in options]
    arguments = [model_dir, run.folder / "adapter", tmp_path / "out", "--quantization", "nf4", *chosen]
    finished = invoke("merge", *arguments, "--json", tmp_path / "out.json")
    assert finished.code == 0, finished.err
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["base"] == (str(model_dir) if base == "BASE" else base)
    assert numbers["kl_mean"] <= numbers["kl_mean_limit"] and "KL to the live model" in finished.out
    quantized = [p.get() for p in named_parameters(load_model(tmp_path / "out")).values()]
    assert any(hasattr(value, "dequantize") for value in quantized) == ("--write" in options)
    if base == "BASE":
        assert "merged into " + str(model_dir) in finished.out and "as written in nf4" in finished.out
        # The trained adapter does not know the 16-bit base, and quantising it again costs more.
        assert numbers["kl_mean"] < numbers["live_kl_mean"]
        assert not (tmp_path / "out/quantized").exists()
