"""Single-layer names, and assignment by name, in both layouts."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.models import Decoder, DecoderConfig, LoRAParam, assign, flat_arrays, named_parameters
from pronghorn.models.parameters import reading_order
from pronghorn.models.qwen3 import FAMILY
from pronghorn.quantization import QuantizationConfig
from pronghorn.quantization.quantize_model import choose, empty_like, make_abstract

CONFIG = DecoderConfig(
    "qwen3", 131, 48, 80, 5, 6, 2, 10, 512, qk_norm=True, qkv_bias=True, sliding_window=3,
    layer_kinds=("sliding", "full", "sliding", "full", "sliding"),
)  # fmt: skip


def host_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {n: p.shape for n, p in named_parameters(Decoder.abstract(CONFIG)).items()}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_names_are_those_of_the_checkpoint_in_order_of_layers(layers):
    names = list(named_parameters(Decoder.abstract(CONFIG, layers=layers)))
    assert sorted(names) == sorted(FAMILY.tensor_names(CONFIG))
    order = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    assert order == sorted(order)
    assert names[0] == "embed_tokens.weight" and names[-2:] == ["norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_what_is_assigned_is_read_back(layers):
    arrays = host_arrays()
    model = Decoder.abstract(CONFIG, dtype=jnp.float32, layers=layers)
    assign(model, arrays)
    read = flat_arrays(model)
    assert list(read) == list(named_parameters(model))
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, err_msg=name)
        assert isinstance(read[name], jax.Array)


def test_values_are_cast_to_the_dtype_of_the_model_bit_for_bit():
    arrays = host_arrays()
    for layers in ("unrolled", "scanned"):
        model = Decoder.abstract(CONFIG, dtype=jnp.bfloat16, layers=layers)
        assign(
            model, {name: jnp.asarray(array) if "mlp" in name else array for name, array in arrays.items()}
        )
        for name, parameter in named_parameters(model).items():
            assert parameter.dtype == jnp.bfloat16
            np.testing.assert_array_equal(
                parameter.get(), arrays[name].astype(ml_dtypes.bfloat16), err_msg=name
            )


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_a_partial_assignment_leaves_the_rest_alone(layers):
    arrays = host_arrays()
    model = Decoder.abstract(CONFIG, dtype=jnp.float32, layers=layers)
    assign(model, arrays)
    new = np.full((80, 48), 2.0, np.float32)
    assign(model, {"layers.2.mlp.up_proj.weight": new}, strict=False)
    for name, array in flat_arrays(model).items():
        np.testing.assert_array_equal(array, new if name == "layers.2.mlp.up_proj.weight" else arrays[name])


def test_an_adapter_is_named_beside_its_weight_and_stacked_with_it():
    model = Decoder.abstract(CONFIG, dtype=jnp.float32, layers="scanned")
    segment = model.segments[0]
    assert segment.stacked and len(segment.layers) == 2 and segment.repeats == 2
    segment.layers[1].mlp.up_proj.lora_A = LoRAParam(
        jnp.arange(2 * 3 * 48.0).reshape(2, 3, 48), logical_axes=("layers", "rank", "hidden")
    )
    parameter = named_parameters(model)["layers.3.mlp.up_proj.lora_A"]
    assert parameter.shape == (3, 48) and parameter.logical_axes == ("rank", "hidden")
    np.testing.assert_array_equal(parameter.get(), jnp.arange(2 * 3 * 48.0).reshape(2, 3, 48)[1])


def test_a_lazy_mapping_is_read_once_a_name():
    arrays, reads = host_arrays(), []

    class Lazy(dict):
        def __getitem__(self, name):
            reads.append(name)
            return arrays[name]

    assign(Decoder.abstract(CONFIG, layers="scanned"), Lazy.fromkeys(arrays))
    assert sorted(reads) == sorted(arrays)


def test_missing_unknown_and_misshapen_arrays_are_refused_by_name():
    arrays = host_arrays()
    model = Decoder.abstract(CONFIG, layers="scanned")
    with pytest.raises(InputError, match=r"lack layers\.4\.self_attn\.q_norm\.weight"):
        assign(model, {n: a for n, a in arrays.items() if n != "layers.4.self_attn.q_norm.weight"})
    with pytest.raises(InputError, match=r"no parameter layers\.9\.x"):
        assign(model, arrays | {"layers.9.x": np.zeros(1)}, strict=False)
    with pytest.raises(InputError, match=r"embed_tokens\.weight has shape \[130, 48\] .* \[131, 48\]"):
        assign(model, arrays | {"embed_tokens.weight": np.zeros((130, 48))})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight has shape"):
        assign(model, arrays | {"layers.1.mlp.up_proj.weight": np.zeros((48, 80))})


def test_one_slice_of_an_abstract_stack_is_not_enough():
    with pytest.raises(InputError, match=r"slices \[1\] are not given"):
        assign(
            Decoder.abstract(CONFIG, layers="scanned"),
            {"layers.0.mlp.up_proj.weight": np.zeros((80, 48))},
            strict=False,
        )


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_every_parameter_names_its_axes(layers):
    for name, parameter in named_parameters(Decoder.abstract(CONFIG, layers=layers)).items():
        assert len(parameter.logical_axes) == len(parameter.shape), name
        assert "layers" not in parameter.logical_axes
        assert len(parameter.variable.logical_axes) == len(parameter.variable.get_value().shape)


def test_weights_that_are_quantised_are_read_from_the_largest_to_the_smallest():
    model = Decoder.abstract(CONFIG)
    parameters = named_parameters(model)
    assert reading_order(model) == list(parameters)
    names = FAMILY.tensor_names(CONFIG)
    ways = choose(parameters, names, QuantizationConfig("nf4"))
    make_abstract(parameters, {n: empty_like(parameters[n].shape, jnp.bfloat16, ways[n]) for n in ways})
    sizes = [math.prod(parameters[name].shape) for name in reading_order(model)]
    assert sorted(reading_order(model)) == sorted(parameters)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2
