"""lora_linear: hand gradient against oracle, what is saved, what is never computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch, shapes
from pronghorn.pallas_kernels.lora_linear import lora_linear, lora_linear_reference
from tests.pallas_kernels.comparison import (
    DTYPES,
    assert_matches_oracle,
    equations,
    gradient,
    normal,
    saved_shapes,
    shapes_computed,
    value_and_gradients,
)
from tests.tolerances import assert_close

ODD = shapes.SMALL_LORA_LINEAR[1]
NAMES = ("y", "dx", "dweight", "dlora_a", "dlora_b", "dbias")
hand = functools.partial(lora_linear, scale=0.75)
oracle = functools.partial(lora_linear_reference, scale=0.75)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """A quantised weight as a layer sees it: codes [out, in] and one scale a row."""

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self):
        return self.codes.shape

    def dequantize(self):
        return self.codes.astype(jnp.float32) * self.scales[:, None]


def int8_weight(shape):
    codes = np.random.default_rng(7).integers(-127, 128, (shape.outputs, shape.inputs))
    return Int8Weight(jnp.asarray(codes, jnp.int8), jnp.linspace(0.01, 0.02, shape.outputs))


def arguments(shape, dtype="float32"):
    """x, W, A, B, bias; the masters A and B in fp32."""
    x = normal(0, (shape.rows, shape.inputs), dtype)
    weight = normal(1, (shape.outputs, shape.inputs), dtype, scale=shape.inputs**-0.5)
    lora_a = normal(2, (shape.rank, shape.inputs), scale=shape.inputs**-0.5)
    lora_b = normal(3, (shape.outputs, shape.rank))
    return x, weight, lora_a, lora_b, normal(4, (shape.outputs,), dtype)


def all_trained(op, **options):
    return lambda x, weight, a, b, bias: op(x, weight, a, b, bias=bias, **options)


def assert_shape_matches(shape, dtype, **options):
    inputs = arguments(shape, dtype)
    cotangent = normal(5, (shape.rows, shape.outputs), dtype)
    assert_matches_oracle(
        all_trained(hand, **options), all_trained(oracle, **options), inputs, cotangent, dtype, NAMES
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", shapes.SMALL_LORA_LINEAR, ids=lambda s: s.name)
def test_matches_oracle(shape, dtype):
    assert_shape_matches(shape, dtype)


def test_without_an_adapter_is_a_plain_linear_layer():
    x, weight, _, _, bias = arguments(ODD)
    op, reference = (lambda x, w, b, f=f: f(x, w, bias=b) for f in (hand, oracle))
    cotangent = normal(5, (ODD.rows, ODD.outputs))
    assert_matches_oracle(
        op, reference, (x, weight, bias), cotangent, "float32", ("y", "dx", "dweight", "dbias")
    )
    assert_close(hand(x, weight), x @ weight.T)


def test_leading_axes_are_tokens():
    x, weight, a, b, bias = arguments(ODD)
    x = normal(6, (2, 3, ODD.inputs))
    cotangent = normal(5, (2, 3, ODD.outputs))
    inputs = (x, weight, a, b, bias)
    assert_matches_oracle(all_trained(hand), all_trained(oracle), inputs, cotangent, "float32", NAMES)


def test_fp32_weight_computes_in_the_dtype_of_x():
    x, weight, a, b, bias = arguments(ODD)
    inputs = (x.astype(jnp.bfloat16), weight, a, b, bias)
    cotangent = normal(5, (ODD.rows, ODD.outputs), "bfloat16")
    assert_matches_oracle(all_trained(hand), all_trained(oracle), inputs, cotangent, "bfloat16", NAMES)


def test_adapter_gradients_are_fp32_and_not_rounded_to_the_dtype_of_x():
    inputs = arguments(ODD, "bfloat16")
    _, gradients = value_and_gradients(all_trained(hand), inputs, normal(5, (13, 11), "bfloat16"))
    for gradient_ in gradients[2:4]:
        assert gradient_.dtype == jnp.float32
        assert np.any(np.asarray(gradient_) != np.asarray(gradient_.astype(jnp.bfloat16), np.float32))


def test_the_hand_gradient_is_the_default_on_a_cpu_too():
    x, weight, a, b, _ = arguments(ODD)
    with jax.default_device(jax.devices("cpu")[0]):
        assert "custom_vjp_call" in str(jax.make_jaxpr(lora_linear)(x, weight, a, b))
        with launch.kernels("xla"):
            assert "custom_vjp_call" not in str(jax.make_jaxpr(lora_linear)(x, weight, a, b))


def test_training_an_adapter_computes_nothing_of_the_weights_size():
    """Neither a cotangent of the frozen weight, nor ΔW = B A, nor a transposed copy."""
    x, weight, a, b, _ = arguments(ODD)
    computed = shapes_computed(gradient(lambda x, a, b: hand(x, weight, a, b)), x, a, b)
    assert not {weight.shape, weight.shape[::-1]} & computed


def test_training_the_weight_computes_its_gradient_once():
    x, weight, a, b, _ = arguments(ODD)
    assert weight.shape in shapes_computed(gradient(lambda w: hand(x, w, a, b)), weight)


def test_training_an_adapter_saves_x_and_the_rank_product():
    x, weight, a, b, _ = arguments(ODD)
    saved = saved_shapes(lambda x, a, b: hand(x, weight, a, b), x, a, b)
    assert saved == sorted([x.shape, (ODD.rows, ODD.rank), weight.shape, a.shape, b.shape])


def test_training_b_alone_does_not_save_x():
    x, weight, a, b, _ = arguments(ODD)
    assert x.shape not in saved_shapes(lambda x, b: hand(x, weight, a, b), x, b)


def test_frozen_layer_does_not_save_x():
    x, weight, a, b, _ = arguments(ODD)
    saved = saved_shapes(lambda x: hand(x, weight, a, b), x)
    assert x.shape not in saved and (ODD.rows, ODD.rank) not in saved


def test_layers_that_share_an_input_save_it_once():
    width, depth = ODD.inputs, 4
    x, weight = normal(0, (ODD.rows, width)), normal(1, (width, width))
    stacks = normal(2, (depth, 3, width)), normal(3, (depth, width, 3))

    def two_in_each_layer(x, a, b):
        def step(x, adapter):
            return hand(x, weight, *adapter) + hand(x, weight, *adapter, scale=0.5), None

        return jax.lax.scan(step, x, (a, b))[0]

    assert saved_shapes(two_in_each_layer, x, *stacks).count((depth, *x.shape)) == 1


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (3,), (4,), (2, 3), (0, 4)])
def test_each_argument_can_be_trained_alone(trained):
    inputs, cotangent = arguments(ODD), normal(5, (ODD.rows, ODD.outputs))

    def some(op, *values):
        full = list(inputs)
        for index, value in zip(trained, values, strict=True):
            full[index] = value
        return all_trained(op)(*full)

    names = ("y", *(NAMES[i + 1] for i in trained))
    op, reference = (functools.partial(some, f) for f in (hand, oracle))
    assert_matches_oracle(op, reference, [inputs[i] for i in trained], cotangent, "float32", names)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_weight_matches_its_dense_twin(dtype):
    x, _, a, b, _ = arguments(ODD, dtype)
    weight = int8_weight(ODD)
    dense = weight.dequantize()
    op, reference = (lambda x, a, b, f=f, w=w: f(x, w, a, b) for f, w in ((hand, weight), (oracle, dense)))
    cotangent = normal(5, (ODD.rows, ODD.outputs), dtype)
    assert_matches_oracle(op, reference, (x, a, b), cotangent, dtype, ("y", "dx", "dlora_a", "dlora_b"))


def test_quantised_weight_is_saved_as_codes():
    x, _, a, b, _ = arguments(ODD)
    weight = int8_weight(ODD)
    _, pullback = jax.vjp(lambda x: hand(x, weight, a, b), x)
    saved = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == weight.shape]
    assert [leaf.dtype for leaf in saved] == [jnp.int8]


def test_quantised_weight_passes_a_barrier_in_front_of_each_product():
    """Without, the compiler would dequantise a whole model first, and keep the dense weights alive until backward."""
    x, _, a, b, _ = arguments(ODD)
    weight = int8_weight(ODD)
    program = equations(gradient(lambda x: hand(x, weight, a, b)), x)
    barriers = [e for e in program if e.primitive.name == "optimization_barrier"]
    assert [any(v.aval.dtype == jnp.int8 for v in e.invars) for e in barriers] == [True, True]


def test_training_a_quantised_weight_is_refused():
    x, _, a, b, _ = arguments(ODD)
    weight = int8_weight(ODD)
    with pytest.raises(InputError, match="quantised weight cannot be trained"):
        jax.grad(lambda s: hand(x, dataclasses.replace(weight, scales=s), a, b).sum())(weight.scales)


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["typed", "raw"])
def test_dropout_masks_backward_as_forward(key):
    assert_shape_matches(ODD, "float32", dropout_rate=0.4, dropout_key=key)


def test_dropout_matches_oracle_in_half_precision():
    assert_shape_matches(ODD, "bfloat16", dropout_rate=0.4, dropout_key=jax.random.key(3))


def test_dropout_drops_its_share_and_scales_the_rest():
    n = 64
    x, eye = jnp.ones((50, n)), jnp.eye(n)
    y = lora_linear(x, jnp.zeros((n, n)), eye, eye, dropout_rate=0.25, dropout_key=jax.random.key(0))
    kept = np.asarray(y) != 0
    assert_close(y, kept / 0.75)
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.25 * 0.75 / kept.size)


def test_dropout_leaves_the_base_product_alone():
    x, weight, a, _, _ = arguments(ODD)
    b = jnp.zeros((ODD.outputs, ODD.rank))
    assert_close(hand(x, weight, a, b, dropout_rate=0.9, dropout_key=jax.random.key(0)), x @ weight.T)


def test_dropout_without_a_key_is_off():
    x, weight, a, b, _ = arguments(ODD)
    np.testing.assert_array_equal(hand(x, weight, a, b, dropout_rate=0.5), hand(x, weight, a, b))


def test_dropout_saves_no_mask():
    x, weight, a, b, _ = arguments(ODD)
    dropped = functools.partial(hand, dropout_rate=0.5, dropout_key=jax.random.PRNGKey(0))
    with_dropout = saved_shapes(lambda x, a, b: dropped(x, weight, a, b), x, a, b)
    without = saved_shapes(lambda x, a, b: hand(x, weight, a, b), x, a, b)
    assert sorted([*without, (2,)]) == with_dropout


def test_scan_over_layers_and_checkpoint_keep_the_gradient():
    width = 7
    x, weights = normal(0, (5, width)), normal(1, (3, width, width))
    stacks = normal(2, (3, 2, width)), normal(3, (3, width, 2))

    def run(op, x, a, b):
        layer = jax.checkpoint(lambda x, p: (jnp.tanh(op(x, *p)), None))
        return jax.lax.scan(layer, x, (weights, a, b))[0]

    op, reference = (functools.partial(run, f) for f in (hand, oracle))
    names = ("y", "dx", "dlora_a", "dlora_b")
    assert_matches_oracle(op, reference, (x, *stacks), normal(5, x.shape), "float32", names)


def test_vmap_over_adapters_keeps_the_gradient():
    x, weight, _, _, _ = arguments(ODD)
    a, b = normal(2, (4, 3, ODD.inputs)), normal(3, (4, ODD.outputs, 3))
    op, reference = (jax.vmap(lambda a, b, f=f: f(x, weight, a, b)) for f in (hand, oracle))
    cotangent = normal(5, (4, ODD.rows, ODD.outputs))
    assert_matches_oracle(op, reference, (a, b), cotangent, "float32", ("y", "dlora_a", "dlora_b"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": jnp.zeros((11, 36))}, "must be \\[out, in\\]"),
        ({"lora_a": None}, "both lora_a and lora_b"),
        ({"lora_a": jnp.zeros((3, 36))}, "must be \\[r, in\\]"),
        ({"lora_b": jnp.zeros((11, 2))}, "must be \\[r, in\\]"),
        ({"bias": jnp.zeros(10)}, "bias"),
        ({"dropout_rate": 1.0}, "in \\[0, 1\\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    values = dict(zip(("x", "weight", "lora_a", "lora_b", "bias"), arguments(ODD), strict=True))
    with pytest.raises(InputError, match=message):
        lora_linear(**(values | change))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", shapes.LARGE_LORA_LINEAR, ids=lambda s: s.name)
def test_matches_oracle_on_a_gpu(shape):
    assert_shape_matches(shape, "bfloat16", dropout_rate=0.1, dropout_key=jax.random.key(3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", shapes.EDGE_ROWS)
def test_matches_oracle_on_a_gpu_with_few_rows(rows, dtype):
    assert_shape_matches(shapes.LinearShape("", rows, 576, 1536, 16), dtype)


@pytest.mark.gpu
def test_quantised_weight_is_dequantised_again_in_backward_on_a_gpu():
    x, _, a, b, _ = arguments(ODD)
    step = jax.jit(lambda x, a, b, weight: gradient(lambda x: jnp.tanh(hand(x, weight, a, b)))(x))
    compiled = step.lower(x, a, b, int8_weight(ODD)).compile().as_text()
    assert sum(" convert(" in line and "f32[11,37]" in line for line in compiled.splitlines()) >= 2
