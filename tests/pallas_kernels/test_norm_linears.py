"""norm_linears: hand gradient against oracle, what is stacked, what is saved, what is never computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import shapes
from pronghorn.pallas_kernels.norm_linears import Dropout, norm_linears, norm_linears_reference
from pronghorn.pallas_kernels.stacked_linears import MOST_SHARED_RANK, LinearWeights
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import (
    assert_matches_oracle,
    equations,
    gradient,
    kernel_outputs,
    normal,
    saved_shapes,
    shapes_computed,
)
from tests.pallas_kernels.linear_inputs import linear, names, quantized, saved_of_tokens, split

ROWS, WIDTH = 13, 37
SCALES = (0.75, 0.5, 2.0)
OPTIONS = {"scales": SCALES, "eps": 1e-5}
hand = functools.partial(norm_linears, **OPTIONS)
oracle = functools.partial(norm_linears_reference, **OPTIONS)
FIELDS = LinearWeights._fields


def layers(dtype="float32", ranks=(3, 2, 4)):
    """q, k and v of three widths, two with a bias."""
    return tuple(
        linear(10 * i, WIDTH, outputs, rank=rank, bias=i != 1, dtype=dtype)
        for i, (outputs, rank) in enumerate(zip((11, 5, 7), ranks, strict=True))
    )


def inputs(dtype="float32"):
    return normal(0, (ROWS, WIDTH), dtype, scale=3.0), normal(1, (WIDTH,), dtype)


def cotangent(dtype="float32"):
    return normal(5, (ROWS, WIDTH), dtype), tuple(
        normal(6 + i, (ROWS, o), dtype) for i, o in enumerate((11, 5, 7))
    )


def assert_gradients_match(
    linears, fields=FIELDS, dtype="float32", op=hand, reference=oracle, trained="x norm"
):
    """Outputs, and gradients of x and norm (where trained) and of these fields of every layer."""
    x, norm_weight = inputs(dtype)
    flat, put = split(linears, fields)

    def call(f):
        def run(values, *of_layers):
            given = {"x": x, "norm": norm_weight} | values
            return f(given["x"], given["norm"], put(of_layers))

        return run

    values = {name: value for name, value in (("norm", norm_weight), ("x", x)) if name in trained}
    labels = names(("x", "q", "k", "v", *(f"d{name}" for name in values)), len(flat))
    assert_matches_oracle(call(op), call(reference), (values, *flat), cotangent(dtype), dtype, labels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_matches_oracle(dtype):
    assert_gradients_match(layers(dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_matches_oracle_with_only_adapters_trained(dtype):
    """Without a trained weight the normalised input is not even rebuilt."""
    assert_gradients_match(layers(dtype), ("lora_a", "lora_b"), dtype, trained="x")


def test_kernels_match_oracle():
    pallas = functools.partial(hand, implementation="pallas")
    assert_gradients_match(layers(), op=pallas)


@pytest.mark.parametrize("ranks", [(0, 0, 0), (3, 0, 0), (0, 4, 1), (MOST_SHARED_RANK, 0, 1)], ids=str)
def test_layers_may_lack_an_adapter(ranks):
    assert_gradients_match(layers(ranks=ranks))


def test_weight_offset_is_added_to_the_norm_weight():
    op, reference = (functools.partial(f, weight_offset=1.0) for f in (hand, oracle))
    assert_gradients_match(layers(), ("lora_a", "lora_b"), op=op, reference=reference)


@pytest.mark.parametrize(
    "fields, trained",
    [
        (("lora_a",), ""),
        (("lora_b",), ""),
        (("weight",), ""),
        (("bias",), ""),
        ((), "x"),
        ((), "norm"),
        (("lora_a", "weight"), "norm"),
    ],
    ids=str,
)
def test_each_argument_can_be_trained_alone(fields, trained):
    assert_gradients_match(layers(ranks=(3, 0, 2)), fields, trained=trained)


def test_adapters_of_some_layers_can_be_frozen():
    q, k, v = layers()
    x, norm_weight = inputs()
    op, reference = (
        lambda x, a, b, f=f: f(x, norm_weight, (q, k._replace(lora_a=a), v._replace(lora_b=b)))
        for f in (hand, oracle)
    )
    labels = ("x", "q", "k", "v", "dx", "da of k", "db of v")
    assert_matches_oracle(op, reference, (x, k.lora_a, v.lora_b), cotangent(), "float32", labels)


def test_leading_axes_are_tokens():
    x, norm_weight = normal(0, (2, 3, WIDTH)), normal(1, (WIDTH,))
    flat, put = split(layers(), ("lora_a", "lora_b"))
    op, reference = (lambda x, *a, f=f: f(x, norm_weight, put(a))[1] for f in (hand, oracle))
    dys = tuple(normal(6, (2, 3, o)) for o in (11, 5, 7))
    assert_matches_oracle(op, reference, (x, *flat), dys, "float32", names(("q", "k", "v", "dx"), len(flat)))


def test_outputs_that_nothing_depends_on_add_nothing():
    x, norm_weight = inputs()
    flat, put = split(layers(), ("lora_a", "lora_b"))
    op, reference = (lambda x, *a, f=f: f(x, norm_weight, put(a))[1][1] for f in (hand, oracle))
    labels = names(("k", "dx"), len(flat))
    assert_matches_oracle(op, reference, (x, *flat), normal(6, (ROWS, 5)), "float32", labels)


def test_quantised_weights_match_their_dense_twins():
    x, norm_weight = inputs()
    pairs = [quantized(layer) for layer in layers()]
    flat, _ = split([codes for codes, _ in pairs], ("lora_a", "lora_b"))

    def call(f, linears):
        put = split(linears, ("lora_a", "lora_b"))[1]
        return lambda x, *a: f(x, norm_weight, put(a))

    op, reference = call(hand, [codes for codes, _ in pairs]), call(oracle, [dense for _, dense in pairs])
    labels = names(("x", "q", "k", "v", "dx"), len(flat))
    assert_matches_oracle(op, reference, (x, *flat), cotangent(), "float32", labels)


def test_quantised_weights_pass_a_barrier_in_front_of_each_product():
    x, norm_weight = inputs()
    linears = tuple(quantized(layer)[0] for layer in layers())
    program = equations(gradient(lambda x: hand(x, norm_weight, linears)), x)
    barriers = [e for e in program if e.primitive.name == "optimization_barrier"]
    assert [sum(v.aval.dtype == jnp.int8 for v in e.invars) for e in barriers] == [1] * 6


def test_training_a_quantised_weight_is_refused():
    x, norm_weight = inputs()
    layer = quantized(layers()[0])[0]
    with pytest.raises(InputError, match="quantised weight cannot be trained"):
        jax.grad(
            lambda w: norm_linears(x, norm_weight, [w], scales=(1.0,), eps=1e-5)[1][0].sum(), allow_int=True
        )(layer)


def adapters_trained(linears):
    """(function of x and every adapter, its arguments) with frozen weights."""
    x, norm_weight = inputs()
    flat, put = split(linears, ("lora_a", "lora_b"))
    return (lambda x, *a: hand(x, norm_weight, put(a))), (x, *flat)


def test_training_adapters_saves_x_the_inverse_rms_and_the_rank_products():
    function, arguments = adapters_trained(layers())
    assert saved_of_tokens(function, ROWS, *arguments) == [(ROWS,), (ROWS, 9), (ROWS, WIDTH)]


def test_training_adapters_saves_the_array_that_came_in():
    """Another array of the same values would be a second copy of the residual stream."""
    function, (x, *adapters) = adapters_trained(layers())
    _, pullback = jax.vjp(function, x, *adapters)
    (saved,) = (leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == x.shape)
    assert saved.unsafe_buffer_pointer() == x.unsafe_buffer_pointer()


def test_training_the_weights_saves_no_normalised_input_either():
    x, norm_weight = inputs()
    flat, put = split(layers(), FIELDS)
    saved = saved_of_tokens(lambda x, *a: hand(x, norm_weight, put(a)), ROWS, x, *flat)
    assert saved.count((ROWS, WIDTH)) == 1


def test_frozen_layers_save_no_rank_products():
    x, norm_weight = inputs()
    assert (ROWS, 9) not in saved_shapes(lambda x: hand(x, norm_weight, layers()), x)


def test_rank_products_of_all_layers_are_one_product():
    """T and G A forward and backward, and dA: one product each, whatever the number of layers."""
    function, arguments = adapters_trained(layers())
    products = [
        tuple(v.aval.shape for v in e.invars)
        for e in equations(gradient(function), *arguments)
        if e.primitive.name == "dot_general"
    ]
    assert products.count(((ROWS, WIDTH), (9, WIDTH))) == 1
    assert products.count(((ROWS, 9), (9, WIDTH))) == 1
    assert products.count(((ROWS, 9), (ROWS, WIDTH))) == 1


def test_training_adapters_computes_nothing_of_the_weights_size():
    function, arguments = adapters_trained(layers())
    computed = shapes_computed(gradient(function), *arguments)
    assert (
        not {shape for layer in layers() for shape in (layer.weight.shape, layer.weight.shape[::-1])}
        & computed
    )


def test_the_first_layers_input_gets_no_gradient_computed():
    x, norm_weight = inputs()
    flat, put = split(layers(), ("lora_a", "lora_b"))
    program = equations(gradient(lambda *a: norm_linears(x, norm_weight, put(a), **OPTIONS)[1]), *flat)
    products = [tuple(v.aval.shape for v in e.invars) for e in program if e.primitive.name == "dot_general"]
    assert ((ROWS, 11), (11, WIDTH)) not in products


def test_residual_gradient_is_added_inside_the_norm_kernel():
    pallas = functools.partial(hand, implementation="pallas")
    x, norm_weight = inputs()
    flat, put = split(layers(), ("lora_a", "lora_b"))
    program = gradient(lambda x, *a: pallas(x, norm_weight, put(a)))
    assert kernel_outputs(program, x, *flat)["rms_norm_backward"] == [(ROWS, WIDTH)]
    adds = [e for e in equations(program, x, *flat) if e.primitive.name in ("add", "add_any")]
    # dn: three products are added to the rank product; the residual is added in the kernel, which works on blocks.
    assert sum(e.outvars[0].aval.shape == (ROWS, WIDTH) for e in adds) == 3


def test_dropout_draws_the_masks_of_lora_linear():
    keys = tuple(jax.random.split(jax.random.key(3), 3))
    op, reference = (functools.partial(f, dropout=Dropout((0.4, 0.0, 0.2), keys)) for f in (hand, oracle))
    assert_gradients_match(layers(), ("lora_a", "lora_b"), op=op, reference=reference, trained="x")


def test_scan_over_layers_and_checkpoint_keep_the_gradient():
    x, norm_weight = inputs()
    square = [linear(10 * i, WIDTH, WIDTH, rank=2) for i in range(2)]
    flat, put = split(square, ("lora_a", "lora_b"))
    stacks = [jnp.stack([a, 0.5 * a, -a]) for a in flat]

    def run(f, x, *stacks):
        @jax.checkpoint
        def layer(x, adapters):
            x, (y, z) = f(x, norm_weight, put(adapters), scales=(0.1, 0.2), eps=1e-5)
            return x + y * jax.nn.sigmoid(z), None

        return jax.lax.scan(layer, x, stacks)[0]

    op, reference = (functools.partial(run, f) for f in (norm_linears, norm_linears_reference))
    labels = names(("y", "dx"), len(flat))
    assert_matches_oracle(op, reference, (x, *stacks), normal(5, x.shape), "float32", labels)


def test_scan_saves_one_residual_stream_a_layer():
    x, norm_weight = inputs()
    flat, put = split([linear(10 * i, WIDTH, WIDTH, rank=2) for i in range(2)], ("lora_a", "lora_b"))
    stacks = [jnp.stack([a] * 4) for a in flat]

    def run(x, *stacks):
        def layer(x, adapters):
            x, (y, z) = norm_linears(x, norm_weight, put(adapters), scales=(0.1, 0.2), eps=1e-5)
            return x + y + z, None

        return jax.lax.scan(layer, x, stacks)[0]

    assert saved_shapes(run, x, *stacks).count((4, ROWS, WIDTH)) == 1


def test_vmap_over_adapters_keeps_the_gradient():
    x, norm_weight = inputs()
    flat, put = split(layers(), ("lora_a", "lora_b"))
    stacks = [jnp.stack([a, 2.0 * a]) for a in flat]
    op, reference = (jax.vmap(lambda *a, f=f: f(x, norm_weight, put(a))[1]) for f in (hand, oracle))
    dys = tuple(normal(6, (2, ROWS, o)) for o in (11, 5, 7))
    assert_matches_oracle(op, reference, stacks, dys, "float32", names(("q", "k", "v"), len(flat)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm_weight": jnp.zeros(WIDTH + 1)}, "norm_weight"),
        ({"scales": (1.0,)}, "one scale a layer"),
        ({"linears": [linear(0, WIDTH + 1, 4)] * 3}, "must be \\[out, in\\]"),
        ({"linears": [linear(0, WIDTH, 4, rank=2)._replace(lora_b=None)] * 3}, "both lora_a and lora_b"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, norm_weight = inputs()
    values = {"x": x, "norm_weight": norm_weight, "linears": layers(), **OPTIONS}
    with pytest.raises(InputError, match=message):
        norm_linears(**(values | change))


def test_lowers_for_an_h100():
    model, bf16 = shapes.LLAMA_3_2_1B, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    weights = [LinearWeights(bf16((o, model.hidden))) for o in (2048, 512, 512)]
    x, norm_weight = bf16((shapes.TOKENS, model.hidden)), bf16((model.hidden,))
    pallas = functools.partial(hand, implementation="pallas")
    assert "rms_norm_backward" in lower_for_h100(gradient(pallas), x, norm_weight, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", shapes.EDGE_ROWS)
def test_matches_oracle_on_a_gpu(rows, dtype):
    width = 576
    x, norm_weight = normal(0, (rows, width), dtype), normal(1, (width,), dtype)
    linears = [linear(10 * o, width, o, rank=16, dtype=dtype) for o in (576, 192, 192)]
    flat, put = split(linears, ("lora_a", "lora_b"))
    op, reference = (lambda x, w, *a, f=f: f(x, w, put(a)) for f in (hand, oracle))
    dys = normal(5, (rows, width), dtype), tuple(normal(6, (rows, o), dtype) for o in (576, 192, 192))
    labels = names(("x", "q", "k", "v", "dx", "dnorm"), len(flat))
    assert_matches_oracle(op, reference, (x, norm_weight, *flat), dys, dtype, labels)
    assert np.all(np.isfinite(np.asarray(jax.jit(hand)(x, norm_weight, linears)[1][0], np.float32)))
