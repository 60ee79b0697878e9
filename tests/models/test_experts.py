"""A mixture of experts: the routing of transformers, every token served, and what adapters on experts compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pronghorn.converters.peft import load_adapter, save_adapter
from pronghorn.lora import LoRAConfig, add_lora, merge, merge_lora, split
from pronghorn.models import Decoder, DecoderConfig, expert_layers, flat_arrays
from pronghorn.models.expert_layers import Router
from pronghorn.models.experts import order_by_expert, route, rows_by_expert, weighted_sum
from pronghorn.models.experts_config import ExpertsConfig
from pronghorn.models.parameters import named_parameters
from pronghorn.quantization import QuantizationConfig, quantize
from pronghorn.training.flops import count_flops
from tests.models.reference import random_ids, tiny_decoder, tiny_torch_model
from tests.tolerances import MODEL_GRADIENT, MODEL_LOGITS

TOKENS, HIDDEN, EXPERTS, CHOSEN = 10_000, 16, 24, 5


def sparse_config(**changes):
    experts = ExpertsConfig(num_experts=6, experts_per_token=2, width=20, **changes)
    return DecoderConfig("qwen3_moe", 131, 24, 40, 3, 4, 2, 6, 512, experts=experts)


def routed(weight, n, correction=None, **options):
    """(choices, weights) of ours for a router's weight and tokens."""
    config = ExpertsConfig(EXPERTS, CHOSEN, 8, **options)
    router = nnx.eval_shape(lambda: Router(config, HIDDEN, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    router.weight.set_value(jnp.asarray(weight))
    if correction is not None:
        router.e_score_correction_bias.set_value(jnp.asarray(correction))
    found = route(router, jnp.asarray(n), config)
    return np.asarray(found.experts), np.asarray(found.weights)


def by_transformers(weight, n, *, normalized):
    import torch
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    router = Qwen3MoeTopKRouter(
        Qwen3MoeConfig(
            hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=CHOSEN, norm_topk_prob=normalized
        )
    )
    router.weight.data = torch.from_numpy(weight)
    with torch.no_grad():
        _, weights, experts = router(torch.from_numpy(n))
    return experts.numpy(), weights.numpy()


def test_sigmoid_scores_groups_and_a_correction_choose_as_deepseek_v3():
    import torch
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    draw = np.random.default_rng(1)
    weight = 0.3 * draw.standard_normal((EXPERTS, HIDDEN)).astype(np.float32)
    n = draw.standard_normal((TOKENS, HIDDEN), np.float32)
    correction = 0.2 * draw.standard_normal(EXPERTS).astype(np.float32)
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=HIDDEN,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )
    )
    theirs.weight.data = torch.from_numpy(weight)
    theirs.e_score_correction_bias = torch.from_numpy(correction)
    with torch.no_grad():
        _, expected_weights, expected = theirs(torch.from_numpy(n))
    expected, expected_weights = expected.numpy(), expected_weights.numpy()
    options = {"router": "sigmoid", "correction_bias": True, "groups": 4, "groups_chosen": 2}
    options |= {"normalized": True, "normalizer_epsilon": 1e-20, "scaling_factor": 2.5}
    experts, weights = routed(weight, n, correction, **options)
    # Theirs are in no order.
    order, expected_order = np.argsort(experts, axis=1), np.argsort(expected, axis=1)
    sort = np.take_along_axis
    assert np.array_equal(sort(experts, order, 1), sort(expected, expected_order, 1))
    np.testing.assert_allclose(sort(weights, order, 1), sort(expected_weights, expected_order, 1), rtol=1e-5)
    without, _ = routed(weight, n, None, **{**options, "correction_bias": False})
    assert not np.array_equal(np.sort(without, axis=1), sort(experts, order, 1))


