"""Folders in FP8 as they are published: loaded as they are, and with the logits that transformers has for them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.converters.huggingface import load_model
from pronghorn.converters.safetensors_files import TensorSpec, read_header, write_file
from pronghorn.errors import InputError
from pronghorn.lora import merge, split
from pronghorn.models.parameters import named_parameters
from pronghorn.quantization import FP8Array, quantize_fp8
from pronghorn.quantization.fp8 import unrounded
from tests.converters import tiny_models

pytest.importorskip("torch")

TRANSFORMERS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
KINDS = {"block": "block", "row": "channel", "tensor": "tensor"}


def compressed(strategy):
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": strategy}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = tiny_models.make("llama", hidden_size=128, intermediate_size=160, num_hidden_layers=1)
    return tiny_models.save(model, tmp_path_factory.mktemp("base"))


def published(base, folder, scales, quantization_config, *, suffix=".weight_scale", change=None):
    """(the base in FP8, as others would store it; its matrices by name) with scales that are no powers of two."""
    folder.mkdir()
    tensors, matrices = {}, {}
    for name, stored in read_header(base / "model.safetensors")[0].items():
        value = stored.read()
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        weight = quantize_fp8(value, scales=scales)
        factors = (weight.scales * np.float32(1.125)).astype(np.float32)
        matrices[name] = np.asarray(FP8Array(weight.codes, factors, "float32").dequantize())
        shape = {"tensor": (1,), "row": (-1, 1)}.get(scales, factors.shape)
        tensors |= {name: weight.codes, name.removesuffix(".weight") + suffix: factors.reshape(shape)}
    if change is not None:
        change(tensors)
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in tensors.items()}
    write_file(folder / "model.safetensors", specs, tensors.get)
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": quantization_config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, matrices


@pytest.mark.parametrize("scales", KINDS)
def test_weights_are_those_of_the_file(base, tmp_path, scales):
    folder, matrices = published(base, tmp_path / "fp8", scales, compressed(KINDS[scales]))
    parameters = named_parameters(load_model(folder))
    for name, matrix in matrices.items():
        value = parameters[name.removeprefix("model.")].get()
        assert isinstance(value, FP8Array) and value.dtype == jnp.float32
        assert np.array_equal(value.dequantize(), matrix)


def test_logits_are_those_of_transformers(base, tmp_path):
    """With activations as they are: on a CPU transformers dequantises."""
    import torch
    import transformers

    folder, _ = published(base, tmp_path / "fp8", "block", TRANSFORMERS, suffix=".weight_scale_inv")
    config = transformers.FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), quantization_config=config, dtype=torch.float32
    )
    ids = tiny_models.prompt(40)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    graph, trainable, frozen = split(load_model(folder))
    exact = jax.tree.map(unrounded, frozen, is_leaf=lambda value: isinstance(value, FP8Array))
    assert np.max(np.abs(merge(graph, trainable, exact)(ids) - expected)) < 1e-4


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale"), "up_proj.weight has no scales"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": np.ones(3, np.float32)}),
            r"scales \[3\]",
        ),
        (lambda t: t.update({"x.weight_scale": np.ones(1, np.float32)}), "x.weight_scale and no FP8 weight"),
    ],
)
def test_parts_that_do_not_fit_are_named(base, tmp_path, change, message):
    folder, _ = published(base, tmp_path / "fp8", "row", compressed("channel"), change=change)
    with pytest.raises(InputError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    "config,message",
    [
        (TRANSFORMERS | {"weight_block_size": [64, 64]}, r"blocks of \[64, 64\]"),
        (compressed("group"), "scales a group"),
        (
            compressed("tensor") | {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}},
            "8-bit floats",
        ),
    ],
)
def test_what_is_not_known_is_refused(base, tmp_path, config, message):
    folder, _ = published(base, tmp_path / "fp8", "row", config)
    with pytest.raises(InputError, match=message):
        load_model(folder)
