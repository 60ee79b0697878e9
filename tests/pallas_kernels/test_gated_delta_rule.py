"""gated_delta_rule: chunks against one token after the other, and what segments must cut."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import gated_delta_chunks
from pronghorn.pallas_kernels.gated_delta_rule import (
    INVERSE_NAME,
    continue_gated_delta_rule,
    gated_delta_rule,
    gated_delta_rule_reference,
    unit_lower_inverse,
)
from pronghorn.pallas_kernels.token_chunks import chunk_decays, cut
from tests.lowering import lower_defaults_for_h100, lower_for_h100
from tests.pallas_kernels.comparison import (
    DTYPES,
    assert_matches_oracle,
    gradient,
    normal,
    saved_shapes,
    segments,
)
from tests.tolerances import assert_close

NAMES = ("out", "dq", "dk", "dv", "dg", "dbeta")
# batch, seq, heads, value heads, dk, dv: under a chunk, a chunk and a bit, several with grouped heads.
SHAPES = [(1, 5, 1, 1, 4, 6), (2, 70, 1, 2, 8, 5), (1, 200, 2, 6, 12, 16)]


def arguments(shape, dtype="float32", *, alike=0.0):
    """Keys of length one, decays from nearly none to nearly all; `alike` of every key is one and the same vector."""
    batch, seq, heads, value_heads, dk, dv = shape
    q, k = normal(0, (batch, seq, heads, dk)), normal(1, (batch, seq, heads, dk))
    k = k + alike * normal(7, (dk,))
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = normal(2, (batch, seq, value_heads, dv))
    g = -jax.nn.softplus(normal(3, (batch, seq, value_heads), scale=3.0) - 3.0)
    beta = jax.nn.sigmoid(normal(4, (batch, seq, value_heads), scale=2.0))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype), g, beta


def assert_shape_matches(shape, dtype="float32", segment_ids=None, *, alike=0.0, **options):
    given = arguments(shape, dtype, alike=alike)
    op = functools.partial(gated_delta_rule, segment_ids=segment_ids, **options)
    oracle = functools.partial(gated_delta_rule_reference, segment_ids=segment_ids)
    assert_matches_oracle(op, oracle, given, normal(5, given[2].shape, dtype), dtype, NAMES)


@pytest.mark.parametrize("size", [1, 2, 64])
def test_inverse_in_blocks_is_the_inverse(size):
    strict = jnp.tril(normal(0, (2, 3, size, size), scale=0.3), -1)
    expected = np.linalg.inv(np.eye(size) + np.asarray(strict, np.float64))
    assert_close(unit_lower_inverse(strict), expected)


def test_nothing_is_left_to_a_library_that_waits_for_threads_of_its_own_pool():
    *given, dout = *arguments(SHAPES[1]), normal(5, (2, 70, 2, 5))
    program = jax.jit(lambda *given: jax.vjp(gated_delta_rule, *given)[1](dout)).lower(*given).as_text()
    assert "dot_general" in program and "custom_call" not in program


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_match_the_recurrence(shape):
    assert_shape_matches(shape)


def test_chunks_match_the_recurrence_in_bf16():
    assert_shape_matches(SHAPES[1], "bfloat16")


def test_segments_that_start_inside_at_the_edge_of_and_across_chunks():
    assert_shape_matches(SHAPES[2], segment_ids=segments(1, 200, 30, 33, 64, 150))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_match_the_recurrence(dtype):
    cuts = segments(1, 200, 30, 33, 64, 150)
    assert_shape_matches(SHAPES[2], dtype, segment_ids=cuts, implementation="pallas")


def test_formulas_of_the_16_bit_kernels_in_fp32(monkeypatch):
    monkeypatch.setattr(sys.modules[gated_delta_rule.__module__], "_has_chunk_kernels", lambda dtype: True)
    for shape in SHAPES:
        cuts = segments(shape[0], shape[1], 30, 33, 64, 150)
        assert_shape_matches(shape, segment_ids=cuts, implementation="pallas")
    assert_shape_matches((1, 130, 1, 1, 8, 4), alike=10.0, implementation="pallas")


def test_lowers_for_an_h100():
    q, v = ((1, 4093, heads, 128) for heads in (16, 32))
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (q, q, v)]
    given += [jax.ShapeDtypeStruct(v[:3], jnp.float32)] * 2
    text = lower_for_h100(gradient(functools.partial(gated_delta_rule, implementation="pallas")), *given)
    assert "gated_delta_states" in text and "gated_delta_gradients" in text
    assert "gated_delta_states" in lower_defaults_for_h100(gradient(gated_delta_rule), *given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_the_recurrence_on_a_gpu(shape, dtype):
    cuts = segments(shape[0], shape[1], 30, 33, 64, 150)
    assert_shape_matches(shape, dtype, cuts, implementation="pallas")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_match_xla_on_a_gpu_at_the_shape_of_qwen_3_5_9b(dtype):
    given = arguments((1, 4096, 16, 32, 128, 128), dtype)
    options = {"segment_ids": segments(1, 4096, 1000, 1030)}
    ops = [functools.partial(gated_delta_rule, implementation=i, **options) for i in ("pallas", "xla")]
    assert_matches_oracle(*ops, given, normal(5, given[2].shape, dtype), dtype, NAMES)


def test_keys_that_are_nearly_one_vector():
    assert_shape_matches((1, 130, 1, 1, 8, 4), alike=10.0)


def test_a_packed_document_is_the_document_alone():
    given = arguments((1, 150, 2, 2, 8, 8))
    packed = gated_delta_rule(*given, segment_ids=segments(1, 150, 70))
    alone = gated_delta_rule(*(x[:, 70:] for x in given))
    assert_close(packed[:, 70:], alone)


def test_the_same_id_again_is_another_segment():
    given, ids = arguments((1, 90, 1, 1, 8, 8)), jnp.asarray([[0] * 20 + [1] * 50 + [0] * 20])
    assert_close(
        gated_delta_rule(*given, segment_ids=ids),
        gated_delta_rule_reference(*given, segment_ids=segments(1, 90, 20, 70)),
    )


def test_a_state_carries_on_and_padding_leaves_it_alone():
    given, state = arguments((2, 90, 1, 2, 8, 4)), jnp.zeros((2, 2, 8, 4))
    first = [x[:, :75] for x in given]
    padded = [jnp.pad(x, ((0, 0), (0, 5), *((0, 0),) * (x.ndim - 2))) for x in first]
    _, state = continue_gated_delta_rule(*padded, state)
    second, _ = continue_gated_delta_rule(*(x[:, 75:] for x in given), state)
    assert_close(second, gated_delta_rule_reference(*given)[:, 75:])


def test_saves_its_inputs_only():
    given = arguments(SHAPES[0])
    runs = given[0].shape[:2]
    assert saved_shapes(gated_delta_rule, *given) == sorted([*(x.shape for x in given), runs])


def test_16_bit_kernels_save_the_inverse_as_well_under_a_name_for_policies():
    given = arguments(SHAPES[1], "bfloat16")
    op = functools.partial(gated_delta_rule, implementation="pallas")
    shapes, inverse = [*(x.shape for x in given), given[0].shape[:2]], (2, 2, 2, 64, 64)
    assert saved_shapes(op, *given) == sorted([*shapes, inverse])
    policies = jax.checkpoint_policies
    kept = jax.checkpoint(op, policy=policies.save_only_these_names(INVERSE_NAME))
    assert inverse in saved_shapes(kept, *given)
    assert inverse not in saved_shapes(jax.checkpoint(op), *given)


def test_u_and_w_of_the_saved_inverse_are_those_of_the_forward_pass():
    _, k, v, g, beta = arguments((1, 64, 2, 4, 16, 16), "bfloat16")
    one = jnp.zeros((1, 64), jnp.int32)
    rows = gated_delta_chunks.Rows(cut(beta, 64), *chunk_decays(g, one, 64))
    inverse, *prepared = gated_delta_chunks.prepare(k, v, rows)
    for again, first in zip(gated_delta_chunks.solve(k, v, inverse, rows), prepared, strict=True):
        np.testing.assert_array_equal(np.asarray(again, np.float32), np.asarray(first, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, g, b: (q, k[..., :2], v, g, b), "q and k alike"),
        (lambda q, k, v, g, b: (q, k, v[:, :, :1], g[:, :, :1], b[:, :, :1]), "no multiple"),
        (lambda q, k, v, g, b: (q, k, v, g[..., 0], b), "value heads"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        gated_delta_rule(*change(*arguments((1, 5, 2, 4, 4, 6))))
