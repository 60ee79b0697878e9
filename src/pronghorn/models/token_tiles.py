"""A function of tokens, each by itself, taken a tile of tokens at a time, forward and backward.

    y_t = f(p, x_t)        dx_t, dp_t = the pullback of f at (p, x_t), of dy_t        dp = Σ_t dp_t

What f needs inside exists for one tile at a time: a feed-forward network's gate, up and hidden values of a long row (86
KB a token in Llama-3.1-8B, and as much again for their gradients) never do. Saved: p and x; f runs again in the
backward pass. Sums over tiles are fp32.

A result is written over the tile of x, or of dy, that it is of, in an array that begins as theirs. Results that a scan
stacks begin as zeros, which XLA makes for all layers of a model at once: 256 MiB each, forward and backward, for 32,768
tokens of that model.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pronghorn.models.ordering import zero_after
from pronghorn.pallas_kernels.launch import Static, cdiv

_MULTIPLE = 128  # a tile that is no multiple of it leaves matrix products with a ragged edge


@dataclasses.dataclass(frozen=True, eq=False)
class _Tiles:
    function: Callable[..., jax.Array]
    prepare: Callable[[Any], Any]
    count: int
    size: int


def in_token_tiles(
    function: Callable[..., jax.Array],
    operands: Any,
    rows: tuple[jax.Array, ...],
    *,
    tile_tokens: int,
    prepare: Callable[[Any], Any] = lambda operands: operands,
) -> jax.Array:
    """function(operands, rows, 0) without ever computing more than `tile_tokens` tokens at once.

    Args:
      function: `(operands, rows, tile) -> y`: each `rows[i]` is `[tokens, d_i]`, y like rows[0].
        A token's result depends on nothing of the others. `tile` is the number of the tile, for random keys.
      operands: a pytree; differentiable, integers and keys aside.
      rows: arrays `[batch, seq, d_i]`.
      tile_tokens: the most tokens of a tile.
      prepare: of operands, what is done once for all tiles in forward and once in backward, to what is not
        differentiated: dequantising.
    """
    batch, seq, _ = rows[0].shape
    tokens = batch * seq
    count = cdiv(tokens, tile_tokens)
    if count == 1:
        flat = tuple(row.reshape(tokens, -1) for row in rows)
        return function(prepare(operands), flat, 0).reshape(batch, seq, -1)
    # Tiles that come out even spare copies with padding, if it takes less than twice as many.
    even = (n for n in range(count, 2 * count) if tokens % n == 0 and tokens // n % _MULTIPLE == 0)
    count = next(even, count)
    size = cdiv(tokens, count)
    if tokens % count or size % _MULTIPLE:
        size = min(tile_tokens, cdiv(size, _MULTIPLE) * _MULTIPLE)
        count = cdiv(tokens, size)
    # Rows of zeros at the end, where tiles do not come out even: their gradients are zero.
    pad = ((0, count * size - tokens), (0, 0))
    tiled = tuple(jnp.pad(row.reshape(tokens, -1), pad).reshape(count, size, -1) for row in rows)
    y = _tiled(_Tiles(function, prepare, count, size), operands, tiled)
    return y.reshape(count * size, -1)[:tokens].reshape(batch, seq, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(tiles, operands, rows):
    operands = tiles.prepare(operands)
    first, *others = rows

    def body(buffer, scanned):
        tile, others = scanned
        y = tiles.function(operands, (buffer[tile], *others), tile)
        return jax.lax.dynamic_update_index_in_dim(buffer, y, tile, 0), None

    return jax.lax.scan(body, first, (jnp.arange(tiles.count), others))[0]


def _tiled_forward(tiles, operands, rows):
    wanted = tuple(leaf.perturbed for leaf in jax.tree.leaves(operands))
    operands, rows = jax.custom_derivatives.custom_vjp_primal_tree_values((operands, rows))
    return _tiled(tiles, operands, rows), (operands, rows, Static(wanted))


def _tiled_backward(tiles, residuals, dy):
    operands, rows, wanted = residuals
    raw, raw_structure = jax.tree.flatten(operands)
    trained = [leaf for leaf, want in zip(raw, wanted.value, strict=True) if want]
    # Behind a barrier, or XLA would find what forward prepared equal to this, and keep it alive until here.
    behind, dy = jax.lax.optimization_barrier(([leaf for leaf in raw if _is_number(leaf)], dy))
    behind = iter(behind)
    raw = [next(behind) if _is_number(leaf) else leaf for leaf in raw]
    mine = {id(leaf) for leaf, want in zip(raw, wanted.value, strict=True) if want}
    leaves, structure = jax.tree.flatten(tiles.prepare(jax.tree.unflatten(raw_structure, raw)))
    flags = [id(leaf) in mine for leaf in leaves]

    def call(tile, trained, rows):
        given = iter(trained)
        merged = [next(given) if want else leaf for leaf, want in zip(leaves, flags, strict=True)]
        return tiles.function(jax.tree.unflatten(structure, merged), rows, tile)

    def body(carry, scanned):
        sums, buffers = carry
        tile, one = scanned
        _, pull = jax.vjp(functools.partial(call, tile), trained, one)
        found, dx = pull(buffers[0][tile])
        sums = [total + part.astype(total.dtype) for total, part in zip(sums, found, strict=True)]
        buffers = [
            jax.lax.dynamic_update_index_in_dim(buffer, part, tile, 0)
            for buffer, part in zip(buffers, dx, strict=True)
        ]
        return (sums, buffers), None

    buffers = [dy, *rows[1:]]
    zero = zero_after(dy).astype(jnp.float32)
    sums = [jnp.full(leaf.shape, zero, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in trained]
    (sums, buffers), _ = jax.lax.scan(body, (sums, buffers), (jnp.arange(tiles.count), rows))
    rest = iter(total.astype(leaf.dtype) for total, leaf in zip(sums, trained, strict=True))
    gradients = jax.tree.unflatten(raw_structure, [next(rest) if want else None for want in wanted.value])
    return gradients, tuple(buffers)


def _is_number(leaf: Any) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


_tiled.defvjp(_tiled_forward, _tiled_backward, symbolic_zeros=True)
