"""One decoder: layouts, packing, memory policies, adapters and static attributes."""

import dataclasses
import functools
import importlib
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pronghorn.errors import InputError

from pronghorn.models import layer_stack  # isort: skip
from pronghorn.models import (
    MEMORY_POLICIES,
    Decoder,
    DecoderConfig,
    DecoderLayer,
    LoRAParam,
    Source,
    assign,
    flat_arrays,
    rope,
)
from pronghorn.models.blocks import decoder_layer
from pronghorn.models.decoder import segment_positions
from pronghorn.models.segments import plan_segments
from pronghorn.pallas_kernels.launch import kernels
from tests.models.reference import (
    compiled,
    forward,
    gradient_error,
    next_token_loss,
    random_ids,
    tiny_decoder,
)
from tests.tolerances import MODEL_GRADIENT, MODEL_LOGITS, assert_close

S, F = "sliding", "full"
# Two periods of (sliding, full) and one layer more: scanned, two segments.
CONFIG = DecoderConfig(
    "qwen3", 131, 48, 80, 5, 6, 2, 10, 512, qk_norm=True, qkv_bias=True, sliding_window=9,
    layer_kinds=(S, F, S, F, S), tie_word_embeddings=True,
)  # fmt: skip


def build(layers: str = "unrolled", **changes) -> Decoder:
    return tiny_decoder(dataclasses.replace(CONFIG, **changes), layers=layers)


def hidden_states(model: Decoder, ids: np.ndarray, key: jax.Array | None = None) -> np.ndarray:
    run = compiled(lambda built, ids, key: built.hidden_states(ids, dropout_key=key), model)
    return np.asarray(run(ids, key))


def with_adapters(model: Decoder, dropout: float = 0.0) -> Decoder:
    """Random adapters on two linears of every layer, the same whatever the layout."""
    for segment in model.segments:
        indices = segment.start + np.arange(segment.repeats * len(segment.layers))
        for position, layer in enumerate(segment.layers):
            for linear in (layer.self_attn.q_proj, layer.mlp.down_proj):
                out, width = linear.weight.get_value().shape[-2:]
                draws = [np.random.default_rng(i) for i in indices[position :: len(segment.layers)]]
                a = np.stack([draw.standard_normal((3, width), np.float32) for draw in draws]) / width**0.5
                b = np.stack([draw.standard_normal((out, 3), np.float32) for draw in draws])
                linear.lora_A = LoRAParam(a if segment.stacked else a[0], logical_axes=())
                linear.lora_B = LoRAParam(b if segment.stacked else b[0], logical_axes=())
                linear.lora_scale, linear.lora_dropout = 0.5, dropout
    return model


def loss_and_gradients(model: Decoder, ids: np.ndarray, **options):
    graph, state = nnx.split(model)

    def loss(state):
        built = nnx.merge(graph, state)
        return next_token_loss(built.logits(built.hidden_states(ids, **options)), jnp.asarray(ids))

    value, gradients = jax.jit(jax.value_and_grad(loss))(state)
    return value, flat_arrays(nnx.merge(graph, gradients))


def equal_losses_and_gradients(actual, expected) -> None:
    assert_close(actual[0], expected[0], tolerance=1e-5)
    for name, gradient in expected[1].items():
        assert gradient_error(actual[1][name], np.asarray(gradient)) <= MODEL_GRADIENT, name


@pytest.mark.parametrize(
    ("kinds", "plan"),
    [
        ((F,) * 4, ((0, 1, 4),)),
        ((F,) * 3 + (S,) * 4, ((0, 1, 3), (3, 1, 4))),
        (((S,) * 5 + (F,)) * 4 + (S,) * 2, ((0, 6, 4), (24, 1, 2))),
        ((S, F, S, F, S), ((0, 2, 2), (4, 1, 1))),
        ((F,), ((0, 1, 1),)),
    ],
)
def test_a_layer_pattern_is_cut_into_few_periods(kinds, plan):
    assert plan_segments(kinds) == plan
    covered = [kinds[start + i % period] for start, period, repeats in plan for i in range(period * repeats)]
    assert tuple(covered) == kinds


