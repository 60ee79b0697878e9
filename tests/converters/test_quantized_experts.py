"""Mixtures of experts in 4 bits: quantised as they load, trained, merged, and written one expert at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.converters.huggingface import load_model, original_weights, save_model
from pronghorn.converters.merged import save_merged
from pronghorn.converters.quantized_weights import planned_quantization
from pronghorn.converters.safetensors_files import TensorSpec, open_weights, read_header, write_file
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig, add_lora, merge, split
from pronghorn.lora_sites import sites
from pronghorn.models.parameters import named_parameters
from pronghorn.quantization import FP8Array, NF4Array, is_quantized, quantize
from pronghorn.quantization.quantize_model import QuantizationConfig
from pronghorn.training import losses
from tests.converters import tiny_models
from tests.converters.test_fp8_checkpoints import TRANSFORMERS, published
from tests.models.reference import tiny_torch_model
from tests.quantization import reference
from tests.tolerances import MODEL_GRADIENT

EXPERTS, LAYERS = 4, 2
LINEARS = [f"layers.{i}.mlp.experts.{p}_proj.weight" for i in range(LAYERS) for p in ("gate", "up", "down")]
SIZES = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_hidden_layers": LAYERS}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = tiny_torch_model(
        "qwen3_moe",
        **SIZES,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        # Rows of whole blocks: where one ends inside a block, bitsandbytes 0.50 dequantises wrongly on a CPU.
        moe_intermediate_size=64,
        pad_token_id=None,
    )
    return tiny_models.save(model, tmp_path_factory.mktemp("sparse"))


def held(model):
    return {name: parameter.get() for name, parameter in named_parameters(model).items()}


def dequantized(tree):
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized
    )


def same_leaves(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        np.array_equal(a, b) for a, b in pairs
    )


def adapted(model):
    """The model with adapters on experts and on attention, whose B is not zero."""
    model = add_lora(model, LoRAConfig(rank=2, targets=("re:.*experts.*", "q_proj")))
    graph, lora, frozen = split(model)
    return merge(graph, jax.tree.map(lambda leaf: leaf + 0.05, lora), frozen)


@pytest.mark.parametrize(("kind", "layers"), [("nf4", "unrolled"), ("nf4", "scanned"), ("int8", "unrolled")])
def test_every_expert_is_quantised_as_its_own_tensor_would_be(base, kind, layers):
    model = held(load_model(base, quantization=kind, layers=layers))
    stored = open_weights(base)
    assert not any(is_quantized(value) for name, value in model.items() if name.endswith("mlp.gate.weight"))
    for name in LINEARS:
        for expert in range(EXPERTS):
            file_name = f"model.{name.replace('experts.', f'experts.{expert}.')}"
            alone = quantize(jnp.asarray(stored[file_name].read()), QuantizationConfig(kind))
            assert same_leaves(jax.tree.map(lambda leaf, e=expert: leaf[e], model[name]), alone)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_adapters_train_as_on_the_dequantised_model(base, layers):
    graph, lora, frozen = split(adapted(load_model(base, quantization="nf4", layers=layers)))
    ids = jnp.asarray(tiny_models.prompt(24))
    batch = {"input_ids": ids, "labels": ids}

    def gradient(frozen, **options):
        loss = losses.next_token(graph, **options)
        return jax.jit(jax.value_and_grad(lambda lora, frozen: loss(lora, frozen, batch)[0]))(lora, frozen)

    expected = gradient(dequantized(frozen))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))
    options = {"unrolled": {"mlp_tile_tokens": 16}, "scanned": {"memory_policy": "offload"}}
    for chosen in ({}, options[layers]):
        for one, other in zip(
            jax.tree.leaves(gradient(frozen, **chosen)), jax.tree.leaves(expected), strict=True
        ):
            assert np.linalg.norm(one - other) <= MODEL_GRADIENT * np.linalg.norm(other)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_folder_holds_experts_one_by_one_and_is_read_bit_for_bit(base, kind, tmp_path):
    model = load_model(base, quantization=kind)
    save_model(model, tmp_path / "small")
    scales = {"nf4": ".weight.absmax", "int8": ".SCB"}[kind]
    assert f"model.layers.1.mlp.experts.3.down_proj{scales}" in open_weights(tmp_path / "small")
    for layers in ("unrolled", "scanned"):
        again = load_model(tmp_path / "small", layers=layers)
        ours, theirs = held(model), held(again)
        assert all(same_leaves(ours[name], theirs[name]) for name in ours)
    assert not planned_quantization(tmp_path / "small").skips("model.layers.0.mlp.experts.up_proj")
    # Written anew from 16 bits: the same.
    save_model(load_model(base), tmp_path / "anew", quantization=kind)
    assert all(same_leaves(value, ours[name]) for name, value in held(load_model(tmp_path / "anew")).items())


def test_a_folder_that_bitsandbytes_would_write_of_each_expert_is_read(base, tmp_path):
    """Codes and scales by bitsandbytes itself, in the place of ours."""
    pytest.importorskip("bitsandbytes")
    save_model(load_model(base), tmp_path / "nf4", quantization=QuantizationConfig("nf4", nested=False))
    file, stored = tmp_path / "nf4" / "model.safetensors", open_weights(base)
    tensors = {name: tensor.read() for name, tensor in read_header(file)[0].items()}
    expected = {}
    for name in [name for name in stored if ".experts." in name]:
        codes, state = reference.quantize_4bit(stored[name].read(), "nf4", nested=False)
        tensors |= {name: codes.numpy(), f"{name}.absmax": state.absmax.numpy()}
        expected[name] = reference.dequantize_4bit(codes, state)
    write_file(file, {name: TensorSpec(a.dtype, a.shape) for name, a in tensors.items()}, tensors.get)
    model = held(load_model(tmp_path / "nf4"))
    for name in LINEARS:
        assert isinstance(model[name], NF4Array)
        for expert, matrix in enumerate(model[name].dequantize()):
            assert np.array_equal(matrix, expected[f"model.{name.replace('experts.', f'experts.{expert}.')}"])


def test_experts_that_transformers_left_in_16_bits_are_planned_so(base, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    way = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    AutoModelForCausalLM.from_pretrained(
        str(base), quantization_config=way, dtype=torch.float32, device_map="cpu"
    ).save_pretrained(tmp_path / "theirs")
    plan = planned_quantization(tmp_path / "theirs")
    for name, value in held(load_model(tmp_path / "theirs")).items():
        if name.endswith("_proj.weight"):
            assert is_quantized(value) is not plan.skips(f"model.{name}".removesuffix(".weight")), name
    assert plan.kind == "nf4"


def test_adapters_merge_into_what_was_trained_and_transformers_reads_it(base, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = adapted(load_model(base, quantization="nf4"))
    report = save_merged(model, None, tmp_path / "merged")
    assert report["kl_mean"] <= report["kl_mean_limit"] and report["adapter_kl_mean"] > 1e-3
    reread = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32).eval()
    ids = tiny_models.prompt(40)
    assert np.max(np.abs(tiny_models.logits(reread, ids) - tiny_models.ours(model, ids))) <= 1e-3


def test_adapters_of_experts_start_by_what_each_lost(base):
    """LoftQ: the best of rank 2 of each expert's own error."""
    model = load_model(base, quantization="nf4")
    config = LoRAConfig(rank=2, targets=("experts.up_proj",), init="loftq")
    adapted = add_lora(model, config, original=original_weights(base))
    stored, values = open_weights(base), held(model)
    for name, site in sites(adapted).items():
        if not name.endswith("experts.up_proj"):
            continue
        for expert in range(EXPERTS):
            own = stored[f"model.{name.replace('experts.', f'experts.{expert}.')}.weight"].read()
            error = own - np.asarray(values[f"{name}.weight"].dequantize()[expert])
            u, s, v = np.linalg.svd(error, full_matrices=False)
            found = site.factors.scale * np.asarray(site.factors.b[expert] @ site.factors.a[expert])
            np.testing.assert_allclose(found, (u[:, :2] * s[:2]) @ v[:2], atol=1e-6)


