"""What the tuner measures: each kernel at the sizes of `shapes.TUNED_*`, with few and well-chosen candidates.

Attention's candidates were read off compiled kernels for an H100 first: none of them spills much, and each keeps a
multiprocessor busy in its own way (two programs of four warps, or one of eight with deeper prefetching).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import cross_entropy_kernels, flash_attention_kernels, launch, shapes, tuned
from pronghorn.pallas_kernels.attention_blocks import (
    TUNED,
    KernelBlocks,
    attention_blocks,
    over_shared_memory,
    shared_memory_bytes,
)
from pronghorn.pallas_kernels.attention_tiles import AttentionSpec
from pronghorn.pallas_kernels.autotune import Job
from pronghorn.pallas_kernels.autotune_grouped import grouped_linear_jobs
from pronghorn.pallas_kernels.autotune_lowrank import lowrank_gated_jobs
from pronghorn.pallas_kernels.flash_attention import flash_attention_reference
from pronghorn.pallas_kernels.gated_activation import gated_activation_backward, gated_activation_forward
from pronghorn.pallas_kernels.launch import next_power_of_2
from pronghorn.pallas_kernels.nf4_dequantize import NestedScales, nf4_dequantize
from pronghorn.pallas_kernels.nf4_product import nf4_product
from pronghorn.pallas_kernels.rms_norm import rms_norm_backward, rms_norm_forward
from pronghorn.pallas_kernels.rope import apply_rope

# [block_q, block_k, num_warps, num_stages], by kernel and head dim.
ATTENTION = {
    ("forward", 64): (
        (128, 64, 4, 3), (128, 128, 4, 2), (128, 64, 4, 2), (128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 4, 3),
        (64, 64, 4, 3), (256, 64, 8, 3), (256, 128, 8, 2),
    ),
    ("forward", 128): (
        (128, 64, 4, 2), (128, 128, 8, 2), (128, 128, 8, 3), (256, 64, 8, 3), (256, 64, 8, 2), (256, 64, 8, 4),
        (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 4, 3), (64, 128, 4, 2),
    ),
    ("forward", 256): (
        (128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4), (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2),
        (64, 32, 4, 3), (128, 64, 8, 1),
    ),
    ("dkdv", 64): (
        (64, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 4, 2), (128, 128, 8, 2), (128, 64, 8, 3),
        (32, 128, 4, 3), (64, 128, 8, 4), (32, 64, 4, 4),
    ),
    ("dkdv", 128): (
        (64, 64, 4, 2), (64, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 4), (32, 64, 4, 3), (32, 64, 4, 4),
        (32, 128, 8, 4), (64, 64, 4, 3), (128, 128, 8, 2), (64, 64, 8, 3),
    ),
    ("dkdv", 256): (
        (32, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 3), (64, 64, 8, 1), (32, 32, 4, 2), (32, 64, 8, 4), (16, 64, 8, 4),
    ),
    ("dq", 64): (
        (128, 64, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2),
        (128, 128, 8, 3), (256, 64, 8, 2), (64, 64, 4, 4),
    ),
    ("dq", 128): (
        (128, 64, 8, 3), (64, 64, 4, 2), (128, 128, 8, 2), (128, 64, 8, 4), (64, 64, 4, 3), (64, 128, 4, 2),
        (128, 32, 8, 4), (64, 32, 4, 3), (128, 64, 8, 2), (128, 32, 4, 3),
    ),
    ("dq", 256): (
        (64, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 3), (64, 32, 4, 2), (64, 64, 4, 2),
        (128, 64, 8, 1),
    ),
}  # fmt: skip
# Elements a program and a thread: enough bytes in flight against enough programs on a multiprocessor.
RMS_NORM_FORWARD = ((16384, 64), (8192, 32), (8192, 64), (4096, 16), (4096, 32), (16384, 32), (32768, 64))
RMS_NORM_BACKWARD = ((8192, 32), (4096, 16), (4096, 32), (8192, 64), (16384, 64), (16384, 32))
GATED_ACTIVATION = (
    (4096, 2048, 16), (2048, 2048, 8), (2048, 2048, 16), (4096, 2048, 8), (1024, 1024, 8), (8192, 2048, 16),
)  # fmt: skip
ROPE = ((4096, 32), (2048, 16), (2048, 32), (2048, 8), (4096, 16), (8192, 32))
# Columns, warps, whether the next step is loaded ahead, and the columns that the L2 cache is asked to keep.
CROSS_ENTROPY = (
    (4096, 8), (4096, 16), (8192, 16), (4096, 16, 1, 0), (4096, 16, 0, 49152), (4096, 16, 1, 49152),
    (8192, 16, 0, 49152), (8192, 16, 1, 49152), (8192, 32, 0, 49152), (8192, 32, 1, 49152), (4096, 32, 1, 49152),
    (8192, 16, 1, 65536),
)  # fmt: skip
NF4_PRODUCT = {
    ("nf4_product", 1): (
        (8, 1024, 4), (4, 2048, 4), (4, 1024, 2), (8, 2048, 8), (16, 1024, 4), (16, 512, 4), (8, 512, 2), (2, 4096, 4),
    ),
    ("nf4_product_together", 16): (
        (16, 256, 4), (16, 512, 4), (32, 256, 4), (16, 128, 2), (32, 128, 4), (64, 128, 4), (64, 256, 4),
    ),
}  # fmt: skip
NF4 = ((2048, 8), (1024, 8), (4096, 8), (512, 8), (4096, 16), (4096, 32))

EPS = 1e-6


def jobs(
    names: Sequence[str] = (),
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    head_dims: Sequence[int] = (),
    largest: Callable[[Any], Any] = lambda shape: shape,
) -> list[Job]:
    """The jobs of the named groups, by default all.

    Args:
      names: of `GROUPS`.
      dtype: bf16 or fp16.
      head_dims: attention's; by default all of `shapes.TUNED_FLASH_ATTENTION`.
      largest: maps each shape to the one to measure, for a test.

    Raises:
      InputError: for a name or a head dim that is not there.
    """
    for name in names:
        if name not in GROUPS:
            raise InputError(f"tune: {name!r} is no kernel; use some of {', '.join(GROUPS)}.")
    known = [shape.head_dim for shape in shapes.TUNED_FLASH_ATTENTION]
    for head_dim in head_dims:
        if head_dim not in known:
            raise InputError(f"tune: head dim {head_dim} has no candidates; use some of {known}.")
    found: list[Job] = []
    for name in names or GROUPS:
        group, group_shapes = GROUPS[name]
        for shape in group_shapes:
            if name != "attention" or not head_dims or shape.head_dim in head_dims:
                found += group(largest(shape), dtype)
    return found


def attention_jobs(shape: shapes.AttentionShape, dtype) -> list[Job]:
    """Forward, dk with dv, and dq of causal attention. The oracle takes the last group of the last row."""
    group = shape.num_heads // shape.num_kv_heads
    query = (shape.batch, shape.seq, shape.num_heads, shape.head_dim)
    key = (shape.batch, shape.seq, shape.num_kv_heads, shape.head_dim)

    def spec() -> AttentionSpec:
        blocks = attention_blocks(shape.head_dim, dtype, shape.seq)
        return AttentionSpec(shape.head_dim**-0.5, None, None, blocks, native=not launch.interpreting())

    def inputs():
        return (*(_normal(i, s, dtype) for i, s in enumerate((query, key, key))), _normal(3, query, dtype))

    def backward_inputs():
        q, k, v, do = inputs()
        out, logsumexp = flash_attention_kernels.forward(q, k, v, None, None, spec())
        delta = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
        return q, k, v, out, do, logsumexp, delta

    def last_group(kernel, x):
        return x[-1:, :, -group if kernel in ("forward", "dq") else -1 :]

    def oracle():
        q, k, v, do = inputs()
        q, k, v, do = (
            last_group(side, x).astype(jnp.float32)
            for side, x in (("dq", q), ("dkdv", k), ("dkdv", v), ("dq", do))
        )
        out, pull = jax.vjp(flash_attention_reference, q, k, v)
        return out, *pull(do)

    expected = {
        "forward": lambda: oracle()[:1],
        "dq": lambda: oracle()[1:2],
        "dkdv": lambda: oracle()[2:],
    }
    outputs = {
        "forward": lambda found: (last_group("forward", found[0]),),
        "dq": lambda found: (last_group("dq", found),),
        "dkdv": lambda found: tuple(last_group("dkdv", x) for x in found),
    }
    runs = {
        "forward": lambda q, k, v, _: flash_attention_kernels.forward(q, k, v, None, None, spec()),
        "dkdv": lambda q, k, v, _, *a: flash_attention_kernels.backward_dkdv(q, k, v, *a, None, spec()),
        "dq": lambda *a: flash_attention_kernels.backward_dq(*a[:-1], None, spec())[0],
    }
    # Products a kernel computes, in units of 2 · (visible pairs) · head_dim.
    products = {"forward": 2, "dkdv": 4, "dq": 3}
    pairs = shape.batch * shape.num_heads * shape.seq * (shape.seq + 1) / 2
    return [
        Job(
            op=TUNED[kernel],
            key=tuned.key(dtype, shape.head_dim),
            label=f"{shape.name}, batch {shape.batch}, seq {shape.seq}, heads {shape.num_heads}/{shape.num_kv_heads}",
            arguments=inputs if kernel == "forward" else backward_inputs,
            run=runs[kernel],
            expected=expected[kernel],
            part=outputs[kernel],
            candidates=ATTENTION[kernel, shape.head_dim],
            work=(products[kernel] * 2 * pairs * shape.head_dim / 1e12, "FLOP"),
            too_large=functools.partial(_too_large, kernel, shape.head_dim, dtype),
        )
        for kernel in TUNED
    ]


def _too_large(kernel: str, head_dim: int, dtype, choice: tuned.Choice) -> str | None:
    return over_shared_memory(shared_memory_bytes(kernel, KernelBlocks(*choice), head_dim, dtype))


def rms_norm_jobs(shape: shapes.RowShape, dtype) -> list[Job]:
    def inputs():
        x, weight, dy = (
            _normal(0, shape[1:], dtype),
            _normal(1, shape[2:], dtype),
            _normal(2, shape[1:], dtype),
        )
        return x, weight, dy, jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1) + EPS)

    def forward(with_kernel, x, weight, dy, inverse_rms):
        return rms_norm_forward(x, weight, eps=EPS, weight_offset=0.0, with_kernel=with_kernel)

    def backward(with_kernel, x, weight, dy, inverse_rms):
        return rms_norm_backward(
            dy, x, inverse_rms, weight, wanted=("x",), weight_offset=0.0, with_kernel=with_kernel
        )

    size = shape.rows * shape.width * jnp.dtype(dtype).itemsize
    return [
        _plain_job(
            "rms_norm_forward",
            tuned.key(dtype, shape.width),
            shape,
            inputs,
            forward,
            RMS_NORM_FORWARD,
            2 * size,
        ),
        _plain_job(
            "rms_norm_backward",
            tuned.key(dtype, shape.width),
            shape,
            inputs,
            backward,
            RMS_NORM_BACKWARD,
            3 * size,
        ),
    ]


def gated_activation_jobs(shape: shapes.RowShape, dtype) -> list[Job]:
    def inputs():
        return tuple(_normal(i, shape[1:], dtype) for i in range(3))

    def forward(with_kernel, dh, gate, up):
        return gated_activation_forward(gate, up, activation="silu", with_kernel=with_kernel)

    def backward(with_kernel, dh, gate, up):
        # In place, an undonated argument would be copied first, and the copy be timed.
        return gated_activation_backward(
            dh, gate, up, activation="silu", with_h=False, with_kernel=with_kernel, in_place=False
        )[:2]

    size, key = shape.rows * shape.width * jnp.dtype(dtype).itemsize, tuned.key(dtype, shape.width)
    return [
        _plain_job("gated_activation_forward", key, shape, inputs, forward, GATED_ACTIVATION, 3 * size),
        _plain_job("gated_activation_backward", key, shape, inputs, backward, GATED_ACTIVATION, 5 * size),
    ]


def rope_jobs(shape: shapes.RopeShape, dtype) -> list[Job]:
    half = shape.rotated // 2

    def inputs():
        angle = jnp.arange(shape.seq)[None, :, None] * 10000.0 ** (-jnp.arange(half) / half)
        q = _normal(0, (shape.batch, shape.seq, shape.num_heads, shape.head_dim), dtype)
        k = _normal(1, (shape.batch, shape.seq, shape.num_kv_heads, shape.head_dim), dtype)
        return q, k, jnp.cos(angle).astype(jnp.float32), jnp.sin(angle).astype(jnp.float32)

    def run(with_kernel, q, k, cos, sin):
        return apply_rope(q, k, cos, sin, implementation="pallas" if with_kernel else "xla")

    pairs = next_power_of_2(max(shape.num_heads, shape.num_kv_heads)) * next_power_of_2(half)
    tokens = shape.batch * shape.seq
    size = tokens * 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim * jnp.dtype(dtype).itemsize
    size += tokens * half * 2 * 4
    return [_plain_job("rope", tuned.key(dtype, pairs), shape, inputs, run, ROPE, size)]


def cross_entropy_jobs(shape: shapes.HeadShape, dtype) -> list[Job]:
    options = cross_entropy_kernels.LossOptions()

    def inputs():
        logits = 3.0 * _normal(0, (shape.rows, shape.vocab), jnp.float32)
        return logits, jnp.arange(shape.rows) % shape.vocab, jnp.ones((shape.rows,), jnp.float32)

    def forward(with_kernel, logits, labels, coefficient):
        if with_kernel:
            return cross_entropy_kernels.forward(logits, labels, options)
        return cross_entropy_kernels.row_statistics(logits, labels, options)

    def gradient(with_kernel, logits, labels, coefficient):
        function = (
            cross_entropy_kernels.loss_and_gradient
            if with_kernel
            else cross_entropy_kernels.loss_and_gradient_xla
        )
        return function(logits, labels, coefficient, options, dtype)

    size, key = shape.rows * shape.vocab * 4, tuned.key(jnp.float32, shape.vocab)
    return [
        _plain_job("cross_entropy_forward", key, shape, inputs, forward, CROSS_ENTROPY, size),
        _plain_job(
            "cross_entropy_loss_and_gradient", key, shape, inputs, gradient, CROSS_ENTROPY,
            2 * size + shape.rows * shape.vocab * jnp.dtype(dtype).itemsize,
        ),
    ]  # fmt: skip


def nf4_jobs(shape: shapes.WeightShape, dtype) -> list[Job]:
    """Dequantising a weight, and its product with one row and with sixteen."""
    count, block = shape.outputs * shape.inputs, 64
    blocks = count // block

    def inputs(*first):
        codes = jax.random.bits(jax.random.key(0), (count // 2,), jnp.uint8)
        absmax = jax.random.bits(jax.random.key(1), (blocks,), jnp.uint8)
        scales = NestedScales(
            jnp.ones((-(-blocks // 256),), jnp.float32), jnp.linspace(0, 1, 256), jnp.float32(0.1)
        )
        return (*first, codes, absmax, jnp.linspace(-1, 1, 16), scales)

    def run(with_kernel, *arguments):
        implementation: launch.Implementation = "pallas" if with_kernel else "xla"
        return nf4_dequantize(
            *arguments, shape=shape[1:], dtype=dtype, block_size=block, implementation=implementation
        )

    def multiply(with_kernel, *arguments):
        implementation: launch.Implementation = "pallas" if with_kernel else "xla"
        return nf4_product(*arguments, shape=shape[1:], block_size=block, implementation=implementation)

    read = count // 2 + blocks
    size = count * jnp.dtype(dtype).itemsize + read
    found = [_plain_job("nf4_dequantize", tuned.key(dtype, block), shape, inputs, run, NF4, size)]
    for (op, rows), candidates in NF4_PRODUCT.items():

        def with_rows(rows=rows):
            return inputs(_normal(2, (rows, shape.inputs), dtype))

        key = tuned.key(dtype, rows)
        found.append(_plain_job(op, key, shape, with_rows, multiply, candidates, read))
    return found


GROUPS: dict[str, tuple[Callable[..., list[Job]], tuple[Any, ...]]] = {
    "attention": (attention_jobs, shapes.TUNED_FLASH_ATTENTION),
    "rms_norm": (rms_norm_jobs, shapes.TUNED_RMS_NORM),
    "gated_activation": (gated_activation_jobs, shapes.TUNED_GATED_ACTIVATION),
    "lowrank_gated": (lowrank_gated_jobs, shapes.TUNED_LOWRANK),
    "rope": (rope_jobs, shapes.TUNED_ROPE),
    "cross_entropy": (cross_entropy_jobs, shapes.TUNED_CROSS_ENTROPY),
    "nf4": (nf4_jobs, shapes.TUNED_NF4),
    "grouped_linear": (grouped_linear_jobs, shapes.TUNED_GROUPED),
}


def _plain_job(op, key, shape, inputs, run, candidates, size) -> Job:
    """A job limited by memory, whose oracle is `run(False, ...)` on everything."""
    sizes = ", ".join(f"{name} {value}" for name, value in shape._asdict().items() if name != "name")
    return Job(
        op, key, f"{shape.name}, {sizes}", inputs, functools.partial(run, True), lambda: run(False, *inputs()),
        lambda found: found, candidates, (size / 1e12, "B"),
    )  # fmt: skip


def _normal(seed: int, shape, dtype) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)
