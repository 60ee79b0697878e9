"""gated_mlp: hand gradient against oracle, what is saved, what is not computed."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import shapes, tuned
from pronghorn.pallas_kernels.gated_mlp import gated_mlp, gated_mlp_reference
from pronghorn.pallas_kernels.lowrank_gated_activation import BACKWARD, FORWARD
from pronghorn.pallas_kernels.norm_linears import Dropout
from pronghorn.pallas_kernels.stacked_linears import LinearWeights
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import (
    assert_matches_oracle,
    equations,
    gradient,
    kernel_outputs,
    normal,
    saved_shapes,
)
from tests.pallas_kernels.linear_inputs import linear, names, quantized, saved_of_tokens, split

ROWS, WIDTH, FFN = 13, 10, 37
OPTIONS = {"scales": (0.75, 0.5, 2.0), "eps": 1e-5}
hand = functools.partial(gated_mlp, **OPTIONS)
oracle = functools.partial(gated_mlp_reference, **OPTIONS)
kernels = functools.partial(hand, implementation="pallas")
FIELDS = LinearWeights._fields
ADAPTERS = ("lora_a", "lora_b")


def layers(dtype="float32", ranks=(3, 2, 5), bias=True):
    """gate, up and down."""
    sizes = ((WIDTH, FFN), (WIDTH, FFN), (FFN, WIDTH))
    return tuple(
        linear(10 * i, *size, rank=rank, bias=bias, dtype=dtype)
        for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True))
    )


def inputs(dtype="float32"):
    return normal(50, (ROWS, WIDTH), dtype, scale=3.0), normal(51, (WIDTH,), dtype)


def assert_gradients_match(
    linears, fields=FIELDS, dtype="float32", trained="x norm", op=hand, reference=oracle
):
    """The output, and gradients of x and norm (where trained) and of these fields of every layer."""
    x, norm_weight = inputs(dtype)
    flat, put = split(linears, fields)

    def call(f):
        def run(values, *of_layers):
            given = {"x": x, "norm": norm_weight} | values
            return f(given["x"], given["norm"], *put(of_layers))

        return run

    values = {name: value for name, value in (("norm", norm_weight), ("x", x)) if name in trained}
    labels = names(("y", *(f"d{name}" for name in values)), len(flat))
    dy = normal(52, (ROWS, WIDTH), dtype)
    assert_matches_oracle(call(op), call(reference), (values, *flat), dy, dtype, labels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_matches_oracle(dtype):
    assert_gradients_match(layers(dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_oracle_with_only_adapters_trained(dtype):
    assert_gradients_match(layers(dtype), ADAPTERS, dtype, trained="x")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_kernels_match_oracle(activation):
    op, reference = (functools.partial(f, activation=activation) for f in (kernels, oracle))
    assert_gradients_match(layers(), ADAPTERS, op=op, reference=reference, trained="x")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [(8, 16, 64), (16, 0, 8), (8, 8, 0)], ids=str)
def test_kernels_match_oracle_at_any_ranks(ranks, dtype):
    assert_gradients_match(layers(dtype, ranks), ADAPTERS, dtype, op=kernels, trained="x")


def test_kernels_that_sum_g_match_oracle():
    with tuned.candidate("lowrank_gated_backward", BACKWARD._replace(columns=16, with_g=1)):
        assert_gradients_match(layers(), op=kernels)


def test_h_is_not_read_for_the_rank_product_of_down():
    function, arguments = adapters_trained(kernels)
    dots = [e for e in equations(function, *arguments) if e.primitive.name == "dot_general"]
    shapes_of = [tuple(v.aval.shape for v in e.invars) for e in dots]
    assert ((ROWS, FFN), (WIDTH, FFN)) in shapes_of and ((ROWS, FFN), (5, FFN)) not in shapes_of
    with tuned.candidate("lowrank_gated_forward", FORWARD):
        assert kernel_outputs(function, *arguments)["lowrank_gated_forward"] == [(ROWS, FFN), (ROWS, 5)]


@pytest.mark.parametrize("ranks", [(0, 0, 0), (3, 0, 2), (0, 4, 0)], ids=str)
def test_layers_may_lack_an_adapter(ranks):
    assert_gradients_match(layers(ranks=ranks, bias=False))


def test_without_residual_is_the_branch_alone():
    op, reference = (functools.partial(f, residual=False) for f in (hand, oracle))
    assert_gradients_match(layers(), ADAPTERS, op=op, reference=reference)


def test_weight_offset_is_added_to_the_norm_weight():
    op, reference = (functools.partial(f, weight_offset=1.0) for f in (hand, oracle))
    assert_gradients_match(layers(), ADAPTERS, op=op, reference=reference)


@pytest.mark.parametrize(
    "fields, trained",
    [(("lora_a",), ""), (("lora_b",), ""), (("weight",), ""), (("bias",), ""), ((), "x"), ((), "norm")],
    ids=str,
)
def test_each_argument_can_be_trained_alone(fields, trained):
    assert_gradients_match(layers(ranks=(3, 0, 2)), fields, trained=trained)


@pytest.mark.parametrize("field", FIELDS)
def test_down_can_be_trained_alone(field):
    x, norm_weight = inputs()
    gate, up, down = layers()
    op, reference = (
        lambda a, f=f: f(x, norm_weight, gate, up, down._replace(**{field: a})) for f in (kernels, oracle)
    )
    arguments = (getattr(down, field),)
    assert_matches_oracle(op, reference, arguments, normal(52, (ROWS, WIDTH)), "float32", ("y", field))


def test_quantised_weights_match_their_dense_twins():
    x, norm_weight = inputs()
    pairs = [quantized(layer) for layer in layers()]

    def call(f, linears):
        put = split(linears, ADAPTERS)[1]
        return lambda x, *a: f(x, norm_weight, *put(a))

    op, reference = call(hand, [codes for codes, _ in pairs]), call(oracle, [dense for _, dense in pairs])
    flat, _ = split(layers(), ADAPTERS)
    labels = names(("y", "dx"), len(flat))
    assert_matches_oracle(op, reference, (x, *flat), normal(52, x.shape), "float32", labels)


def test_quantised_weights_pass_a_barrier_in_front_of_each_product():
    x, norm_weight = inputs()
    linears = tuple(quantized(layer)[0] for layer in layers())
    program = equations(gradient(lambda x: hand(x, norm_weight, *linears)), x)
    barriers = [e for e in program if e.primitive.name == "optimization_barrier"]
    codes = [sum(v.aval.dtype == jnp.int8 for v in e.invars) for e in barriers]
    assert sorted(count for count in codes if count) == [1] * 6


def test_training_a_quantised_weight_is_refused():
    x, norm_weight = inputs()
    gate, up, down = layers()
    down = quantized(down)[0]
    with pytest.raises(InputError, match="quantised weight cannot be trained"):
        jax.grad(lambda d: hand(x, norm_weight, gate, up, d).sum(), allow_int=True)(down)


def adapters_trained(op=hand, ranks=(3, 2, 5)):
    """(function of x and every adapter, its arguments) with frozen weights."""
    x, norm_weight = inputs()
    flat, put = split(layers(ranks=ranks), ADAPTERS)
    return (lambda x, *a: op(x, norm_weight, *put(a))), (x, *flat)


@pytest.mark.parametrize("op", [hand, kernels], ids=["xla", "pallas"])
def test_training_adapters_saves_gate_up_x_the_inverse_rms_and_rank_products(op):
    function, arguments = adapters_trained(op)
    expected = [(ROWS,), (ROWS, 5), (ROWS, 5), (ROWS, WIDTH), (ROWS, FFN), (ROWS, FFN)]
    assert saved_of_tokens(function, ROWS, *arguments) == expected


def test_full_fine_tuning_saves_neither_the_normalised_input_nor_h():
    x, norm_weight = inputs()
    flat, put = split(layers(ranks=(0, 0, 0)), FIELDS)
    saved = saved_of_tokens(lambda x, w, *a: hand(x, w, *put(a)), ROWS, x, norm_weight, *flat)
    assert saved == [(ROWS,), (ROWS, WIDTH), (ROWS, FFN), (ROWS, FFN)]


def test_training_b_of_down_alone_saves_its_rank_product():
    x, norm_weight = inputs()
    gate, up, down = layers()
    saved = saved_of_tokens(
        lambda b: hand(x, norm_weight, gate, up, down._replace(lora_b=b)), ROWS, down.lora_b
    )
    assert saved == [(ROWS, 5)]


def test_h_is_never_written_where_only_adapters_are_trained():
    function, arguments = adapters_trained(kernels)
    with tuned.candidate("lowrank_gated_backward", BACKWARD):
        launched = kernel_outputs(gradient(function), *arguments)
    assert launched["lowrank_gated_backward"] == [(ROWS, FFN)] * 2 + [(5, FFN)] * 3


def test_h_is_rebuilt_for_a_trained_down_projection_in_the_launch_that_makes_both_gradients():
    x, norm_weight = inputs()
    flat, put = split(layers(ranks=(0, 0, 0)), FIELDS)
    function = gradient(lambda x, *a: kernels(x, norm_weight, *put(a)))
    assert kernel_outputs(function, x, *flat)["gated_activation_backward"] == [(ROWS, FFN)] * 3


def test_h_is_not_rebuilt_for_a_frozen_down_projection():
    function, arguments = adapters_trained(kernels, ranks=(3, 2, 0))
    with tuned.candidate("lowrank_gated_backward", BACKWARD):
        launched = kernel_outputs(gradient(function), *arguments)
    assert launched["lowrank_gated_backward"] == [(ROWS, FFN)] * 2 + [(5, FFN)] * 2


def test_rank_products_of_gate_and_up_are_one_product():
    function, arguments = adapters_trained()
    products = [
        tuple(v.aval.shape for v in e.invars)
        for e in equations(gradient(function), *arguments)
        if e.primitive.name == "dot_general"
    ]
    assert products.count(((ROWS, WIDTH), (5, WIDTH))) == 1
    assert products.count(((ROWS, 5), (5, WIDTH))) == 1
    assert products.count(((ROWS, 5), (ROWS, WIDTH))) == 1


def test_dropout_draws_the_masks_of_lora_linear():
    dropout = Dropout((0.4, 0.0, 0.2), tuple(jax.random.split(jax.random.key(3), 3)))
    op, reference = (functools.partial(f, dropout=dropout) for f in (hand, oracle))
    assert_gradients_match(layers(), ADAPTERS, op=op, reference=reference, trained="x")


@pytest.mark.parametrize(
    "policy", [None, jax.checkpoint_policies.save_only_these_names("gated_activation_gate")]
)
def test_scan_over_layers_and_checkpoint_keep_the_gradient(policy):
    x, norm_weight = inputs()
    flat, put = split(layers(), ADAPTERS)
    stacks = [jnp.stack([a, 0.5 * a, -a]) for a in flat]

    def run(f, x, *stacks):
        layer = jax.checkpoint(lambda x, a: (f(x, norm_weight, *put(a)), None), policy=policy)
        return jax.lax.scan(layer, x, stacks)[0]

    op, reference = (functools.partial(run, f) for f in (hand, oracle))
    labels = names(("y", "dx"), len(flat))
    assert_matches_oracle(op, reference, (x, *stacks), normal(52, x.shape), "float32", labels)


def test_scan_saves_each_array_once_a_layer():
    x, norm_weight = inputs()
    flat, put = split(layers(), ADAPTERS)
    stacks = [jnp.stack([a] * 4) for a in flat]

    def run(x, *stacks):
        return jax.lax.scan(lambda x, a: (hand(x, norm_weight, *put(a)), None), x, stacks)[0]

    saved = saved_shapes(run, x, *stacks)
    assert saved.count((4, ROWS, FFN)) == 2 and saved.count((4, ROWS, WIDTH)) == 1


def test_pulling_back_twice_gives_the_same_gradient():
    """The gradients may take the memory of what was saved; what was saved must not change for it."""
    function, arguments = adapters_trained(kernels)
    y, pullback = jax.vjp(function, *arguments)
    assert all((a == b).all() for a, b in zip(pullback(y), pullback(y), strict=True))


def test_leading_axes_are_tokens():
    x, norm_weight = normal(0, (2, 3, WIDTH)), inputs()[1]
    flat, put = split(layers(), ADAPTERS)
    op, reference = (lambda x, *a, f=f: f(x, norm_weight, *put(a)) for f in (kernels, oracle))
    labels = names(("y", "dx"), len(flat))
    assert_matches_oracle(op, reference, (x, *flat), normal(52, x.shape), "float32", labels)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "relu"}, "use one of silu"),
        ({"scales": (1.0, 1.0)}, "gate, up and down"),
        ({"norm_weight": jnp.zeros(WIDTH + 1)}, "norm_weight"),
        ({"up": linear(0, WIDTH, FFN + 1)}, "must be \\[f, d\\]"),
        ({"down": linear(0, FFN + 1, WIDTH)}, "must be \\[out, in\\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, norm_weight = inputs()
    values = {"x": x, "norm_weight": norm_weight, **dict(zip(("gate", "up", "down"), layers(), strict=True))}
    with pytest.raises(InputError, match=message):
        gated_mlp(**(values | OPTIONS | change))


def test_lowers_for_an_h100():
    model, bf16 = shapes.LLAMA_3_2_1B, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    up, down = (LinearWeights(bf16(s)) for s in ((model.ffn, model.hidden), (model.hidden, model.ffn)))
    x, norm_weight = bf16((shapes.TOKENS, model.hidden)), bf16((model.hidden,))
    assert "gated_activation_backward" in lower_for_h100(gradient(kernels), x, norm_weight, up, up, down)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    up, down = (
        linear._replace(lora_a=f32((shapes.RANK, i)), lora_b=f32((o, shapes.RANK)))
        for linear in (up, down)
        for o, i in (linear.weight.shape,)
    )
    assert "lowrank_gated_backward" in lower_for_h100(gradient(kernels), x, norm_weight, up, up, down)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", shapes.EDGE_ROWS)
def test_matches_oracle_on_a_gpu(rows, dtype):
    width, ffn = 576, 1536
    x, norm_weight = normal(0, (rows, width), dtype), normal(1, (width,), dtype)
    sizes = ((width, ffn), (width, ffn), (ffn, width))
    flat, put = split([linear(10 * i, *s, rank=16, dtype=dtype) for i, s in enumerate(sizes)], ADAPTERS)
    op, reference = (lambda x, w, *a, f=f: f(x, w, *put(a)) for f in (hand, oracle))
    labels = names(("y", "dx", "dnorm"), len(flat))
    assert_matches_oracle(op, reference, (x, norm_weight, *flat), normal(5, x.shape, dtype), dtype, labels)


@pytest.mark.gpu
def test_the_compiled_gradient_overwrites_gate_and_up_without_a_copy_on_a_gpu():
    """Alive at most: gate, up, and two addends of dh (or of gate or up). The weights are too large for XLA to merge
    two products into one, as a real model's are; dy follows from y, so that the forward pass comes first."""
    rows, width, ffn = 4096, 2048, 8192
    x, norm_weight = normal(0, (rows, width), "bfloat16"), normal(1, (width,), "bfloat16")
    sizes = ((width, ffn), (width, ffn), (ffn, width))
    flat, put = split([linear(10 * i, *s, rank=16, dtype="bfloat16") for i, s in enumerate(sizes)], ADAPTERS)

    def step(x, *flat):
        y, pullback = jax.vjp(lambda x, *a: hand(x, norm_weight, *put(a)), x, *flat)
        return pullback(y)

    compiled = jax.jit(step).lower(x, *flat).compile()
    copies = [
        line for line in compiled.as_text().splitlines() if f"bf16[{rows},{ffn}]" in line and " copy(" in line
    ]
    assert not copies
    wide, narrow, workspace = rows * ffn * 2, rows * width * 2, 1 << 25
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * wide + 6 * narrow + workspace
