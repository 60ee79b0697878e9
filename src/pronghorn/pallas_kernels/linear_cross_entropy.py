"""The language-model head and its cross entropy together, holding one tile of logits at a time.

    x = h Wᵀ + s (h Aᵀ) Bᵀ + b          [tile, V], fp32
    loss_sum = Σ_i c_i loss(x_i, y_i)   loss as in `cross_entropy`, c the token weights

The rows whose label is not ignored are taken in tiles, gathered from h; ignored rows are never multiplied, and the
number of tiles follows from how many rows count. cuBLAS multiplies; one kernel turns a
tile of logits into its gradient G = c ∂loss/∂x, in place, together with the loss. Since the loss is a scalar, the
gradient can be finished in the forward rule, up to the factor that arrives in backward:

    dh = G W + s (G B) A     dW = Gᵀ h     db = Σ_i G_i     dA = s (G B)ᵀ h     dB = s Gᵀ (h Aᵀ)

Only what is differentiated is computed: a frozen W costs neither product nor memory. Saved for backward: these
gradients, dh in h's dtype and the others in fp32 (summed over tiles in fp32), nothing else; ΔW = B A is never formed.

Precision: products take h's dtype and accumulate in fp32. Logits, loss and softmax are fp32. G is rounded once, to h's
dtype, for the products that follow: 2⁻⁹ of each element in bf16, independent between elements, hence an error of dh of
about 2⁻⁹ √Σ_j (G_j W_j)², no more than rounding dh itself where a few columns dominate. fp16 reaches no further down
than 6e-8, so there G is held in units of max|c| / 4096.

Keep it outside `jax.checkpoint`: it saves no logits to begin with, and there all of the above runs twice.

Source: the gradient in forward as in Hsu et al., "Liger Kernel" (2024); the rest follows from the formulas above.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import cross_entropy_kernels as kernels
from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.cross_entropy import check_labels, cross_entropy_reference
from pronghorn.pallas_kernels.cross_entropy_kernels import LossOptions

# The fp32 tile of logits: 1,024 rows of up to 163,840 columns on a GPU. A product of 1,024 rows already fills an H100.
# Where W learns, each tile also reads and writes the fp32 sum of dW, [V, d]: there a tile has about d rows, and is as
# large as that sum.
TILE_BYTES_GPU = 640 * 2**20
TILE_BYTES_CPU = 32 * 2**20
FP16_GRADIENT_SCALE = 4096.0


class Head(NamedTuple):
    """What the loss is differentiated with respect to, and in a gradient its cotangents; None where absent."""

    hidden: Any  # [N, d]
    weight: Any  # [V, d]
    bias: Any  # [V]
    lora_a: Any  # [r, d]
    lora_b: Any  # [V, r]
    token_weights: Any  # [N]


_NOTHING = Head(*(False,) * 6)


class _Static(NamedTuple):
    """Everything that is no array."""

    options: LossOptions
    lora_scale: float
    ignore_index: int
    tile_rows: int | None
    implementation: str


def linear_cross_entropy(
    hidden: jax.Array,
    weight: Any,
    labels: jax.Array,
    *,
    token_weights: jax.Array | None = None,
    bias: jax.Array | None = None,
    lora_a: jax.Array | None = None,
    lora_b: jax.Array | None = None,
    lora_scale: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    tile_rows: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The weighted sum of the token losses in nats, fp32, a scalar.

    Args:
      hidden: [N, d], bf16, fp16 or fp32; the products run in this dtype.
      weight: [V, d] of any float dtype, or an object with `.shape` and `.dequantize()`, which is then frozen.
      labels: [N], integers in [0, V), or `ignore_index`; any other label gives NaN (see `cross_entropy`).
      token_weights: [N], a factor on each row's loss; differentiable (its gradient is the row's loss).
      bias: [V].
      lora_a, lora_b: [r, d] and [V, r], both or neither; usually fp32, and then their gradients are fp32.
      lora_scale: s of the formula.
      label_smoothing, softcap, logit_scale: as in `cross_entropy`; the bias is inside the scale and the cap.
      tile_rows: rows of logits held at a time; by default about as many as keep the fp32 tile below 640 MiB on a GPU
        and 32 MiB on a CPU, and on a GPU about d where the weight gets a gradient. It changes the memory, not the loss.
      implementation: "pallas", or "xla" for the same tiles in jnp.

    Returns:
      Σ_i token_weights_i · loss_i over the rows that are not ignored; 0 with zero gradients where all are.

    Raises:
      InputError: shapes that do not match, labels that are no integers, an option out of range.
    """
    head = _head(hidden, weight, bias, lora_a, lora_b, token_weights)
    options = LossOptions(label_smoothing, softcap, logit_scale)
    static = _prepare(head, labels, options, lora_scale, ignore_index, tile_rows, implementation)
    return _loss_sum(static, head, labels)