def test_scanned_equals_unrolled():
    ids = random_ids(31, batch=2)
    unrolled = with_adapters(build())
    scanned = with_adapters(build("scanned"))
    assert [(s.start, len(s.layers), s.repeats) for s in scanned.segments] == [(0, 2, 2), (4, 1, 1)]
    assign(scanned, flat_arrays(unrolled))
    equal_losses_and_gradients(loss_and_gradients(scanned, ids), loss_and_gradients(unrolled, ids))


def test_dropout_is_alike_scanned_and_unrolled_and_differs_by_key():
    ids = random_ids(31)
    unrolled, scanned = with_adapters(build(), dropout=0.4), with_adapters(build("scanned"), dropout=0.4)
    run = compiled(lambda built, ids, key: built.hidden_states(ids, dropout_key=key), scanned)
    dropped = run(ids, jax.random.key(7))
    assert_close(hidden_states(unrolled, ids, jax.random.key(7)), dropped, tolerance=1e-5)
    np.testing.assert_array_equal(run(ids, jax.random.key(7)), dropped)
    assert np.max(np.abs(run(ids, jax.random.key(8)) - dropped)) > 0.01


def test_each_linear_of_each_layer_drops_differently(monkeypatch):
    seen = []
    monkeypatch.setattr(
        importlib.import_module("pronghorn.pallas_kernels.norm_linears"),  # what draws the masks of every op
        "lora_linear",
        lambda x, w, a, b, *, dropout_key, **_: (
            seen.append(dropout_key) or jnp.zeros((*x.shape[:-1], len(w)))
        ),
    )
    model = with_adapters(build(num_layers=3, layer_kinds=(F, F, F)), dropout=0.4)
    model.hidden_states(random_ids(3), dropout_key=jax.random.key(0))
    keys = [tuple(jax.random.key_data(key).tolist()) for key in seen if key is not None]
    assert len(keys) == len(set(keys)) == 2 * 3


def test_packed_documents_equal_separate_ones():
    model, lengths = build("scanned"), [17, 5, 11]
    ids = random_ids(33)
    segment_ids = np.repeat([1, 2, 3], lengths)[None]
    packed = forward(model, ids, None, segment_ids)
    start = 0
    for length in lengths:
        # Padded to one shape: causal, so what follows changes nothing.
        alone = forward(model, np.pad(ids[:, start : start + length], ((0, 0), (0, 33 - length))))[:, :length]
        assert np.max(np.abs(packed[:, start : start + length] - alone)) <= MODEL_LOGITS
        start += length
    assert np.max(np.abs(packed - forward(model, ids))) > 0.1, "without segment ids documents see each other"


def test_a_document_cannot_see_another_of_its_row_or_the_padding():
    model, segment_ids = build("scanned"), np.array([[1] * 6 + [2] * 5 + [0] * 4])
    ids = random_ids(15)
    other = ids.copy()
    other[:, :6], other[:, 11:] = 7, 8
    a, b = (forward(model, tokens, None, segment_ids) for tokens in (ids, other))
    np.testing.assert_array_equal(a[:, 6:11], b[:, 6:11])


def test_positions_restart_wherever_the_segment_changes():
    ids = jnp.asarray([[1, 1, 2, 2, 2, 0, 0], [3, 1, 1, 1, 1, 1, 3]])
    np.testing.assert_array_equal(segment_positions(ids), [[0, 1, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 4, 0]])


def test_given_positions_are_used():
    model, ids = build(num_layers=1, layer_kinds=(F,)), random_ids(9)
    default = forward(model, ids)
    np.testing.assert_array_equal(forward(model, ids, jnp.arange(9)[None]), default)
    assert np.max(np.abs(forward(model, ids, 3 * jnp.arange(9)[None]) - default)) > 1e-3


@pytest.fixture
def everything_moves(monkeypatch):
    """Tiny residuals too go to host memory."""
    monkeypatch.setattr(layer_stack, "SMALLEST_OFFLOADED", 0)


@functools.cache
def results_of_policy(layers: str, policy: str):
    """With packing and dropout: recomputation has to drop the same."""
    model = with_adapters(build(layers, num_layers=2, layer_kinds=(S, S)), dropout=0.3)
    return loss_and_gradients(
        model,
        random_ids(13),
        segment_ids=jnp.asarray([[1] * 8 + [2] * 5]),
        dropout_key=jax.random.key(5),
        memory_policy=policy,
    )


