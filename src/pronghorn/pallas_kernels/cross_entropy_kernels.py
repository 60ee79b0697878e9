"""Rows of logits to loss and gradient: the kernels behind `cross_entropy` and `linear_cross_entropy`.

One program takes one row x [V] and walks the vocabulary in blocks. With z = softcap·tanh(logit_scale·x / softcap)
(or z = logit_scale·x), y the label and ε the label smoothing:

    other = log Σ_{j≠y} exp z_j                              online, each lane with a running maximum of its own
    nll   = softplus(other − z_y)        lse = max(other, z_y) + log1p(exp(−|other − z_y|))
    loss  = nll + ε (z_y − mean z)                           = (1−ε)(lse − z_y) + ε (lse − mean z)
    ∂loss/∂z_j = exp(z_j − lse) − ε/V      for j ≠ y
    ∂loss/∂z_y = expm1(−nll) + ε − ε/V     for the label
    ∂z/∂x      = logit_scale (1 − (z/softcap)²)

The label is left out of the sum because lse − z_y rounds to zero in fp32 once the label leads by about 16.6 nats;
softplus and expm1 keep the loss and the label's gradient to full relative precision there. Saved for backward: lse
and nll, two floats a row.

Everything is fp32 whatever the logits' dtype. Labels must lie in [0, V) here; the callers mask what does not.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch, tuned
from pronghorn.pallas_kernels.tile_operations import over_tiles

NUM_STAGES = 2

LOWEST = -1e30  # A finite start for a running maximum: −inf would give inf − inf.


class RowTile(NamedTuple):
    """How a row is walked; `tuned` may replace it.

    Attributes:
      columns: a step; the running maximum and sum of every lane stay in registers.
      warps: of a program. The more, the fewer rows are under way on the device, and the more of each one the L2 cache
        still holds when the gradient reads it a second time.
      ahead: 1 loads the next step's columns while one is worked on.
      kept: columns at the end of a row, where the second pass begins, that the cache is asked to keep for it.
    """

    columns: int
    warps: int
    ahead: int = 0
    kept: int = 0


ROW_TILE = RowTile(4096, 8)


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What turns a row of logits into a loss; see the formulas at the top of this file."""

    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise InputError(f"label_smoothing={self.label_smoothing} must lie in [0, 1).")
        if self.softcap is not None and not (self.softcap > 0.0 and math.isfinite(self.softcap)):
            raise InputError(f"softcap={self.softcap} must be positive; leave it None for no cap.")
        if not math.isfinite(self.logit_scale):
            raise InputError(f"logit_scale={self.logit_scale} must be finite.")


def transform(logits: jax.Array, options: LossOptions) -> jax.Array:
    """z(x) in fp32, any shape."""
    z = logits.astype(jnp.float32)
    if options.logit_scale != 1.0:
        z = z * options.logit_scale
    if options.softcap is not None:
        z = options.softcap * jnp.tanh(z / options.softcap)
    return z


def transform_slope(z: jax.Array, options: LossOptions) -> jax.Array | float:
    """dz/dx at the point whose transformed value is z."""
    if options.softcap is None:
        return options.logit_scale
    return options.logit_scale * (1.0 - jnp.square(z / options.softcap))


def label_status(
    labels: jax.Array, vocab_size: int, ignore_index: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(labels safe to index with, int32; ignored, bool; factor, fp32).

    The factor is 1, or 0 for an ignored row, or NaN for a label that is neither in [0, V) nor `ignore_index`: such a
    label is a fault in the data, and a NaN loss is seen where a clipped label would not be.
    """
    ignored = labels == ignore_index
    outside = (labels < 0) | (labels >= vocab_size)
    factor = jnp.where(ignored, 0.0, jnp.where(outside, jnp.nan, 1.0))
    return jnp.where(ignored | outside, 0, labels).astype(jnp.int32), ignored, factor


# ------------------------------------------------------------------------------------------------------- plain jnp


def row_statistics(
    z: jax.Array, labels: jax.Array, options: LossOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, lse, nll), each [N] fp32, of transformed logits z [N, V] and labels [N] in [0, V)."""
    label_z = jnp.take_along_axis(z, labels[:, None], axis=1)[:, 0]
    is_label = lax.broadcasted_iota(jnp.int32, z.shape, 1) == labels[:, None]
    other = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, z), axis=1)
    nll = jax.nn.softplus(other - label_z)
    loss = nll
    if options.label_smoothing:
        loss = nll + options.label_smoothing * (label_z - jnp.mean(z, axis=1))
    return loss, jnp.logaddexp(other, label_z), nll