def test_a_softmax_over_the_chosen_is_that_of_gpt_oss():
    import torch
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    draw = np.random.default_rng(2)
    weight, n = (draw.standard_normal((size, HIDDEN), np.float32) for size in (EXPERTS, TOKENS))
    theirs = GptOssTopKRouter(
        GptOssConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN)
    )
    theirs.weight.data = torch.from_numpy(weight)
    with torch.no_grad():
        _, expected_weights, expected = theirs(torch.from_numpy(n))
    experts, weights = routed(weight, n, router="softmax_after_top_k")
    assert np.array_equal(experts, expected.numpy())
    np.testing.assert_allclose(weights, expected_weights.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalized", [False, True])
def test_ten_thousand_tokens_go_to_the_experts_that_transformers_chooses(normalized):
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((EXPERTS, HIDDEN), np.float32)
    n = draw.standard_normal((TOKENS, HIDDEN), np.float32)
    expected, expected_weights = by_transformers(weight, n, normalized=normalized)
    experts, weights = routed(weight, n, normalized=normalized)
    assert np.array_equal(experts, expected)
    assert np.max(np.abs(weights - expected_weights)) <= MODEL_LOGITS


def test_with_ties_the_scores_are_those_of_transformers_and_lower_numbers_come_first():
    # Integers, and rows of the router that are equal: scores are met several times, exactly.
    draw = np.random.default_rng(1)
    weight = draw.integers(-2, 3, (EXPERTS, HIDDEN)).astype(np.float32)
    weight[16:] = weight[:8]
    n = draw.integers(-1, 2, (TOKENS, HIDDEN)).astype(np.float32) / 4
    expected, _ = by_transformers(weight, n, normalized=True)
    experts, _ = routed(weight, n, normalized=True)
    logits = n @ weight.T
    assert np.array_equal(
        np.take_along_axis(logits, experts, 1), np.take_along_axis(logits, expected.astype(np.int32), 1)
    )
    order = np.argsort(-logits, axis=1, kind="stable")[:, :CHOSEN]
    assert np.array_equal(experts, order)
    last = np.take_along_axis(logits, experts[:, -1:], 1)
    clear = (
        np.sum(logits >= last, axis=1) == CHOSEN
    )  # the tie is not between the last chosen and one left out
    assert clear.any() and not clear.all()
    same = [set(ours) == set(theirs) for ours, theirs in zip(experts[clear], expected[clear], strict=True)]
    assert all(same)


@pytest.mark.parametrize("tokens", [1, 7])
def test_every_choice_has_one_row_and_experts_may_have_none(tokens):
    experts = np.random.default_rng(2).integers(3, 5, (tokens, 2)).astype(np.int32)
    experts[:, 1] = 9
    order = order_by_expert(jnp.asarray(experts), 12)
    choice, sizes = np.asarray(order.choice), np.asarray(order.group_sizes)
    assert sorted(choice) == list(range(2 * tokens)), "none is dropped, none is there twice"
    assert np.array_equal(sizes, np.bincount(experts.reshape(-1), minlength=12))
    assert np.array_equal(np.repeat(np.arange(12), sizes), experts.reshape(-1)[choice])
    assert np.array_equal(choice[np.asarray(order.place)], np.arange(2 * tokens).reshape(-1, 2))


def test_gradients_of_the_gathers_are_those_of_indexing():
    draw = np.random.default_rng(3)
    n = jnp.asarray(draw.standard_normal((11, 4), np.float32))
    weights = jnp.asarray(draw.uniform(size=(11, 3)).astype(np.float32))
    experts = np.stack([draw.permutation(5)[:3] for _ in range(11)]).astype(np.int32)
    order = order_by_expert(jnp.asarray(experts), 5)
    factor = jnp.asarray(draw.standard_normal((33, 4), np.float32))

    def ours(n, weights):
        rows = rows_by_expert(n, order)
        return jnp.sum(jnp.sin(weighted_sum(rows * rows * factor, weights, order)))

    def plain(n, weights):
        rows = n[order.choice // 3]
        return jnp.sum(jnp.sin(jnp.sum(weights[..., None] * (rows * rows * factor)[order.place], axis=1)))

    found, expected = (jax.value_and_grad(f, (0, 1))(n, weights) for f in (ours, plain))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(one - other)) <= 1e-5


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_adapters_of_experts_train_and_merge_to_what_they_compute(layers, tmp_path):
    model = tiny_decoder(sparse_config(dense_layers=(0,)), layers=layers)
    adapted = add_lora(model, LoRAConfig(rank=3, targets=("re:.*experts.*", "q_proj")))
    graph, lora, frozen = split(adapted)
    lora = jax.tree.map(lambda leaf: leaf + 0.05, lora)
    adapted = merge(graph, lora, frozen)
    ids = jnp.asarray(random_ids(19, batch=2))
    logits = adapted(ids)
    assert np.max(np.abs(logits - model(ids))) > 0.01
    assert np.max(np.abs(logits - merge_lora(adapted)(ids))) <= MODEL_LOGITS
    save_adapter(adapted, tmp_path / "adapter")
    again = load_adapter(model, tmp_path / "adapter")
    assert np.max(np.abs(logits - again(ids))) <= MODEL_LOGITS

    def loss(lora, **options):
        return jnp.sum(merge(graph, lora, frozen).hidden_states(ids, **options) ** 2)

    usual = jax.jit(jax.grad(loss))(lora)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(usual))
    chosen = {"unrolled": ({"mlp_tile_tokens": 16},), "scanned": ({"memory_policy": "offload"},)}
    for options in chosen[layers]:
        other = jax.jit(jax.grad(lambda lora, options=options: loss(lora, **options)))(lora)
        for one, two in zip(jax.tree.leaves(other), jax.tree.leaves(usual), strict=True):
            assert np.linalg.norm(one - two) <= MODEL_GRADIENT * np.linalg.norm(two)


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": True, "swiglu_limit": 7.0}, {"weights_on_input": True}],
    ids=["inside", "clamped", "input"],
)
def test_gate_and_up_as_one_product_compute_what_two_products_do(changes, monkeypatch):
    """Of quantised experts, whatever their activation is."""
    model = tiny_decoder(sparse_config(**changes))
    for name, parameter in named_parameters(model).items():
        if "experts." in name and name.endswith("_proj.weight"):
            weight = parameter.variable.get_value()
            parameter.variable.set_value(quantize(weight, QuantizationConfig("nf4")))
    graph, lora, frozen = split(add_lora(model, LoRAConfig(rank=3, targets=("re:.*experts.*", "q_proj"))))
    lora = jax.tree.map(lambda leaf: leaf + 0.05, lora)
    ids = jnp.asarray(random_ids(19, batch=2))

    def loss(lora):
        return jnp.sum(merge(graph, lora, frozen).hidden_states(ids) ** 2)

    taken = []
    stacked = expert_layers.stacked_grouped_linears
    monkeypatch.setattr(
        expert_layers, "stacked_grouped_linears", lambda *a, **o: taken.append(1) or stacked(*a, **o)
    )
    found = jax.value_and_grad(loss)(lora)
    assert taken
    monkeypatch.setattr(expert_layers, "stack_well", lambda *_: False)
    expected = jax.value_and_grad(loss)(lora)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.any(two) and np.linalg.norm(one - two) <= MODEL_GRADIENT * np.linalg.norm(two)


