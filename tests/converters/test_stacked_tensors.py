"""Experts that lie in a file as transformers holds them, all of a layer in one tensor."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pronghorn.converters.huggingface import load_model, save_model
from pronghorn.errors import InputError
from pronghorn.models import flat_arrays
from tests.models.reference import tiny_torch_model

SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a folder with experts one by one, the same with those of a layer in one tensor)."""
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    tiny_torch_model("qwen3_moe", head_dim=12, pad_token_id=None, **SIZES).save_pretrained(one)
    tensors = load_file(one / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack([tensors.pop(f"{prefix}{expert}.{name}_proj.weight") for expert in range(4)])
            for name in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}gate_up_proj": np.concatenate([gate, up], axis=1), f"{prefix}down_proj": down}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text((one / "config.json").read_text())
    return one, other


def test_they_are_read_bit_for_bit_and_written_one_by_one(folders, tmp_path):
    one, other = (flat_arrays(load_model(folder)) for folder in folders)
    assert sorted(one) == sorted(other)
    assert all(np.array_equal(array, other[name]) for name, array in one.items())
    save_model(load_model(folders[1]), tmp_path / "saved")
    saved, original = (
        load_file(tmp_path / "saved" / "model.safetensors"),
        load_file(folders[0] / "model.safetensors"),
    )
    assert sorted(saved) == sorted(original)
    assert all(np.array_equal(array, saved[name]) for name, array in original.items())


def test_those_of_another_number_of_experts_are_refused(folders, tmp_path):
    config = json.loads((folders[1] / "config.json").read_text())
    counts = {key: 5 for key in ("num_experts", "num_local_experts") if key in config}
    (tmp_path / "config.json").write_text(json.dumps(config | counts))
    (tmp_path / "model.safetensors").write_bytes((folders[1] / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"lack model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight"):
        load_model(tmp_path)
