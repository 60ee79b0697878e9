"""DoRA and the starts of adapters against PEFT: logits, every gradient, and exports both ways, in fp32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.converters.huggingface import load_model, original_weights
from pronghorn.converters.merged import save_merged
from pronghorn.converters.peft import load_adapter, save_adapter
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig, add_lora, merge, merge_lora, remove_lora, split
from pronghorn.lora_sites import Site, sites
from pronghorn.lora_start import start_factors
from pronghorn.models import Decoder, named_parameters
from pronghorn.training.guards import leaf_names
from tests.converters import tiny_models
from tests.converters.test_peft import peft_logits, transformers_model
from tests.tolerances import MODEL_GRADIENT, MODEL_LOGITS
from tests.training.small import small_config

pytestmark = pytest.mark.filterwarnings("ignore")
RANK, ALPHA = 3, 6
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_models.save(
        tiny_models.make("llama", num_hidden_layers=2), tmp_path_factory.mktemp("b") / "base"
    )


@functools.cache
def base_model(folder, **options):
    return load_model(folder, **options)


def in_peft(base, **options):
    import peft
    import torch

    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", target_modules=list(TARGETS), **options
    )
    return peft.get_peft_model(transformers_model(base), config)


def gradients_in_peft(model):
    """(logits, {name without prefix: gradient}) of a fixed scalar of the logits."""
    import torch

    logits = model(input_ids=torch.tensor(tiny_models.prompt()).long()).logits
    (logits * weights_of(logits.shape, torch)).sum().backward()
    named = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    strip = "base_model.model.model."
    named = {
        name.removeprefix(strip).removesuffix(".weight").removesuffix(".default"): gradient
        for name, gradient in named.items()
    }
    return logits.detach().numpy(), named


def weights_of(shape, library):
    ramp = np.cos(np.arange(int(np.prod(shape)))).reshape(tuple(shape)).astype(np.float32)
    return library.tensor(ramp) if library is not np else ramp


def gradients_here(model):
    graph, trainable, frozen = split(model)
    ids = jnp.asarray(tiny_models.prompt())

    @jax.jit
    def run(trainable):
        def loss(trainable):
            logits = merge(graph, trainable, frozen)(ids)
            return jnp.sum(logits * weights_of(logits.shape, np)), logits

        return jax.grad(loss, has_aux=True)(trainable)

    gradient, logits = run(trainable)
    return np.asarray(logits), dict(
        zip(leaf_names(gradient, model), map(np.asarray, jax.tree.leaves(gradient)), strict=True)
    )


def assert_same(ours, theirs):
    logits, gradients = ours
    assert np.abs(logits - theirs[0]).max() <= MODEL_LOGITS
    assert gradients.keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        size = np.linalg.norm(gradient)
        assert np.linalg.norm(gradients[name] - gradient) <= MODEL_GRADIENT * max(size, 1e-3), name


def with_peft_values(model, peft_model):
    """Our model with the trained values of PEFT's adapter."""
    values = {
        name.removeprefix("base_model.model.model.")
        .removesuffix(".weight")
        .removesuffix(".default"): p.detach().numpy()
        for name, p in peft_model.named_parameters()
        if "lora_" in name
    }
    graph, trainable, frozen = split(model)
    names = leaf_names(trainable, model)
    leaves = [jnp.asarray(values[name].copy()) for name in names]
    return merge(graph, jax.tree.unflatten(jax.tree.structure(trainable), leaves), frozen)


def randomise(peft_model):
    import torch

    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in peft_model.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn(p.shape) * 0.05)
    return peft_model


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_dora_is_pefts_in_logits_and_gradients_and_travels_both_ways(base, tmp_path, layers):
    peft_model = randomise(in_peft(base, use_dora=True))
    peft_model.save_pretrained(str(tmp_path / "theirs"))
    theirs = gradients_in_peft(peft_model)
    model = load_adapter(base_model(base, layers=layers), tmp_path / "theirs")
    if layers == "unrolled":
        assert_same(gradients_here(model), theirs)
    assert np.abs(tiny_models.ours(model, tiny_models.prompt()) - theirs[0]).max() <= MODEL_LOGITS
    save_adapter(model, tmp_path / "ours")
    assert np.abs(peft_logits(base, tmp_path / "ours") - theirs[0]).max() <= MODEL_LOGITS
    merged = tiny_models.ours(merge_lora(model), tiny_models.prompt())
    assert np.abs(merged - theirs[0]).max() <= MODEL_LOGITS
    if layers == "unrolled":
        check = save_merged(model, None, tmp_path / "merged")
        assert check["kl_mean"] <= 1e-6 and check["adapter_kl_mean"] > 1e-4


