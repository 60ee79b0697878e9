"""The load-balancing loss of experts: that of transformers, whatever the memory policy, and what it leaves out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pronghorn.converters.huggingface import load_model
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig, add_lora, merge, split
from pronghorn.models import Decoder, DecoderConfig, flat_arrays
from pronghorn.models.experts_config import ExpertsConfig
from pronghorn.models.families import family_named
from pronghorn.models.tensor_names import by_our_names
from pronghorn.training.config import TrainConfig
from pronghorn.training.losses import next_token
from pronghorn.training.step import init_state, make_train_step
from tests.models.reference import gradient_error, random_ids, tiny_decoder, tiny_torch_model
from tests.tolerances import MODEL_GRADIENT, assert_close

COEFFICIENT = 0.3  # large enough to be seen in every gradient
CONFIG = DecoderConfig(
    "qwen3_moe", 131, 24, 40, 2, 4, 2, 6, 512,
    experts=ExpertsConfig(num_experts=6, experts_per_token=2, width=20, dense_layers=(1,)),
)  # fmt: skip
IDS = random_ids(24, batch=2)


def balanced(graph, **options):
    return next_token(graph, router_aux_loss_coef=COEFFICIENT, **options)


@pytest.mark.parametrize(
    ("family", "model_type", "overrides"),
    [
        (
            "qwen3_moe",
            "qwen3_moe",
            {
                "head_dim": 12,
                "num_experts": 6,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 40,
                "mlp_only_layers": [1],
            },
        ),
        (
            "granite4",
            "granitemoehybrid",
            {
                "num_local_experts": 6,
                "num_experts_per_tok": 3,
                "shared_intermediate_size": 24,
                "layer_types": ["mamba", "attention", "mamba"],
                "mamba_n_heads": 8,
                "mamba_d_state": 8,
                "mamba_chunk_size": 16,
            },
        ),
    ],
)
def test_loss_and_every_gradient_are_those_of_transformers(family, model_type, overrides, tmp_path):
    import torch

    asked = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    torch_model = tiny_torch_model(model_type, **overrides, **asked)
    torch_model.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32")
    tokens = torch.from_numpy(IDS).long()
    expected = torch_model(tokens, labels=tokens)
    expected.loss.backward()
    graph, trained, frozen = split(model)
    batch = {"input_ids": IDS, "labels": IDS}
    run = jax.jit(jax.value_and_grad(next_token(graph), has_aux=True))  # as config.json asks for
    (loss, aux), gradient = run(trained, frozen, batch)
    assert abs(float(aux["balance_loss_sum"] / aux["token_count"]) - float(expected.aux_loss.detach())) < 1e-5
    assert abs(float(loss) - float(expected.loss.detach())) < 1e-5
    known, config = family_named(family), model.config
    theirs = {name: p.grad.numpy() for name, p in torch_model.named_parameters()}
    named = by_our_names(theirs, known.names_in_memory(config), known.fused_tensors(config))
    ours = flat_arrays(merge(graph, gradient, frozen))
    assert sorted(named) == sorted(ours)
    assert max(gradient_error(ours[name], g) for name, g in named.items()) < MODEL_GRADIENT


@pytest.mark.parametrize(
    ("policy", "layers"),
    [("layer_inputs", "unrolled"), ("offload_projections", "unrolled"), ("offload", "scanned")],
)
def test_memory_policies_have_the_same_gradient(policy, layers):
    config = dataclasses.replace(
        CONFIG, num_layers=2, experts=dataclasses.replace(CONFIG.experts, dense_layers=())
    )
    batch = {"input_ids": IDS, "labels": IDS}
    found = []
    for chosen in ("keep", policy):
        graph, trained, frozen = split(tiny_decoder(config, layers=layers))
        found.append(
            jax.jit(jax.grad(balanced(graph, memory_policy=chosen), has_aux=True))(trained, frozen, batch)
        )
    (kept, aux), (other, _) = found
    assert float(aux["balance_loss_sum"]) > 0
    for one, two in zip(jax.tree.leaves(other), jax.tree.leaves(kept), strict=True):
        assert_close(one, two)


def test_even_experts_have_a_loss_of_the_choices_a_token():
    graph, trained, frozen = split(tiny_decoder(CONFIG))

    def even(path, leaf):
        return jnp.zeros_like(leaf) if "gate" in jax.tree_util.keystr(path).split("'") else leaf

    trained = jax.tree_util.tree_map_with_path(even, trained)
    _, aux = jax.jit(balanced(graph))(trained, frozen, {"input_ids": IDS, "labels": IDS})
    assert abs(float(aux["balance_loss_sum"] / aux["token_count"]) - 2.0) < 1e-6


@pytest.mark.parametrize("packed", [True, False])
def test_padding_does_not_count(packed):
    graph, trained, frozen = split(tiny_decoder(CONFIG))
    run = jax.jit(balanced(graph))
    padded = np.pad(IDS, ((0, 0), (0, 9)), constant_values=5)
    labels = np.pad(IDS, ((0, 0), (0, 9)), constant_values=-100)
    batch = {"input_ids": padded, "labels": labels}
    if packed:
        batch["segment_ids"] = np.pad(np.ones_like(IDS), ((0, 0), (0, 9)))
    _, alone = run(trained, frozen, {"input_ids": IDS, "labels": IDS})
    _, together = run(trained, frozen, batch)
    assert_close(together["balance_loss_sum"], alone["balance_loss_sum"])


def test_a_step_reports_it_and_averages_it_by_tokens():
    model = add_lora(tiny_decoder(CONFIG), LoRAConfig(rank=2, alpha=2))
    graph, trained, frozen = split(model)
    config = TrainConfig(max_steps=1, router_aux_loss_coef=COEFFICIENT, max_grad_norm=None)
    step = jax.jit(make_train_step(graph, optax.sgd(0.1), config))
    batch = {"input_ids": IDS[:, None], "labels": IDS[:, None]}  # two micro-batches of a row
    _, metrics = step(init_state(trained, optax.sgd(0.1)), frozen, batch)
    run = jax.jit(balanced(graph))
    rows = [run(trained, frozen, {"input_ids": row[None], "labels": row[None]}) for row in IDS]
    expected = np.mean([float(aux["balance_loss_sum"] / aux["token_count"]) for _, aux in rows])
    assert abs(float(metrics["balance_loss"]) - expected) < 1e-5
    assert abs(float(metrics["loss"]) - np.mean([float(loss) for loss, _ in rows])) < 1e-5


def test_what_has_nothing_to_balance_is_refused():
    routers = (with_router("sigmoid"), with_router("sigmoid_after_top_k"))
    for config in (dataclasses.replace(CONFIG, experts=None), *routers):
        graph, trained, frozen = split(Decoder.abstract(config))
        with pytest.raises(InputError, match="router_aux_loss_coef"):
            jax.eval_shape(balanced(graph), trained, frozen, {"input_ids": IDS, "labels": IDS})
    with pytest.raises(InputError, match="router_aux_loss_coef"):
        TrainConfig(router_aux_loss_coef=-1.0)


def with_router(kind):
    return dataclasses.replace(CONFIG, experts=dataclasses.replace(CONFIG.experts, router=kind))


def test_nothing_is_added_unless_asked_for():
    graph, trained, frozen = split(Decoder.abstract(CONFIG))
    _, aux = jax.eval_shape(next_token(graph), trained, frozen, {"input_ids": IDS, "labels": IDS})
    assert "balance_loss_sum" not in aux
