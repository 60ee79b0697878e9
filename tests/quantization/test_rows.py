"""Rows of a quantised matrix keep their values, cut out and put together again; so do folders of fused linears."""

import numpy as np
import pytest

from pronghorn.converters.huggingface import load_model, save_model
from pronghorn.models import flat_arrays
from pronghorn.quantization.int8 import quantize_int8
from pronghorn.quantization.nf4 import quantize_4bit
from pronghorn.quantization.rows import cut_rows, join_rows
from tests.models.family_checks import _quantized_by_transformers, _with_dequantized
from tests.models.reference import tiny_torch_model


def leaves(array):
    return {name: value for name, value in vars(array).items() if isinstance(value, np.ndarray)}


def matrix(rows, width, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, width), np.float32)


@pytest.mark.parametrize(
    ("quantize", "cuts", "plain"),
    [
        (lambda w: quantize_4bit(w), (256, 128), False),  # 16,384 elements are a group of scales
        (lambda w: quantize_4bit(w), (256, 100, 28), True),
        (lambda w: quantize_4bit(w, kind="fp4", nested=False), (1, 383), True),
        (quantize_int8, (200, 184), None),
    ],
    ids=["nested", "inside of a group", "plain", "int8"],
)
def test_rows_are_those_of_the_whole_and_joined_give_it_back(quantize, cuts, plain):
    whole = quantize(matrix(384, 128))
    edges = np.cumsum([0, *cuts])
    parts = [cut_rows(whole, int(first), rows) for first, rows in zip(edges, cuts, strict=False)]
    expected = np.asarray(whole.dequantize())
    for part, first, rows in zip(parts, edges, cuts, strict=False):
        assert part.shape == (rows, 128)
        np.testing.assert_array_equal(np.asarray(part.dequantize()), expected[first : first + rows])
    joined = join_rows(parts)
    np.testing.assert_array_equal(np.asarray(joined.dequantize()), expected)
    if plain is not True:
        assert all(np.array_equal(value, leaves(joined)[name]) for name, value in leaves(whole).items())
    elif plain:
        assert not joined.nested


def test_parts_quantised_by_themselves_are_joined_value_for_value_and_different_kinds_are_not():
    parts = [quantize_4bit(matrix(64, 128, seed)) for seed in (1, 2)]
    expected = np.concatenate([np.asarray(part.dequantize()) for part in parts])
    np.testing.assert_array_equal(np.asarray(join_rows(parts).dequantize()), expected)
    assert join_rows([parts[0], quantize_int8(matrix(64, 128))]) is None
    assert join_rows([parts[0], quantize_4bit(matrix(64, 128), kind="fp4")]) is None


def test_folder_of_fused_linears_is_written_for_transformers_as_it_was_read_or_quantised(tmp_path):
    original = tiny_torch_model("phi3", num_hidden_layers=1, pad_token_id=None)
    original.save_pretrained(tmp_path / "base")
    _quantized_by_transformers(tmp_path / "base").save_pretrained(tmp_path / "theirs")
    for name, model in {
        "read": load_model(tmp_path / "theirs", dtype="float32"),
        "quantised": load_model(tmp_path / "base", quantization="nf4"),
    }.items():
        save_model(model, tmp_path / name)
        import torch
        from transformers import AutoModelForCausalLM

        reread = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32, device_map="cpu")
        state = _with_dequantized(original, reread).state_dict()
        ours = {
            name: np.asarray(getattr(w, "dequantize", lambda w=w: w)())
            for name, w in flat_arrays(model).items()
        }
        qkv = np.concatenate([ours[f"layers.0.self_attn.{x}_proj.weight"] for x in "qkv"])
        np.testing.assert_allclose(state["model.layers.0.self_attn.qkv_proj.weight"].numpy(), qkv, atol=1e-7)
        down = state["model.layers.0.mlp.down_proj.weight"].numpy()
        np.testing.assert_allclose(down, ours["layers.0.mlp.down_proj.weight"], atol=1e-7)