@pytest.mark.parametrize(
    ("layers", "policy"),
    [
        ("unrolled", "layer_inputs"),
        ("scanned", "layer_inputs"),
        ("unrolled", "attention"),
        ("scanned", "offload"),
        ("unrolled", "offload"),
        ("scanned", "offload_attention"),
        ("unrolled", "offload_projections"),
    ],
)
def test_a_memory_policy_changes_neither_loss_nor_gradient(layers, policy, everything_moves):
    equal_losses_and_gradients(results_of_policy(layers, policy), results_of_policy(layers, "keep"))


def saved_for_backward(layers: str, policy: str) -> tuple[int, int]:
    """Elements that the backward pass finds in device and in host memory, the weights aside; nothing is run."""
    graph, state = nnx.split(build(layers))
    ids = random_ids(64, batch=4)

    def residuals(state):
        def hidden(state):
            return nnx.merge(graph, state).hidden_states(ids, memory_policy=policy)

        return jax.tree.leaves(jax.vjp(hidden, state)[1])

    with kernels("pallas"):
        outputs = jax.make_jaxpr(residuals)(state).jaxpr.outvars
    weights = {leaf.shape for leaf in jax.tree.leaves(state)}
    found = [v.aval for v in outputs if isinstance(v, jax.extend.core.Var) and v.aval.shape not in weights]
    host = [aval.size for aval in found if "host" in str(aval)]
    return sum(aval.size for aval in found) - sum(host), sum(host)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_memory_policies_save_less_and_less(layers, everything_moves):
    tokens = 4 * 64
    inputs, heads, logsumexp = (CONFIG.num_layers * tokens * width for width in (48, 6 * 10, 6))
    few = 8 * tokens * 48  # the final norm's, cos and sin, the ids
    saved = {policy: saved_for_backward(layers, policy) for policy in MEMORY_POLICIES}
    assert inputs <= saved["layer_inputs"][0] <= inputs + few and saved["layer_inputs"][1] == 0
    # The stream after attention, attention's output and logsumexp; and inverse rms, a number a norm and head.
    attended = inputs + heads + logsumexp
    projected = CONFIG.num_layers * tokens * (6 + 2 + 2) * 10
    numbers = CONFIG.num_layers * tokens * (4 + 6 + 2)
    assert 0 <= saved["attention"][0] - saved["layer_inputs"][0] - attended <= numbers
    assert saved["keep"][0] > 1.4 * saved["attention"][0]
    rest = saved["layer_inputs"][0] - inputs
    for policy, moved in (
        ("offload", inputs),
        ("offload_attention", inputs + attended),
        ("offload_projections", inputs + attended + projected),
    ):
        device, host = saved[policy]
        assert device == rest and 0 <= host - moved <= numbers


