"""convolved_heads: the kernels of a delta net's convolution against its taps."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pronghorn.pallas_kernels.convolved_heads import convolved_heads, convolved_heads_reference, fits
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import (
    DTYPES,
    assert_matches_oracle,
    gradient,
    normal,
    saved_shapes,
    segments,
)

EPS = 1e-6
NAMES = ("q", "k", "v", "dx", "dweight")
# batch, seq, key heads, value heads, dim, width: fewer tokens than the width, a block and a bit, several.
SHAPES = [(2, 3, 1, 1, 4, 4), (1, 70, 1, 2, 8, 4), (2, 150, 2, 4, 16, 3)]


def given(shape, dtype="float32") -> tuple[tuple, tuple, dict]:
    batch, seq, key_heads, value_heads, dim, width = shape
    features = (2 * key_heads + value_heads) * dim
    x, weight = normal(0, (batch, seq, features), dtype), normal(1, (features, width), dtype, scale=0.5)
    heads = (key_heads, key_heads, value_heads)
    cotangents = tuple(normal(2 + i, (batch, seq, count, dim), dtype) for i, count in enumerate(heads))
    return (x, weight), cotangents, {"key_heads": key_heads, "dim": dim, "eps": EPS}


def assert_shape_matches(shape, dtype="float32", segment_ids=None):
    arguments, cotangents, options = given(shape, dtype)
    options["segment_ids"] = segment_ids
    op = functools.partial(convolved_heads, **options, implementation="pallas")
    oracle = functools.partial(convolved_heads_reference, **options)
    assert_matches_oracle(op, oracle, arguments, cotangents, dtype, NAMES)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_the_taps(shape):
    assert_shape_matches(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_cut_the_convolution(dtype):
    assert_shape_matches(SHAPES[2], dtype, segments(2, 150, 1, 30, 63, 64, 130))


def test_the_same_id_again_is_seen_as_taps_see_it():
    ids = jnp.asarray([[0] * 20 + [1] * 2 + [0] * 48])
    assert_shape_matches(SHAPES[1], segment_ids=ids)


def test_saves_its_inputs_only():
    arguments, _, options = given(SHAPES[1])
    x, weight = arguments
    shapes = [x.shape, weight.T.shape, x.shape[:2]]
    assert saved_shapes(
        functools.partial(convolved_heads, **options, implementation="pallas"), *arguments
    ) == sorted(shapes)


def test_only_heads_of_one_size_fit():
    assert fits(128, 128) and not fits(128, 64) and not fits(96, 96)


@pytest.mark.parametrize("segmented", [False, True])
def test_lowers_for_an_h100(segmented):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 4093, 8192), (8192, 4))]
    ids = jax.ShapeDtypeStruct((1, 4093), jnp.int32)

    def run(x, weight, ids):
        op = functools.partial(convolved_heads, key_heads=16, dim=128, eps=EPS, implementation="pallas")
        return op(x, weight, segment_ids=ids if segmented else None)

    text = lower_for_h100(lambda x, w, i: gradient(lambda x, w: run(x, w, i))(x, w), *arguments, ids)
    assert "convolved_heads_backward" in text and "convolution_backward" in text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1000, 4, 8, 128, 4)], ids=str)
def test_kernels_match_the_taps_on_a_gpu(shape, dtype):
    assert_shape_matches(shape, dtype, segments(*shape[:2], 1, 30, 63, 64, 130))
