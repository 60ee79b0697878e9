"""gpt-oss as it is published, experts in MXFP4: kept packed, with the logits of transformers, and trained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.converters.huggingface import load_model, save_model
from pronghorn.converters.merged import save_merged
from pronghorn.converters.quantized_weights import stored_quantization
from pronghorn.converters.safetensors_files import TensorSpec, open_weights, read_header, write_file
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig, add_lora, merge, split
from pronghorn.models import Decoder
from pronghorn.models.families import family_named
from pronghorn.models.parameters import named_parameters
from pronghorn.quantization import MXFP4Array
from pronghorn.quantization.quantize_model import choose, empty_like, make_abstract
from pronghorn.training import losses
from tests.converters import tiny_models
from tests.models.reference import tiny_torch_model
from tests.tolerances import MODEL_GRADIENT, MODEL_LOGITS

EXPERTS, HIDDEN, WIDTH = 4, 64, 32
SIZES = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}


def save_published(folder, change=None):
    """A tiny gpt-oss with random codes and scales, as OpenAI's folders hold them."""
    model = tiny_torch_model(
        "gpt_oss",
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        head_dim=12,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        sliding_window=17,
        swiglu_limit=0.6,
        pad_token_id=None,
    )
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {name: stored.read() for name, stored in read_header(file)[0].items()}
    draw = np.random.default_rng(0)
    for layer in range(2):
        for name, (rows, columns) in SIZES.items():
            weight = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[weight]
            scales = draw.integers(121, 125, (EXPERTS, rows, columns // 32), np.uint8)
            blocks = draw.integers(0, 256, (*scales.shape, 16), np.uint8)
            tensors |= {f"{weight}_blocks": blocks, f"{weight}_scales": scales}
    if change is not None:
        change(tensors)
    write_file(file, {name: TensorSpec(a.dtype, a.shape) for name, a in tensors.items()}, tensors.get)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return save_published(tmp_path_factory.mktemp("mxfp4"))


@pytest.fixture(scope="module")
def reference(published):
    """The folder in transformers, dequantised as it loads."""
    import torch
    from transformers import AutoModelForCausalLM, Mxfp4Config

    way = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        str(published), quantization_config=way, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def dequantized(tree):
    is_weight = lambda leaf: hasattr(leaf, "dequantize")  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_weight(leaf) else leaf, tree, is_leaf=is_weight)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_experts_stay_packed_and_logits_are_those_of_transformers(published, reference, layers):
    model = load_model(published, layers=layers)
    held = {name: parameter.get() for name, parameter in named_parameters(model).items()}
    packed = {name for name, value in held.items() if isinstance(value, MXFP4Array)}
    assert packed == {
        f"layers.{i}.mlp.experts.{p}_proj.weight" for i in range(2) for p in ("gate", "up", "down")
    }
    assert sum(leaf.nbytes for name in packed for leaf in jax.tree.leaves(held[name])) == sum(
        stored.nbytes
        for name, stored in open_weights(published).items()
        if name.endswith(("_blocks", "_scales"))
    )
    state = reference.state_dict()
    for i in range(2):
        theirs = state[f"model.layers.{i}.mlp.experts.gate_up_proj"].numpy()
        for place, part in enumerate(("gate", "up")):
            ours = held[f"layers.{i}.mlp.experts.{part}_proj.weight"].dequantize()
            assert np.array_equal(ours, theirs[..., place::2].swapaxes(1, 2))
    ids = tiny_models.prompt(40)
    expected = tiny_models.logits(reference, ids)
    assert np.max(np.abs(tiny_models.ours(model, ids) - expected)) <= MODEL_LOGITS


def test_adapters_train_on_packed_experts_as_on_dequantised_ones(published):
    model = add_lora(load_model(published), LoRAConfig(rank=2, targets=("re:.*experts.*", "q_proj")))
    graph, lora, frozen = split(model)
    lora = jax.tree.map(lambda leaf: leaf + 0.05, lora)
    ids = jnp.asarray(tiny_models.prompt(24))
    batch = {"input_ids": ids, "labels": ids}
    gradient = jax.jit(jax.grad(lambda lora, frozen: losses.next_token(graph)(lora, frozen, batch)[0]))
    found, expected = gradient(lora, frozen), gradient(lora, dequantized(frozen))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(one - other) <= MODEL_GRADIENT * np.linalg.norm(other)


def test_what_is_saved_is_in_16_bits_and_transformers_reads_it(published, reference, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = load_model(published, dtype="bfloat16")
    save_model(model, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    stored = open_weights(tmp_path / "plain")
    for name, tensor in reference.state_dict().items():
        # Every value of these experts is exact in bf16.
        value = tensor.to(torch.bfloat16)
        assert stored[name].dtype.name == "bfloat16"
        assert np.array_equal(stored[name].read().astype(np.float32), value.float().numpy()), name

    adapted = add_lora(load_model(published), LoRAConfig(rank=2, targets=("re:.*experts.*", "q_proj")))
    graph, lora, frozen = split(adapted)
    adapted = merge(graph, jax.tree.map(lambda leaf: leaf + 0.05, lora), frozen)
    save_merged(adapted, None, tmp_path / "merged")
    reread = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32).eval()
    ids = tiny_models.prompt(40)
    assert np.max(np.abs(tiny_models.logits(reread, ids) - tiny_models.ours(adapted, ids))) <= 1e-3
    assert np.max(np.abs(tiny_models.logits(reference, ids) - tiny_models.ours(adapted, ids))) > 1e-2


def test_a_plan_is_of_the_leaves_that_are_loaded(published):
    model = load_model(published)
    planned = Decoder.abstract(model.config, dtype=model.dtype)
    parameters = named_parameters(planned)
    names = family_named("gpt_oss").tensor_names(model.config)
    chosen = choose(parameters, names, stored_quantization(published), strict=False)
    forms = {name: empty_like(parameters[name].shape, model.dtype, how) for name, how in chosen.items()}
    make_abstract(parameters, forms)
    loaded, abstract = split(model)[2], split(planned)[2]
    assert jax.tree.structure(loaded) == jax.tree.structure(abstract)
    for leaf, like in zip(jax.tree.leaves(loaded), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)


def test_another_quantisation_on_top_is_refused(published):
    with pytest.raises(InputError, match="is quantised as mxfp4 already"):
        load_model(published, quantization="nf4")


WEIGHT = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{WEIGHT}_scales"), "down_proj_blocks and no scales"),
        (lambda t: t.pop(f"{WEIGHT}_blocks"), "down_proj_scales and no blocks"),
        (lambda t: t.update({f"{WEIGHT}_scales": t[f"{WEIGHT}_scales"][:, 1:]}), r"scales uint8\[4, 63, 1\]"),
        (lambda t: t[f"{WEIGHT}_scales"].fill(255), "not finite"),
        (lambda t: [t.pop(f"{WEIGHT}_{part}") for part in ("blocks", "scales")], f"lack {WEIGHT}"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path, change, message):
    folder = save_published(tmp_path, change)
    with pytest.raises(InputError, match=message):
        load_model(folder)