def test_an_unknown_policy_or_layout_is_refused():
    with pytest.raises(InputError, match="memory_policy='all'"):
        build().hidden_states(random_ids(3), memory_policy="all")
    with pytest.raises(InputError, match="layers='rolled'"):
        Decoder(CONFIG, layers="rolled")


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_every_layer_output_is_returned_in_order(layers):
    model, ids = build(layers), random_ids(7)
    hidden, outputs = compiled(lambda built, ids: built.hidden_states(ids, return_layers=True), model)(ids)
    assert len(outputs) == CONFIG.num_layers + 1
    np.testing.assert_array_equal(outputs[0], model.embed_tokens(ids))
    assert_close(model.norm(outputs[-1]), hidden, tolerance=1e-5)
    # Unrolled by hand, each output is its layer of the one before.
    cos_sin = rope.cos_sin(model.config, jnp.arange(7)[None])
    weights = flat_arrays(model)
    for index, (before, after) in enumerate(itertools.pairwise(outputs)):
        layer = nnx.eval_shape(lambda: DecoderLayer(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        for path, node in nnx.iter_graph(layer):
            if isinstance(node, nnx.Param):
                node.set_value(weights[".".join(["layers", str(index), *path])])
        kind = CONFIG.layer_kinds[index]
        assert_close(
            decoder_layer(layer, before, *cos_sin, None, config=CONFIG, kind=kind), after, tolerance=1e-5
        )


def test_an_embedding_adapter_is_added_to_the_lookup_only():
    model, ids = build(), jnp.asarray(random_ids(7))
    head = model.head()[0]
    plain = model.embed_tokens(ids)
    a, b = jax.random.normal(jax.random.key(0), (3, 131)), jax.random.normal(jax.random.key(1), (48, 3))
    model.embed_tokens.lora_embedding_A = LoRAParam(a)
    model.embed_tokens.lora_embedding_B = LoRAParam(b)
    model.embed_tokens.lora_scale = 0.25
    assert_close(model.embed_tokens(ids), plain + 0.25 * a.T[ids] @ b.T, tolerance=1e-5)
    np.testing.assert_array_equal(model.head()[0], head)


def test_an_adapter_of_the_head_is_in_the_logits():
    model = build(tie_word_embeddings=False)
    hidden = jax.random.normal(jax.random.key(2), (1, 5, 48))
    plain = model.logits(hidden)
    a, b = jax.random.normal(jax.random.key(0), (3, 48)), jax.random.normal(jax.random.key(1), (131, 3))
    model.lm_head.lora_A, model.lm_head.lora_B, model.lm_head.lora_scale = LoRAParam(a), LoRAParam(b), 0.25
    assert_close(model.logits(hidden), plain + 0.25 * (hidden @ a.T) @ b.T, tolerance=1e-5)
    weight, bias, head_a, head_b, scale = model.head()
    assert weight.shape == (131, 48) and bias is None and scale == 0.25
    assert head_a is model.lm_head.lora_A.get_value() and head_b is model.lm_head.lora_B.get_value()


def test_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16():
    model = Decoder(dataclasses.replace(CONFIG, num_layers=1, layer_kinds=(F,)))
    assert model.dtype == jnp.bfloat16
    hidden = jax.random.normal(jax.random.key(0), (1, 5, 48), jnp.bfloat16)
    logits = model.logits(hidden)
    assert hidden_states(model, random_ids(5)).dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert np.any(logits != logits.astype(jnp.bfloat16).astype(jnp.float32))


def test_an_id_outside_of_the_vocabulary_gives_nan_and_not_a_neighbour():
    logits = forward(build(num_layers=1, layer_kinds=(F,)), np.array([[3, 130, 5], [3, 131, 5]]))
    assert not np.any(np.isnan(logits[0])) and np.all(np.isnan(logits[1, 1:]))


def test_an_abstract_decoder_allocates_nothing_and_has_the_shapes_of_a_real_one():
    huge = dataclasses.replace(CONFIG, vocab_size=10**8, hidden_size=8192, intermediate_size=10**6)
    leaves = jax.tree.leaves(nnx.state(Decoder.abstract(huge)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    real, abstract = nnx.split(Decoder(CONFIG)), nnx.split(Decoder.abstract(CONFIG))
    assert real[0] == abstract[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), real[1]) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract[1]
    )


def test_weights_are_drawn_from_the_normal_of_0_02():
    model = Decoder(CONFIG, dtype=jnp.float32, layers="scanned", rngs=nnx.Rngs(3))
    drawn = np.concatenate(
        [np.ravel(a) for n, a in flat_arrays(model).items() if "proj.weight" in n or "embed" in n]
    )
    assert abs(drawn.std() - 0.02) < 2e-4 and abs(drawn.mean()) < 2e-4
    np.testing.assert_array_equal(model.norm.weight[...], 1.0)


def test_static_attributes_compile_once_and_survive_split_and_merge():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def forward(graph, state, ids):
        traces.append(1)
        return nnx.merge(graph, state)(ids)

    for seed in (0, 1):
        model = Decoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(seed))
        model.source = Source("folder", '{"model_type": "qwen3"}', "bfloat16")
        graph, state = nnx.split(model)
        assert nnx.merge(graph, state).source == model.source
        assert nnx.merge(graph, state).config == CONFIG
        forward(graph, state, jnp.zeros((1, 3), jnp.int32))
    assert len(traces) == 1, "equal graphs are one entry of jit's cache"
    model.source = Source("elsewhere", "{}", "bfloat16")
    assert nnx.split(model)[0] != graph