def test_experts_of_a_published_fp8_folder_stay_in_fp8(base, tmp_path):
    folder, matrices = published(base, tmp_path / "fp8", "block", TRANSFORMERS, suffix=".weight_scale_inv")
    model = load_model(folder)
    for name in LINEARS:
        value = held(model)[name]
        assert isinstance(value, FP8Array)
        for expert, matrix in enumerate(value.dequantize()):
            assert np.array_equal(matrix, matrices[f"model.{name.replace('experts.', f'experts.{expert}.')}"])
    graph, lora, frozen = split(adapted(model))
    ids = jnp.asarray(tiny_models.prompt(24))
    loss = losses.next_token(graph)
    gradient = jax.jit(
        jax.grad(lambda lora, frozen: loss(lora, frozen, {"input_ids": ids, "labels": ids})[0])
    )
    # Attention's products round their activations to FP8; those of experts do not.
    dense = jax.tree.map(
        lambda leaf: leaf.dequantize() if is_quantized(leaf) and leaf.ndim == 3 else leaf,
        frozen,
        is_leaf=is_quantized,
    )
    found, expected = gradient(lora, frozen), gradient(lora, dense)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(one - other) <= MODEL_GRADIENT * np.linalg.norm(other)


def test_experts_of_one_layer_that_are_not_alike_are_refused(base, tmp_path):
    save_model(load_model(base), tmp_path / "nf4", quantization="nf4")
    file, plain = tmp_path / "nf4" / "model.safetensors", open_weights(base)
    tensors = {name: tensor.read() for name, tensor in read_header(file)[0].items()}
    weight = "model.layers.0.mlp.experts.2.up_proj.weight"
    tensors = {name: array for name, array in tensors.items() if not name.startswith(weight)}
    tensors[weight] = plain[weight].read()
    write_file(file, {name: TensorSpec(a.dtype, a.shape) for name, a in tensors.items()}, tensors.get)
    with pytest.raises(InputError, match=r"experts.2.up_proj.weight is not quantised as .*experts.0.up_proj"):
        load_model(tmp_path / "nf4")


def test_gpt_oss_holds_its_experts_in_4_bits_and_writes_them_in_16(tmp_path):
    sizes = {"intermediate_size": 32, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    torch_model = tiny_torch_model("gpt_oss", **SIZES, **sizes, sliding_window=17, pad_token_id=None)
    tiny_models.save(torch_model, tmp_path / "base")
    model = load_model(tmp_path / "base", quantization="nf4")
    values = held(model)
    assert all(isinstance(values[name], NF4Array) for name in LINEARS)
    save_model(model, tmp_path / "small")
    again = held(load_model(tmp_path / "small"))
    for name, value in values.items():
        expected = value.dequantize() if name in LINEARS else value
        assert same_leaves(again[name], expected), name