def loss_and_gradient_xla(
    logits: jax.Array,
    labels: jax.Array,
    coefficient: jax.Array,
    options: LossOptions,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """`loss_and_gradient` in jnp, by the same formulas."""
    z = transform(logits, options)
    loss, lse, nll = row_statistics(z, labels, options)
    smooth = options.label_smoothing / z.shape[1]
    is_label = lax.broadcasted_iota(jnp.int32, z.shape, 1) == labels[:, None]
    label_gradient = jnp.expm1(-nll) + (options.label_smoothing - smooth)
    gradient = jnp.where(is_label, label_gradient[:, None], jnp.exp(z - lse[:, None]) - smooth)
    gradient = gradient * transform_slope(z, options) * coefficient[:, None]
    # An ignored row gets exact zeros even where its logits are not finite.
    return loss, jnp.where(coefficient[:, None] == 0.0, 0.0, gradient).astype(dtype)


# --------------------------------------------------------------------------------------------------------- kernels


def _columns(index, block: int) -> jax.Array:
    return index * block + lax.iota(jnp.int32, block)


def _mask(columns: jax.Array, vocab_size: int, block: int) -> jax.Array | None:
    """Which columns exist; None where all do. The mask is ours: a GPU does not mask the last block by itself."""
    return None if vocab_size % block == 0 else columns < vocab_size


def _over_blocks(logits_ref, indices: range, tile: RowTile, work, carry, policy: str | None = None):
    """work(index, logits of the block, carry) -> carry, over the blocks `indices` of the row in that order."""
    block = tile.columns

    def load(turn):
        columns = _columns(indices.start + indices.step * turn, block)
        mask = _mask(columns, logits_ref.shape[0], block)
        # Zero where nothing is, which the work leaves out.
        other: dict[str, Any] = {} if mask is None else {"mask": mask, "other": 0.0}
        return triton.load(logits_ref.at[columns], eviction_policy=policy, **other)

    def step(turn, logits, carry):
        return work(indices.start + indices.step * turn, logits, carry)

    return over_tiles(len(indices), load, step, carry, tile.ahead)


def _statistics(
    logits_ref, label, options: LossOptions, tile: RowTile
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, lse, nll) of the program's row: one pass, one exponential a column, reductions only at its end."""
    vocab_size, block = logits_ref.shape[0], tile.columns
    label_z = transform(logits_ref[label], options)

    def step(index, logits, carry):
        peak, total, linear = carry
        columns, z = _columns(index, block), transform(logits, options)
        mask = _mask(columns, vocab_size, block)
        if options.label_smoothing:
            linear = linear + (z if mask is None else jnp.where(mask, z, 0.0))
        skip = columns == label
        z = jnp.where(skip if mask is None else skip | ~mask, -jnp.inf, z)
        # exp(−|z − peak|) serves both cases: it rescales the sum below a new peak, or is the new term itself.
        shrink = jnp.exp(-jnp.abs(z - peak))
        total = jnp.where(z > peak, total * shrink + 1.0, total + shrink)
        return jnp.maximum(peak, z), total, linear

    zeros = jnp.zeros((block,), jnp.float32)
    carry = (
        jnp.full((block,), LOWEST, jnp.float32),
        zeros,
        zeros if options.label_smoothing else jnp.float32(0.0),
    )
    blocks = launch.cdiv(vocab_size, block)
    first_kept = blocks - min(blocks, tile.kept // block)
    carry = _over_blocks(
        logits_ref, range(first_kept), tile, step, carry, "evict_first" if tile.kept else None
    )
    peak, total, linear = _over_blocks(
        logits_ref, range(first_kept, blocks), tile, step, carry, "evict_last" if tile.kept else None
    )
    top = jnp.max(peak)
    other = top + jnp.log(jnp.sum(total * jnp.exp(peak - top)))
    difference = other - label_z
    tail = jnp.log1p(jnp.exp(-jnp.abs(difference)))
    nll = jnp.maximum(difference, 0.0) + tail
    lse = jnp.maximum(other, label_z) + tail
    loss = nll
    if options.label_smoothing:
        loss = nll + options.label_smoothing * (label_z - jnp.sum(linear) / vocab_size)
    return loss, lse, nll


def _write_gradient(
    logits_ref, gradient_ref, label, lse, nll, coefficient, options: LossOptions, tile: RowTile
) -> None:
    """gradient = coefficient · ∂loss/∂x, block by block; `gradient_ref` may be `logits_ref`'s own memory.

    In place is safe: every thread reads a block before it writes the same lanes of it, and all reads of the pass
    before end at that pass's reduction, a barrier for the whole program.
    """
    vocab_size, block = logits_ref.shape[0], tile.columns
    smooth = options.label_smoothing / vocab_size
    label_gradient = jnp.expm1(-nll) + (options.label_smoothing - smooth)
    # What is read or written here is not read again by this kernel: it must not push out what is.
    policy = "evict_first" if tile.kept else None

    def step(index, logits, carry):
        columns, z = _columns(index, block), transform(logits, options)
        gradient = jnp.where(columns == label, label_gradient, jnp.exp(z - lse) - smooth)
        gradient = gradient * transform_slope(z, options) * coefficient
        gradient = jnp.where(coefficient == 0.0, 0.0, gradient).astype(gradient_ref.dtype)
        mask = _mask(columns, vocab_size, block)
        triton.store(gradient_ref.at[columns], gradient, mask=mask, eviction_policy=policy)
        return carry

    # Backwards: the end of the row was read last and may still lie in the L2 cache.
    backwards = range(launch.cdiv(vocab_size, block) - 1, -1, -1)
    _over_blocks(logits_ref, backwards, tile, step, 0, policy)


def _forward_kernel(logits_ref, label_ref, loss_ref, lse_ref, nll_ref, *, options, tile):
    loss, lse, nll = _statistics(logits_ref, label_ref[0], options, tile)
    loss_ref[0] = loss
    lse_ref[0] = lse
    nll_ref[0] = nll


def _backward_kernel(
    logits_ref, label_ref, lse_ref, nll_ref, coefficient_ref, gradient_ref, *, options, tile
):
    _write_gradient(
        logits_ref, gradient_ref, label_ref[0], lse_ref[0], nll_ref[0], coefficient_ref[0], options, tile
    )


def _loss_and_gradient_kernel(
    logits_ref, label_ref, coefficient_ref, loss_ref, gradient_ref, *, options, tile
):
    label = label_ref[0]
    loss, lse, nll = _statistics(logits_ref, label, options, tile)
    loss_ref[0] = loss
    _write_gradient(logits_ref, gradient_ref, label, lse, nll, coefficient_ref[0], options, tile)


def _launch(kernel, inputs, out_shape, out_specs, name, options, aliases=None):
    """One program a row; the first input is the logits [N, V], the others are [N]."""
    rows, vocab_size = inputs[0].shape
    tile = RowTile(*(tuned.choice(name, inputs[0].dtype, vocab_size) or ROW_TILE))
    tile = tile._replace(columns=min(tile.columns, max(128, launch.next_power_of_2(vocab_size))))
    return launch.pallas_call(
        functools.partial(kernel, options=options, tile=tile),
        name=name,
        grid=(rows,),
        in_specs=[_row_block(vocab_size)] + [_one_number()] * (len(inputs) - 1),
        out_specs=out_specs,
        out_shape=out_shape,
        num_warps=min(tile.warps, max(1, tile.columns // 128)),
        num_stages=NUM_STAGES,
        input_output_aliases=aliases,
    )(*inputs)


def _row_block(vocab_size: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, vocab_size), lambda row: (row, 0))


def _one_number() -> pl.BlockSpec:
    return pl.BlockSpec((1,), lambda row: (row,))


def forward(
    logits: jax.Array, labels: jax.Array, options: LossOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, lse, nll), each [N] fp32, of logits [N, V] and labels [N] in [0, V)."""
    number = jax.ShapeDtypeStruct(labels.shape, jnp.float32)
    return _launch(
        _forward_kernel,
        (logits, labels),
        (number,) * 3,
        (_one_number(),) * 3,
        "cross_entropy_forward",
        options,
    )


def backward(
    logits: jax.Array,
    labels: jax.Array,
    lse: jax.Array,
    nll: jax.Array,
    coefficient: jax.Array,
    options: LossOptions,
) -> jax.Array:
    """coefficient · ∂loss/∂logits [N, V] in the logits' dtype, written over the logits where XLA may reuse them."""
    return _launch(
        _backward_kernel,
        (logits, labels, lse, nll, coefficient),
        jax.ShapeDtypeStruct(logits.shape, logits.dtype),
        _row_block(logits.shape[1]),
        "cross_entropy_backward",
        options,
        {0: 0},
    )


def loss_and_gradient(
    logits: jax.Array,
    labels: jax.Array,
    coefficient: jax.Array,
    options: LossOptions,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """(loss [N] fp32, coefficient · ∂loss/∂logits [N, V] in `dtype`) in one kernel.

    The gradient takes the logits' own memory when `dtype` is theirs. A 16-bit gradient of fp32 logits is written
    beside them: in place it would need one more pass, to convert it for the product that follows.
    """
    vocab_size = logits.shape[1]
    return _launch(
        _loss_and_gradient_kernel,
        (logits, labels, coefficient),
        (jax.ShapeDtypeStruct(labels.shape, jnp.float32), jax.ShapeDtypeStruct(logits.shape, dtype)),
        (_one_number(), _row_block(vocab_size)),
        "cross_entropy_loss_and_gradient",
        options,
        {0: 1} if logits.dtype == jnp.dtype(dtype) else None,
    )
