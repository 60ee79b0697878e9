"""Folders that transformers and bitsandbytes quantised, read here; and ours, read there."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.converters.huggingface import load_model, save_model
from pronghorn.converters.safetensors_files import read_header, write_file
from pronghorn.errors import InputError
from pronghorn.models.parameters import named_parameters
from pronghorn.quantization import Int8Array, NF4Array, QuantizationConfig
from tests.converters import tiny_models

pytest.importorskip("bitsandbytes")

SKIPPED = ["lm_head", "model.layers.1.mlp", "model.layers.2.self_attn.q_proj"]
# Rows of whole blocks: where a row of 96 ends inside a block of 64, bitsandbytes 0.50 dequantises wrongly on a CPU.
SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A 16-bit model of transformers, fp32."""
    return tiny_models.save(tiny_models.make("llama", **SIZES), tmp_path_factory.mktemp("base"))


def quantized_by_transformers(base, folder, *, skip=None, **options):
    """Quantise while loading, and save before any forward pass: on some CPUs one would repack the weights."""
    import torch
    import transformers

    options.setdefault("load_in_4bit", not options.get("load_in_8bit", False))
    config = transformers.BitsAndBytesConfig(
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=skip, **options
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(base), quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(str(folder))
    return model


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """{name: (folder, the model of transformers that was saved)}."""
    made = {}
    for name, options in {
        "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "fp4": {"bnb_4bit_quant_type": "fp4"},
        "mixed": {"bnb_4bit_quant_type": "nf4", "skip": SKIPPED},
        "int8": {"load_in_8bit": True},
    }.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = (folder, quantized_by_transformers(base, folder, **options))
    return made


def values(model):
    return {
        name: np.asarray(p.get().dequantize() if hasattr(p.get(), "dequantize") else p.get())
        for name, p in named_parameters(model).items()
    }


@pytest.mark.parametrize("name", ["nf4", "fp4", "mixed", "int8"])
def test_logits_are_those_of_transformers(folders, name):
    folder = folders[name][0]
    ids = tiny_models.prompt(40)
    ours = tiny_models.ours(load_model(folder, dtype="float32"), ids)
    theirs = _dequantizing(folder)
    assert np.max(np.abs(ours - tiny_models.logits(theirs, ids))) <= 1e-3


def _dequantizing(folder):
    """The folder in transformers, computing in fp32; in training mode, where nothing is repacked for the CPU."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), device_map="cpu", dtype=torch.float32
    )
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return model.train()


def test_skipped_modules_stay_as_they_are(folders):
    parameters = named_parameters(load_model(folders["mixed"][0]))
    quantized = {name for name, p in parameters.items() if isinstance(p.get(), NF4Array)}
    assert "layers.0.mlp.up_proj.weight" in quantized and "layers.1.mlp.up_proj.weight" not in quantized
    assert "layers.2.self_attn.k_proj.weight" in quantized
    assert "layers.2.self_attn.q_proj.weight" not in quantized and "lm_head.weight" not in quantized


def test_a_scanned_model_equals_an_unrolled_one(folders):
    ids = tiny_models.prompt(24)
    scanned, unrolled = (load_model(folders["nf4"][0], layers=layout) for layout in ("scanned", "unrolled"))
    np.testing.assert_allclose(tiny_models.ours(scanned, ids), tiny_models.ours(unrolled, ids), atol=1e-5)
    with pytest.raises(InputError, match="unrolled"):
        load_model(folders["mixed"][0], layers="scanned")


@pytest.mark.parametrize("name", ["nf4", "fp4", "mixed", "int8"])
def test_a_loaded_folder_is_written_back_tensor_for_tensor(folders, name, tmp_path):
    folder = folders[name][0]
    save_model(load_model(folder), tmp_path / "out")
    before, after = (read_header(f / "model.safetensors")[0] for f in (folder, tmp_path / "out"))
    assert set(before) == set(after)
    for tensor, stored in before.items():
        if "quant_state" not in tensor:
            assert stored.read().tobytes() == after[tensor].read().tobytes(), tensor
            assert stored.shape == after[tensor].shape
        else:
            state, written = (json.loads(t.read().tobytes()) for t in (stored, after[tensor]))
            assert state == written and list(state) == list(written)
    theirs, ours = (
        json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path / "out")
    )
    assert set(ours) == set(theirs)
    assert {k: v for k, v in ours.items() if k != "llm_int8_skip_modules"} == {
        k: v for k, v in theirs.items() if k != "llm_int8_skip_modules"
    }


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_quantising_while_loading_gives_the_codes_of_bitsandbytes(base, folders, kind, layers):
    quantization = QuantizationConfig(kind, nested=kind == "nf4")
    ours = named_parameters(load_model(base, layers=layers, quantization=quantization))
    theirs = named_parameters(load_model(folders[kind][0]))
    quantized = [name for name, p in theirs.items() if hasattr(p.get(), "dequantize")]
    assert len(quantized) == 21
    for name in quantized:
        assert np.array_equal(ours[name].get().codes, theirs[name].get().codes), name
    assert not any(hasattr(p.get(), "dequantize") for name, p in ours.items() if name not in quantized)


def test_a_folder_of_ours_loads_in_transformers(base, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    mixed = QuantizationConfig(
        "nf4", skip=("model.layers.1.mlp",), modules=(("model.layers.2.mlp.up_proj", "int8"),)
    )
    model = load_model(base, quantization=mixed)
    assert isinstance(named_parameters(model)["layers.2.mlp.up_proj.weight"].get(), Int8Array)
    save_model(model, tmp_path / "out")
    # 8 bits beside 4 are not in the format: their very values are written in 16 bits (here 32).
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert "model.layers.2.mlp.up_proj" in config["llm_int8_skip_modules"]
    theirs = _dequantizing(tmp_path / "out")
    ids = tiny_models.prompt(40)
    assert np.max(np.abs(tiny_models.ours(model, ids) - tiny_models.logits(theirs, ids))) <= 1e-3


def test_a_16_bit_model_is_quantised_while_it_is_saved(base, tmp_path):
    save_model(load_model(base), tmp_path / "out", quantization="nf4")
    expected = values(load_model(base, quantization="nf4"))
    for name, value in values(load_model(tmp_path / "out")).items():
        assert np.array_equal(value, expected[name]), name


def test_what_is_not_finite_is_refused(base, tmp_path):
    torn = rewritten(base, tmp_path, lambda name, array: array * (np.nan if "layers.1.mlp.up" in name else 1))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(torn, quantization="nf4")


def rewritten(folder, out, change):
    """A copy of a folder with each tensor changed, or left out where `change` returns None."""
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text((folder / "config.json").read_text())
    stored, _ = read_header(folder / "model.safetensors")
    arrays = {name: change(name, tensor.read()) for name, tensor in stored.items()}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    write_file(out / "model.safetensors", arrays, arrays.get)
    return out


def changed_state(**changes):
    def change(name, array):
        if "layers.0.mlp.up_proj.weight.quant_state" not in name:
            return array
        state = json.loads(array.tobytes()) | changes
        return np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


def without(part):
    return lambda name, array: None if name.endswith(f"layers.0.mlp.up_proj.weight.{part}") else array


@pytest.mark.parametrize(
    "change,words",
    [
        (changed_state(blocksize=48), "blocks of 48"),
        (changed_state(dtype="float8"), "float8"),
        (changed_state(shape=[128, 65]), "codes"),
        (changed_state(nested_offset=None), "nested_offset"),
        (without("nested_quant_map"), "nested_quant_map"),
        (without("nested_absmax"), "nested_absmax"),
        (without("absmax"), "absmax"),
        (lambda name, a: a[:-1] if name.endswith("0.mlp.up_proj.weight.absmax") else a, "absmax"),
        (without("quant_map"), "quant_map"),
        (without("quant_state.bitsandbytes__nf4"), "no quant_state"),
        (lambda name, a: a[:-3] if "0.mlp.up_proj.weight.quant_state" in name else a, "not valid JSON"),
    ],
)
def test_damaged_parts_are_refused_by_name(folders, tmp_path, change, words):
    with pytest.raises(InputError, match=words) as refusal:
        load_model(rewritten(folders["nf4"][0], tmp_path, change))
    assert "layers.0.mlp.up_proj.weight" in str(refusal.value) and "model.safetensors" in str(refusal.value)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda name, array: array[:-1] if name.endswith("0.mlp.up_proj.SCB") else array, "SCB"),
        (
            lambda name, array: None if name.endswith("0.mlp.up_proj.weight") else array,
            "8-bit scales and is no int8 matrix",
        ),
        (
            lambda name, array: (
                np.ones_like(array) if name.endswith("0.mlp.up_proj.weight_format") else array
            ),
            "layout of old GPUs",
        ),
    ],
)
def test_damaged_8_bit_parts_are_refused_by_name(folders, tmp_path, change, words):
    with pytest.raises(InputError, match=words) as refusal:
        load_model(rewritten(folders["int8"][0], tmp_path, change))
    assert "layers.0.mlp.up_proj.weight" in str(refusal.value) and "model.safetensors" in str(refusal.value)


def test_a_quantised_module_that_the_config_skips_is_refused(folders, tmp_path):
    folder = rewritten(folders["nf4"][0], tmp_path, lambda name, array: array)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "model.layers.2.mlp"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="skip_modules"):
        load_model(folder)


def test_another_kind_than_the_folders_is_refused(folders):
    with pytest.raises(InputError, match="nf4 already"):
        load_model(folders["nf4"][0], quantization="int8")
    assert load_model(folders["nf4"][0], quantization="nf4").adapter is None


def test_int8_arrays_take_the_dtype_of_the_rest(folders):
    parameters = named_parameters(load_model(folders["int8"][0]))
    value = parameters["layers.0.mlp.up_proj.weight"].get()
    assert isinstance(value, Int8Array) and value.dtype == jnp.float32
    assert jax.tree.leaves(value)[0].dtype == jnp.int8