def test_dora_starts_as_its_base_whatever_its_dropout(base):
    model = add_lora(base_model(base), LoRAConfig(rank=RANK, use_dora=True, dropout=0.5, targets=("o_proj",)))
    graph, trainable, frozen = split(model)
    ids = jnp.asarray(tiny_models.prompt())
    # B is zero, so what A sees makes no difference: dropout drops inputs of A only.
    forward = jax.jit(
        lambda t, f, key: merge(graph, t, f).logits(merge(graph, t, f).hidden_states(ids, dropout_key=key))
    )
    before = tiny_models.ours(base_model(base), tiny_models.prompt())
    assert np.abs(before - forward(trainable, frozen, jax.random.key(0))).max() <= MODEL_LOGITS
    assert {n.rpartition(".")[2] for n in named_parameters(model) if "lora" in n} == {
        "lora_A", "lora_B", "lora_magnitude_vector",
    }  # fmt: skip


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_in_the_base_trains_as_pefts_and_is_exported_as_pefts_conversion(base, tmp_path, init):
    peft_model = in_peft(base, init_lora_weights=init)
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(str(tmp_path / "start"))
    peft_model.peft_config["default"].init_lora_weights = init
    model = add_lora(base_model(base), LoRAConfig(rank=RANK, alpha=ALPHA, targets=TARGETS, init=init))
    prompt = tiny_models.prompt()
    before = tiny_models.ours(base_model(base), prompt)
    assert np.abs(tiny_models.ours(model, prompt) - before).max() <= MODEL_LOGITS
    # Singular vectors have either sign: s B A is what has to agree.
    values = dict(peft_model.named_parameters())
    for name, site in sites(model).items():
        if site.adapted:
            a, b = (
                values[f"base_model.model.model.{name}.lora_{x}.default.weight"].detach().numpy()
                for x in "AB"
            )
            a_here, b_here = site.module.lora_A.get_value(), site.module.lora_B.get_value()
            np.testing.assert_allclose(b_here @ a_here, b @ a, atol=2e-5)
    randomise(peft_model)
    theirs = gradients_in_peft(peft_model)
    # From here on with PEFT's signs, so that the gradients of A and B can be compared.
    model = with_start_of(model, peft_model, tmp_path / "start")
    assert_same(gradients_here(model), theirs)
    save_adapter(model, tmp_path / "ours")
    assert np.abs(peft_logits(base, tmp_path / "ours") - theirs[0]).max() <= MODEL_LOGITS
    reloaded = load_adapter(remove_lora(model), tmp_path / "ours")
    assert reloaded.adapter.rank == 2 * RANK and reloaded.adapter.alpha == 2 * ALPHA
    assert np.array_equal(tiny_models.ours(reloaded, prompt), tiny_models.ours(model, prompt))
    peft_model.save_pretrained(
        str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    converted = load_adapter(base_model(base), tmp_path / "theirs")
    assert np.abs(tiny_models.ours(converted, prompt) - theirs[0]).max() <= MODEL_LOGITS


def with_start_of(model, peft_model, folder):
    """`model` with PEFT's start in the place of its own, and PEFT's trained values."""
    import safetensors.numpy

    stored = safetensors.numpy.load_file(str(folder / "adapter_model.safetensors"))
    for name, site in sites(model).items():
        if site.adapted:
            for letter in "AB":
                start = stored[f"base_model.model.model.{name}.lora_{letter}.weight"]
                getattr(site.module, f"lora_start_{letter}").set_value(jnp.asarray(start))
    return with_peft_values(model, peft_model)


def test_a_sketched_pissa_finds_the_principal_parts():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(40, 24)), jnp.float32)
    found = []
    for init in ("pissa", "pissa_niter_16"):
        config = LoRAConfig(rank=RANK, init=init)
        a, b, start = start_factors(config, weight.shape, weight, RANK, 2.0, jax.random.key(0), None)
        assert start[0] is a and start[1] is b
        found.append(2.0 * np.asarray(b) @ np.asarray(a))
    u, values, v = np.linalg.svd(np.asarray(weight), full_matrices=False)
    principal = u[:, :RANK] * values[:RANK] @ v[:RANK]
    assert np.linalg.norm(found[0] - principal) <= 1e-5 * np.linalg.norm(principal)
    assert np.linalg.norm(found[1] - principal) <= 5e-2 * np.linalg.norm(principal)