def linear_token_losses(
    hidden: jax.Array,
    weight: Any,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    lora_a: jax.Array | None = None,
    lora_b: jax.Array | None = None,
    lora_scale: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    tile_rows: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The loss of each row, [N] fp32, 0 where ignored: `linear_cross_entropy` before its sum, for evaluation.

    Arguments and errors are those of `linear_cross_entropy`. It has no gradient: asking for one is an error of JAX's.
    """
    head = _head(hidden, weight, bias, lora_a, lora_b)
    options = LossOptions(label_smoothing, softcap, logit_scale)
    static = _prepare(head, labels, options, lora_scale, ignore_index, tile_rows, implementation)
    return _tiles(static, head, labels, _NOTHING)[0]


def default_tile_rows(rows: int, vocab_size: int, about: int = 1) -> int:
    """Rows a tile: the byte budget of the platform, in multiples of 128 (a GPU) or 8, and no more than there are.

    What the last tile lacks is multiplied all the same: this is the largest size whose tiles together hold at most 2 %
    more rows than those of any size past half of the budget.

    about: rows that a GPU's tile has even beyond the budget, down to the next power of two.
    """
    budget, multiple = (TILE_BYTES_GPU, 128) if launch.on_gpu() else (TILE_BYTES_CPU, 8)
    most = max(multiple, budget // (4 * vocab_size) // multiple * multiple)
    if launch.on_gpu():
        most = max(most, 1 << (about.bit_length() - 1))
    most = min(most, multiple * launch.cdiv(max(rows, 1), multiple))
    held = {tile: launch.cdiv(rows, tile) * tile for tile in range(most, most // 2, -multiple)}
    return next(tile for tile, count in held.items() if count <= 1.02 * min(held.values()))


def linear_cross_entropy_reference(
    hidden: jax.Array,
    weight: Any,
    labels: jax.Array,
    *,
    token_weights: jax.Array | None = None,
    bias: jax.Array | None = None,
    lora_a: jax.Array | None = None,
    lora_b: jax.Array | None = None,
    lora_scale: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> jax.Array:
    """The oracle: all logits at once, differentiated by JAX."""
    head = _head(hidden, weight, bias, lora_a, lora_b)
    logits = _logits(head, head.hidden, lora_scale)
    options = LossOptions(label_smoothing, softcap, logit_scale)
    losses = cross_entropy_reference(logits, labels, ignore_index=ignore_index, options=options)
    return jnp.sum(
        losses if token_weights is None else jnp.where(labels == ignore_index, 0.0, losses * token_weights)
    )


def _head(hidden, weight, bias, lora_a, lora_b, token_weights=None) -> Head:
    """The arguments as arrays; a quantised weight dequantised, without a gradient."""
    if hasattr(weight, "dequantize"):
        weight = lax.stop_gradient(weight.dequantize())
    leaves = (hidden, weight, bias, lora_a, lora_b, token_weights)
    return Head(*(None if leaf is None else jnp.asarray(leaf) for leaf in leaves))


def _prepare(
    head: Head,
    labels: jax.Array,
    options: LossOptions,
    lora_scale: float,
    ignore_index: int,
    tile_rows: int | None,
    implementation: str | None,
) -> _Static:
    """The static part of a call, once its arguments are checked."""
    check_labels(labels)
    rows, vocab_size = head.hidden.shape[0], head.weight.shape[0]
    rank = None if head.lora_a is None else head.lora_a.shape[0]
    expected = {
        "hidden": (rows, head.weight.shape[-1]),
        "weight": (vocab_size, head.hidden.shape[-1]),
        "bias": (vocab_size,),
        "lora_a": (rank, head.hidden.shape[-1]),
        "lora_b": (vocab_size, rank),
        "token_weights": (rows,),
    }
    for name, value in [*head._asdict().items(), ("labels", labels)]:
        shape = (rows,) if name == "labels" else expected[name]
        if value is not None and value.shape != shape:
            raise InputError(f"linear_cross_entropy: {name} has shape {value.shape}; it must be {shape}.")
    if (head.lora_a is None) != (head.lora_b is None):
        raise InputError("linear_cross_entropy: give both lora_a and lora_b, or neither.")
    if tile_rows is not None and tile_rows < 1:
        raise InputError(f"linear_cross_entropy: tile_rows={tile_rows} must be at least 1.")
    return _Static(options, lora_scale, ignore_index, tile_rows, launch.resolve(implementation))


# ------------------------------------------------------------------------------------------------------- the tiles


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contract one dimension of each, accumulating in fp32."""
    return lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def _low_rank(head: Head, hidden: jax.Array) -> jax.Array:
    """h Aᵀ [rows, r] in h's dtype."""
    return _product(hidden, head.lora_a.astype(hidden.dtype), (1, 1)).astype(hidden.dtype)


def _logits(head: Head, hidden: jax.Array, lora_scale: float) -> jax.Array:
    """[rows, V] fp32 of some rows of h."""
    logits = _product(hidden, head.weight.astype(hidden.dtype), (1, 1))
    if head.lora_a is not None:
        logits = logits + lora_scale * _product(
            _low_rank(head, hidden), head.lora_b.astype(hidden.dtype), (1, 1)
        )
    if head.bias is not None:
        logits = logits + head.bias.astype(jnp.float32)
    return logits


def _tile_losses(static: _Static, logits: jax.Array, labels: jax.Array) -> jax.Array:
    if static.implementation == "pallas":
        return kernels.forward(logits, labels, static.options)[0]
    return kernels.row_statistics(kernels.transform(logits, static.options), labels, static.options)[0]


def _tiles(static: _Static, head: Head, labels: jax.Array, wanted: Head) -> tuple[jax.Array, Head, jax.Array]:
    """(losses [N] without token weights, the gradients wanted in units of `unit`, unit).

    hidden's gradient is in hidden's dtype, the others in fp32; None where not wanted.
    """
    (rows, width), dtype = head.hidden.shape, head.hidden.dtype

    def nothing() -> tuple[jax.Array, Head]:
        """Losses and gradients before the first tile."""
        shapes = Head((rows, width), *(None if leaf is None else leaf.shape for leaf in head[1:]))
        sums = [
            jnp.zeros(shape, jnp.float32) if want else None
            for shape, want in zip(shapes, wanted, strict=True)
        ]
        sums[0] = jnp.zeros((rows, width), dtype) if wanted.hidden else None
        sums[5] = None
        return jnp.zeros((rows,), jnp.float32), Head(*sums)

    if rows == 0:
        return *nothing(), jnp.float32(1.0)
    # A product wants its operands in one dtype: cast once, not in every tile.
    lora_a, lora_b = (None if leaf is None else leaf.astype(dtype) for leaf in (head.lora_a, head.lora_b))
    head = head._replace(weight=head.weight.astype(dtype), lora_a=lora_a, lora_b=lora_b)
    safe, ignored, factor = kernels.label_status(labels, head.weight.shape[0], static.ignore_index)
    coefficient, unit = _coefficients(head.token_weights, ignored, factor)
    scale = FP16_GRADIENT_SCALE if dtype == jnp.float16 else 1.0

    # Rows that count, in their own order; beyond them indices past the end, distinct and rising: gathers fill them
    # with zeros and scatters drop them.
    tile_rows = static.tile_rows or default_tile_rows(
        rows, head.weight.shape[0], width if wanted.weight else 1
    )
    most = launch.cdiv(rows, tile_rows)
    slots = most * tile_rows
    order = jnp.flatnonzero(~ignored, size=slots, fill_value=rows)
    order = jnp.where(order < rows, order, rows + jnp.arange(slots)).astype(jnp.int32)
    num_tiles = launch.cdiv(jnp.sum(~ignored), tile_rows)

    def take(values, index, fill):
        return values.at[index].get(
            mode="fill", fill_value=fill, indices_are_sorted=True, unique_indices=True
        )

    def put(values, index, new):
        return values.at[index].set(new, mode="drop", indices_are_sorted=True, unique_indices=True)

    def step(tile, carry):
        losses, gradients = carry
        index = lax.dynamic_slice(order, (tile * tile_rows,), (tile_rows,))
        hidden, tile_labels = take(head.hidden, index, 0), take(safe, index, 0)
        logits = _logits(head, hidden, static.lora_scale)
        if not any(wanted[:5]):
            return put(losses, index, _tile_losses(static, logits, tile_labels)), gradients
        pallas = static.implementation == "pallas"
        make = kernels.loss_and_gradient if pallas else kernels.loss_and_gradient_xla
        tile_losses, g = make(logits, tile_labels, take(coefficient, index, 0) * scale, static.options, dtype)
        hidden_tile, others = _tile_gradients(static, head, hidden, g, 1.0 / scale, wanted)
        sums = (
            None if new is None else total + new for total, new in zip(gradients[1:], others, strict=True)
        )
        hidden_sum = put(gradients.hidden, index, hidden_tile) if wanted.hidden else None
        return put(losses, index, tile_losses), Head(hidden_sum, *sums)

    def every_tile() -> tuple[jax.Array, Head]:
        return lax.fori_loop(0, most, step, nothing())

    def tiles_that_count() -> tuple[jax.Array, Head]:
        return lax.fori_loop(0, num_tiles, step, nothing())

    # Where the device computes a loop's bound, the host waits for it before every turn: 60 to 100 us a tile on an H100,
    # where nothing runs. So that loop is kept for a batch that can leave out a tile.
    if launch.interpreting():  # on a CPU nothing waits, and one loop is compiled sooner than two
        losses, gradients = tiles_that_count()
    elif most == 1:
        losses, gradients = every_tile()
    else:
        losses, gradients = lax.cond(num_tiles == most, every_tile, tiles_that_count)
    return jnp.where(ignored, 0.0, losses * factor), gradients, unit


def _coefficients(token_weights, ignored, factor) -> tuple[jax.Array, jax.Array]:
    """(the rows' factors in units of the largest, that unit): fp16 has no other way to hold weights like 1/8192."""
    if token_weights is None:
        return factor, jnp.float32(1.0)
    token_weights = jnp.where(ignored, 0.0, token_weights.astype(jnp.float32))
    largest = jnp.max(jnp.abs(token_weights), initial=0.0)
    unit = jnp.where((largest > 0.0) & jnp.isfinite(largest), largest, 1.0)
    return jnp.where(ignored, 0.0, factor * (token_weights / unit)), unit


def _tile_gradients(static, head, hidden, g, unscale, wanted) -> tuple[jax.Array | None, tuple]:
    """One tile's (hidden gradient in hidden's dtype, fp32 parts of the gradients of the rest of `Head`).

    g [rows, V], in hidden's dtype, is 1/unscale times the gradient of the tile's logits; hidden [rows, d].
    """
    hidden_tile = weight = bias = lora_a = lora_b = None
    g_b: Any = None  # s G B, the rank-r gradient that hidden and lora_a share
    if head.lora_a is not None:
        g_b = (static.lora_scale * unscale * _product(g, head.lora_b, (1, 0))).astype(g.dtype)
    if wanted.hidden:
        hidden_tile = unscale * _product(g, head.weight, (1, 0))
        if head.lora_a is not None:
            hidden_tile = hidden_tile + _product(g_b, head.lora_a, (1, 0))
        hidden_tile = hidden_tile.astype(hidden.dtype)
    if wanted.weight:
        weight = unscale * _product(g, hidden, (0, 0))
    if wanted.bias:
        bias = unscale * jnp.sum(g.astype(jnp.float32), axis=0)
    if wanted.lora_a:
        lora_a = _product(g_b, hidden, (0, 0))
    if wanted.lora_b:
        lora_b = static.lora_scale * unscale * _product(g, _low_rank(head, hidden), (0, 0))
    return hidden_tile, (weight, bias, lora_a, lora_b, None)


# -------------------------------------------------------------------------------------------------- the hand gradient


def _weighted_sum(
    losses: jax.Array, token_weights: jax.Array | None, labels: jax.Array, ignore_index: int
) -> jax.Array:
    if token_weights is not None:
        losses = jnp.where(labels == ignore_index, 0.0, losses * token_weights.astype(jnp.float32))
    return jnp.sum(losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sum(static: _Static, head: Head, labels: jax.Array) -> jax.Array:
    losses, _, _ = _tiles(static, head, labels, _NOTHING)
    return _weighted_sum(losses, head.token_weights, labels, static.ignore_index)


def _forward_rule(static, head, labels):
    wanted = Head(*(leaf is not None and leaf.perturbed for leaf in head))
    head, labels = Head(*(None if leaf is None else leaf.value for leaf in head)), labels.value
    losses, gradients, unit = _tiles(static, head, labels, wanted)
    loss_sum = _weighted_sum(losses, head.token_weights, labels, static.ignore_index)
    # The unit is the weights'; their own gradient, the losses, has none.
    gradients = gradients._replace(token_weights=losses if wanted.token_weights else None)
    # Empty arrays carry the dtypes that backward must return.
    dtypes = Head(
        *(jnp.empty((0,), leaf.dtype) if want else None for leaf, want in zip(head, wanted, strict=True))
    )
    return loss_sum, (gradients, dtypes, unit)


def _backward_rule(static, residuals, cotangent):
    gradients, dtypes, unit = residuals
    if isinstance(cotangent, SymbolicZero):
        return Head(*(None,) * 6), None
    factors = Head(*(cotangent * unit,) * 5, cotangent)
    return Head(
        *(
            None if gradient is None else (factor * gradient.astype(jnp.float32)).astype(like.dtype)
            for gradient, factor, like in zip(gradients, factors, dtypes, strict=True)
        )
    ), None


_loss_sum.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)