def test_peft_reads_adapters_of_experts(tmp_path):
    """Two steps of training from a folder, and the merged weights of both."""
    import optax
    from peft import PeftModel

    from pronghorn.converters.huggingface import load_model
    from pronghorn.models.families import family_named
    from pronghorn.models.tensor_names import by_our_names
    from pronghorn.training.losses import next_token

    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 1}
    torch_model = tiny_torch_model("qwen3_moe", head_dim=12, pad_token_id=None, **sizes)
    torch_model.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", dtype="float32")
    adapted = add_lora(
        model, LoRAConfig(rank=3, alpha=7, targets=("gate_proj", "up_proj", "down_proj", "q_proj"))
    )
    graph, lora, frozen = split(adapted)
    ids = jnp.asarray(random_ids(16, batch=2))
    loss_fn, optimizer = next_token(graph), optax.sgd(1.0)
    step = jax.jit(
        jax.value_and_grad(lambda lora: loss_fn(lora, frozen, {"input_ids": ids, "labels": ids})[0])
    )
    losses, state = [], optimizer.init(lora)
    for _ in range(3):
        loss, gradient = step(lora)
        updates, state = optimizer.update(gradient, state)
        lora = optax.apply_updates(lora, updates)
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]
    adapted = merge(graph, lora, frozen)
    save_adapter(adapted, tmp_path / "adapter")
    merged = PeftModel.from_pretrained(torch_model, str(tmp_path / "adapter")).merge_and_unload()
    family = family_named("qwen3_moe")
    state_dict = {name: tensor.numpy() for name, tensor in merged.state_dict().items()}
    theirs = by_our_names(state_dict, family.tensor_names(model.config), {})
    ours, base = flat_arrays(merge_lora(adapted)), flat_arrays(model)
    name = "layers.0.mlp.experts.down_proj.weight"
    assert np.max(np.abs(ours[name] - base[name])) > 1e-3
    assert sorted(theirs) == sorted(ours)
    for name, expected in theirs.items():
        assert np.max(np.abs(ours[name] - expected)) <= 1e-6, name


def test_a_token_is_counted_with_the_experts_it_chose_only():
    """Adapters aside, two more experts of six are 4 x their weights more FLOPs a token: forward, and dX."""
    counts = []
    for chosen in (2, 4):
        experts = ExpertsConfig(num_experts=6, experts_per_token=chosen, width=20)
        model = Decoder.abstract(dataclasses.replace(sparse_config(), experts=experts))
        _, trained, _ = split(model)
        counts.append(count_flops(model.config, {}, trained).per_token)
    assert counts[1] - counts[0] == 4 * 2 * (3 * 20 * 24) * 3


def test_a_correction_stays_in_fp32_whatever_the_rest_is_cast_to(tmp_path):
    from pronghorn.converters.huggingface import load_model, save_model

    options = {"router": "sigmoid", "correction_bias": True, "normalizer_epsilon": 1e-20, "wide_logits": True}
    options |= {"shared_width": 20, "dense_layers": (0,)}
    config = dataclasses.replace(sparse_config(**options), family="glm4_moe", rms_norm_eps=1e-5)
    config = dataclasses.replace(config, rope=dataclasses.replace(config.rope, partial_rotary_factor=0.5))
    model = tiny_decoder(dataclasses.replace(config, head_dim=8))
    name = "layers.1.mlp.gate.e_score_correction_bias"
    correction = np.asarray(flat_arrays(model)[name])
    assert np.any(correction != correction.astype(jnp.bfloat16)), "16 bits would not do"
    save_model(model, tmp_path / "saved", dtype="bfloat16")
    again = flat_arrays(load_model(tmp_path / "saved", dtype="bfloat16"))
    assert again["layers.1.mlp.gate.weight"].dtype == jnp.bfloat16
    assert again[name].dtype == jnp.float32 and np.array_equal(again[name], correction)
