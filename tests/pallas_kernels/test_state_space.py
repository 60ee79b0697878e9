"""state_space: chunks against one token after the other, and what segments must cut."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels.state_space import continue_state_space, state_space, state_space_reference
from tests.lowering import lower_defaults_for_h100
from tests.pallas_kernels.comparison import assert_matches_oracle, gradient, normal, saved_shapes, segments
from tests.tolerances import assert_close

NAMES = ("out", "dx", "dstep", "drate", "db", "dc", "dskip")
# batch, seq, heads, p, groups, n: under a chunk, a chunk and a bit, several with grouped heads.
SHAPES = [(1, 5, 1, 4, 1, 6), (2, 70, 4, 5, 1, 8), (1, 200, 6, 16, 2, 12)]


def arguments(shape, dtype="float32"):
    """Steps and rates from hardly any decay to all but nothing left."""
    batch, seq, heads, p, groups, n = shape
    x = normal(0, (batch, seq, heads, p))
    b, c = normal(1, (batch, seq, groups, n)), normal(2, (batch, seq, groups, n))
    step = jax.nn.softplus(normal(3, (batch, seq, heads), scale=2.0) - 2.0)
    rate = -jnp.exp(normal(4, (heads,)))
    return x.astype(dtype), step, rate, b.astype(dtype), c.astype(dtype), normal(6, (heads,))


def assert_shape_matches(shape, dtype="float32", segment_ids=None):
    given = arguments(shape, dtype)
    op = functools.partial(state_space, segment_ids=segment_ids)
    oracle = functools.partial(state_space_reference, segment_ids=segment_ids)
    assert_matches_oracle(op, oracle, given, normal(5, given[0].shape, dtype), dtype, NAMES)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_match_the_recurrence(shape):
    assert_shape_matches(shape)


def test_chunks_match_the_recurrence_in_bf16():
    assert_shape_matches(SHAPES[1], "bfloat16")


def test_segments_that_start_inside_at_the_edge_of_and_across_chunks():
    assert_shape_matches(SHAPES[2], segment_ids=segments(1, 200, 30, 33, 64, 150))


def test_a_packed_document_is_the_document_alone():
    given = arguments((1, 150, 2, 8, 2, 8))
    packed = state_space(*given, segment_ids=segments(1, 150, 70))
    alone = state_space(*(x[:, 70:] if x.ndim > 1 else x for x in given))
    assert_close(packed[:, 70:], alone)


def test_the_same_id_again_is_another_segment():
    given, ids = arguments((1, 90, 1, 8, 1, 8)), jnp.asarray([[0] * 20 + [1] * 50 + [0] * 20])
    expected = state_space_reference(*given, segment_ids=segments(1, 90, 20, 70))
    assert_close(state_space(*given, segment_ids=ids), expected)


def test_a_state_carries_on_and_padding_leaves_it_alone():
    x, step, rate, b, c, skip = arguments((2, 90, 4, 5, 2, 8))
    expected = state_space_reference(x, step, rate, b, c, skip)
    state = jnp.zeros((2, 4, 8, 5))
    first = [
        jnp.pad(values[:, :75], ((0, 0), (0, 5), *((0, 0),) * (values.ndim - 2)))
        for values in (x, step, b, c)
    ]
    out, state = continue_state_space(*first[:2], rate, *first[2:], skip, state)
    assert_close(out[:, :75], expected[:, :75])
    second, _ = continue_state_space(x[:, 75:], step[:, 75:], rate, b[:, 75:], c[:, 75:], skip, state)
    assert_close(second, expected[:, 75:])


def test_saves_its_inputs_only():
    given = arguments(SHAPES[0])
    assert saved_shapes(state_space, *given) == sorted([*(x.shape for x in given), given[0].shape[:2]])


def test_lowers_for_an_h100_in_products_alone():
    x, b = (1, 4093, 48, 64), (1, 4093, 1, 128)
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (x, b, b)]
    numbers = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x[:3], x[2:3], x[2:3])]
    ordered = (given[0], numbers[0], numbers[1], given[1], given[2], numbers[2])
    text = lower_defaults_for_h100(gradient(state_space), *ordered)
    assert "dot_general" in text and "custom_call" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, s, r, b, c, d: (x, s, r, b, c[..., :2], d), "b and c alike"),
        (lambda x, s, r, b, c, d: (x[:, :, :3], s[:, :, :3], r[:3], b, c, d[:3]), "no multiple"),
        (lambda x, s, r, b, c, d: (x, s[..., 0], r, b, c, d), "step"),
        (lambda x, s, r, b, c, d: (x, s, r[:1], b, c, d), "rate"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        state_space(*change(*arguments((1, 5, 4, 4, 2, 6))))