def test_loftq_mends_the_quantised_base_as_peft_does(base):
    import torch
    from peft.utils.loftq_utils import _low_rank_decomposition

    quantised = base_model(base, quantization="nf4")
    config = LoRAConfig(rank=RANK, init="loftq", targets=TARGETS)
    model = add_lora(quantised, config, original=original_weights(base))
    weights = sites(base_model(base))
    for name, site in sites(model).items():
        if not site.adapted:
            continue
        error = np.asarray(weights[name].module.weight.get_value()) - np.asarray(
            site.module.weight.get_value().dequantize(), np.float32
        )
        theirs = _low_rank_decomposition(torch.tensor(error), reduced_rank=RANK)
        a, b, *_ = site.factors
        np.testing.assert_allclose(b @ a, (theirs["L"] @ theirs["R"]).numpy(), atol=1e-5)
    prompt = tiny_models.prompt()
    exact, rough, mended = (tiny_models.ours(m, prompt) for m in (base_model(base), quantised, model))
    assert np.linalg.norm(mended - exact) < np.linalg.norm(rough - exact)
    with pytest.raises(InputError, match="this base is not quantised"):
        add_lora(base_model(base), config, original=original_weights(base))


def test_gaussian_has_pefts_deviation():
    config = LoRAConfig(rank=4, init="gaussian")
    a, b, start = start_factors(config, (8, 640), jnp.zeros((8, 640)), 4, 1.0, jax.random.key(1), None)
    assert abs(np.asarray(a).std() * 4 - 1) < 0.1 and not b.any() and start is None


def base_of_width(width):
    return Decoder.abstract(small_config(hidden_size=width), dtype=jnp.float32)


def test_ranks_alphas_and_exclusions_by_layer():
    config = LoRAConfig(
        rank=4,
        alpha=8,
        exclude=("o_proj", "layers.1.mlp.*"),
        rank_pattern={"layers.0.*": 2, "down_proj": 3},
        alpha_pattern={"q_proj": 1.0},
    )
    model = add_lora(Decoder.abstract(small_config(num_layers=3), dtype=jnp.float32), config)
    found: dict[str, Site] = {name: site for name, site in sites(model).items() if site.adapted}
    assert not any("o_proj" in name or name.startswith("layers.1.mlp") for name in found)
    ranks = {name: site.factors.a.shape[0] for name, site in found.items()}
    assert ranks["layers.0.mlp.down_proj"] == 2 and ranks["layers.2.mlp.down_proj"] == 3
    assert ranks["layers.1.self_attn.q_proj"] == 4
    scales = {name: site.factors.scale for name, site in found.items()}
    assert (scales["layers.1.self_attn.q_proj"], scales["layers.0.self_attn.q_proj"]) == (0.25, 0.5)
    assert (scales["layers.0.self_attn.v_proj"], scales["layers.2.mlp.down_proj"]) == (4.0, 8 / 3)
    with pytest.raises(InputError, match=r"rank_pattern: 'x_proj' matches none"):
        add_lora(base_of_width(24), LoRAConfig(rank_pattern={"x_proj": 2}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "pizza"}, "lora.init='pizza' is not known"),
        ({"init": "loftq", "use_dora": True}, "choose one of the two"),
        ({"rank_pattern": {"q_proj": 0}}, "at least 1"),
        ({"use_dora": True, "targets": ("lm_head",)}, "lm_head cannot have it"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(fields, message):
    with pytest.raises(InputError, match=message):
        add_lora(base_of_width(24), LoRAConfig(**fields))
