"""apply_rope: kernel against oracle, and the rotation's own properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import shapes
from pronghorn.pallas_kernels.rope import apply_rope, apply_rope_reference
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import (
    DTYPES,
    assert_matches_oracle,
    gradient,
    kernel_outputs,
    normal,
    saved_shapes,
)
from tests.tolerances import assert_close

NAMES = ("q", "k", "dq", "dk")
kernel = jax.jit(functools.partial(apply_rope, implementation="pallas"))
ODD = shapes.SMALL_ROPE[3]


def arguments(shape, dtype="float32"):
    q = normal(0, (shape.batch, shape.seq, shape.num_heads, shape.head_dim), dtype)
    k = normal(1, (shape.batch, shape.seq, shape.num_kv_heads, shape.head_dim), dtype)
    angles = normal(2, (shape.batch, shape.seq, shape.rotated // 2), scale=3.0)
    return (q, k), (jnp.cos(angles), jnp.sin(angles))


def with_angles(op, angles):
    return lambda q, k: op(q, k, *angles)


def assert_shape_matches(shape, dtype):
    heads, angles = arguments(shape, dtype)
    cotangent = (normal(3, heads[0].shape, dtype), normal(4, heads[1].shape, dtype))
    op, oracle = with_angles(kernel, angles), with_angles(apply_rope_reference, angles)
    assert_matches_oracle(op, oracle, heads, cotangent, dtype, NAMES)


@pytest.mark.parametrize("shape", shapes.SMALL_ROPE, ids=lambda s: s.name)
def test_matches_oracle(shape):
    assert_shape_matches(shape, "float32")


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_matches_oracle_in_half_precision(dtype):
    assert_shape_matches(ODD, dtype)


def test_oracle_is_the_rotation_of_complex_pairs():
    (q, k), (cos, sin) = arguments(shapes.SMALL_ROPE[1])
    half = cos.shape[-1]
    pairs = np.asarray(q[..., :half]) + 1j * np.asarray(q[..., half:])
    turned = pairs * (np.asarray(cos) + 1j * np.asarray(sin))[:, :, None, :]
    assert_close(apply_rope_reference(q, k, cos, sin)[0], np.concatenate([turned.real, turned.imag], -1))


def test_backward_undoes_forward():
    heads, angles = arguments(ODD)
    rotated, pullback = jax.vjp(with_angles(kernel, angles), *heads)
    for x, again in zip(heads, pullback(rotated), strict=True):
        assert_close(again, x)


def test_dimensions_past_the_rotated_are_copied():
    (q, k), angles = arguments(ODD, "bfloat16")
    rotated_q, rotated_k = kernel(q, k, *angles)
    np.testing.assert_array_equal(rotated_q[..., ODD.rotated :], q[..., ODD.rotated :])
    np.testing.assert_array_equal(rotated_k[..., ODD.rotated :], k[..., ODD.rotated :])


def test_queries_and_keys_share_one_launch():
    heads, angles = arguments(ODD)
    assert kernel_outputs(kernel, *heads, *angles) == {"rope": [(10, 3, 20), (10, 1, 20)]}


def test_saves_cos_and_sin_only():
    heads, angles = arguments(ODD)
    assert saved_shapes(with_angles(kernel, angles), *heads) == [a.shape for a in angles]


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_angles_get_no_gradient(implementation):
    heads, angles = arguments(ODD)
    total = jax.grad(lambda cos: apply_rope(*heads, cos, angles[1], implementation=implementation)[0].sum())
    np.testing.assert_array_equal(total(angles[0]), 0.0)


def test_one_row_of_angles_serves_the_batch():
    (q, k), (cos, sin) = arguments(shapes.SMALL_ROPE[1])
    one = kernel(q, k, cos[:1], sin[:1])
    every = kernel(q, k, *(jnp.repeat(a[:1], q.shape[0], axis=0) for a in (cos, sin)))
    np.testing.assert_array_equal(one[0], every[0])


def test_scan_checkpoint_and_vmap_keep_the_gradient():
    (q, k), angles = arguments(shapes.SMALL_ROPE[2])

    def turns(op, q, k):
        each = jax.vmap(lambda q, k: op(q, k, *angles))
        step = jax.checkpoint(lambda heads, _: (each(*heads), None))
        return jax.lax.scan(step, (q[None], k[None]), None, length=2)[0]

    op, oracle = (functools.partial(turns, f) for f in (kernel, apply_rope_reference))
    assert_matches_oracle(op, oracle, (q, k), (q[None], k[None]), "float32", NAMES)


@pytest.mark.parametrize(
    "cos_shape, message", [((2, 5, 11), "too many"), ((2, 4, 6), "must be"), ((3, 5, 6), "must be")]
)
def test_angles_that_do_not_fit_are_refused(cos_shape, message):
    (q, k), _ = arguments(ODD)
    with pytest.raises(InputError, match=message):
        kernel(q, k, jnp.ones(cos_shape), jnp.ones(cos_shape))


def test_heads_of_another_width_are_refused():
    (q, k), angles = arguments(ODD)
    with pytest.raises(InputError, match="alike but for the heads"):
        kernel(q, k[..., :4], *angles)


@pytest.mark.parametrize("shape", shapes.LARGE_ROPE, ids=lambda s: s.name)
def test_lowers_for_an_h100(shape):
    q = jax.ShapeDtypeStruct((shape.batch, shape.seq, shape.num_heads, shape.head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((shape.batch, shape.seq, shape.num_kv_heads, shape.head_dim), jnp.bfloat16)
    angles = [jax.ShapeDtypeStruct((shape.batch, shape.seq, shape.rotated // 2), jnp.float32)] * 2
    text = lower_for_h100(lambda q, k, *angles: gradient(with_angles(kernel, angles))(q, k), q, k, *angles)
    assert "rope_inverse" in text


@pytest.mark.gpu
@pytest.mark.parametrize("shape", shapes.LARGE_ROPE, ids=lambda s: s.name)
def test_matches_oracle_on_a_gpu(shape):
    assert_shape_matches(shape, "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", shapes.EDGE_ROWS)
@pytest.mark.parametrize("shape", shapes.SMALL_ROPE, ids=lambda s: s.name)
def test_matches_oracle_on_a_gpu_past_the_last_block(shape, tokens, dtype):
    assert_shape_matches(shape._replace(batch=1, seq=tokens), dtype)
