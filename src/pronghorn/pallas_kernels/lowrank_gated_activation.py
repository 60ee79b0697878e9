"""The gate of a gated MLP with adapters: its kernels finish the rank-r products of gate, up and down while they pass.

gate = e + T B_gᵀ, up = u + T B_uᵀ and dh = D + G A come as a large product (e, u, D) and two thin factors each, and

    h     = f(gate) up
    dgate = dh up f'(gate)        dup = dh f(gate)
    dA    = Gᵀ h                  dB_g = Tᵀ dgate           dB_u = Tᵀ dup            (all [rank, f])
    T of down = h Aᵀ                                        G of gate and up = dgate B_g + dup B_u

with f as in `gated_activation`. A rank-r product that is added by cuBLAS is written and read at the size of the layer's
widest array, and each gradient of an adapter reads one of those again; here both are tensor-core products of tiles that
are in registers anyway. Per layer and token that saves four passes over [tokens, f] in forward and eight in backward,
and h is never written where only adapters are trained.

Backward gives each program a strip of columns and every n-th block of rows, so that the sums over rows stay in
registers; forward gives it a block of rows and, for T of down, every n-th tile of columns. One partial sum a program is
added up outside: no atomics, so a rerun is bit-exact. Products take 16-bit operands as cuBLAS would and add up in fp32;
fp32 operands keep fp32's precision.

These are parts of `gated_mlp`, which says what is saved. Sources: those of `gated_activation` and `lora_linear`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.pallas_kernels import launch, tuned
from pronghorn.pallas_kernels.gated_activation import (
    Activation,
    gated_activation_reference,
    sigmoid_in_kernel,
    value_and_slope,
)
from pronghorn.pallas_kernels.tile_operations import (
    COLUMNS_BY_COLUMNS,
    ROWS_BY_COLUMNS,
    ROWS_BY_ROWS,
    over_tiles,
    tile_product,
)

# A product of tiles has no side under 16.
LEAST_SIDE = 16
# Rows and columns of a tile and warps of a program, for h alone. A row of a tile fills whole 128-byte lines.
FORWARD_BLOCK = (64, 64, 4)


class ForwardTile(NamedTuple):
    """How forward with T of down is launched; `tuned` may replace it, by rank.

    Attributes:
      programs: at least this many, where there are as many tiles: a block of rows is shared by so many programs.
      ahead: 1 loads the next tile while one is worked on: more bytes in flight, and more registers.
    """

    rows: int
    columns: int
    warps: int
    programs: int
    ahead: int


class BackwardTile(NamedTuple):
    """How backward is launched, like `ForwardTile`.

    Attributes:
      runs: of rows, and so partial sums of the adapters' gradients, at most; each is written and read again, which at
        rank 16 of three adapters is an eighth of what the tiles of a run of 512 rows take.
      tall: 1 holds tiles as [columns, rows]. Sums over rows then take what is computed from the registers where it is,
        and 64 columns are a side of Hopper's products; G takes it through shared memory instead.
      with_g: 1 sums G too, one partial sum a strip of columns. 0 leaves it to cuBLAS, which reads dgate and dup again.
    """

    rows: int
    columns: int
    warps: int
    runs: int
    ahead: int
    tall: int
    with_g: int


# How often a sum is split, and so its last bit, follows from these and the shape alone. The large ones, of fp32 and of
# ranks of gate and up together past `MOST_RANK`, spill no register where the others do (but for both at once).
FORWARD = ForwardTile(64, 64, 4, 1024, 1)
FORWARD_LARGE = ForwardTile(64, 32, 4, 1024, 1)
BACKWARD = BackwardTile(32, 64, 4, 8, 1, 0, 0)
BACKWARD_LARGE = BackwardTile(32, 64, 8, 8, 1, 0, 0)
MOST_RANK = 64
# What backward with maxima is called where `tuned` is asked; it is the same kernel.
BACKWARD_AND_LARGEST = "lowrank_gated_backward_and_largest"


class GatedFactors(NamedTuple):
    """The thin factors: T [tokens, r] with B_gate and B_up [f, r], and G [tokens, q] with A_down [q, f]; one dtype.

    B holds the scale. G and A_down are None where down has no adapter. Forward has no G; A_down is for T of down there.
    """

    t: jax.Array
    b_gate: jax.Array
    b_up: jax.Array
    g: jax.Array | None = None
    a_down: jax.Array | None = None


class GatedGradients(NamedTuple):
    """What backward computes; None where not asked for.

    Attributes:
      dgate, dup: [..., f] in the dtype of dh.
      h: [..., f], rebuilt.
      da_down: fp32 [q, f]. db_gate, db_up: fp32 [r, f], without the factor that B holds.
      g_both: fp32 [..., r], G of gate and up; None also where this device's tile leaves it to cuBLAS.
      largest_dgate, largest_dup: fp32 [], the largest magnitude of each, for a product that rounds it.
    """

    dgate: Any = None
    dup: Any = None
    h: Any = None
    da_down: Any = None
    db_gate: Any = None
    db_up: Any = None
    g_both: Any = None
    largest_dgate: Any = None
    largest_dup: Any = None


def lowrank_gated_forward(
    gate: jax.Array, up: jax.Array, factors: GatedFactors, *, activation: Activation
) -> tuple[jax.Array, jax.Array | None]:
    """(h [..., f], T of down [..., q]) in the dtype of gate; gate and up [..., f] lack the rank-r products of
    `factors`. T is None without A_down.
    """
    shape, (rows, width), dtype = gate.shape, _flat(gate), gate.dtype
    inputs = [
        gate.reshape(rows, width),
        up.reshape(rows, width),
        _rows(factors.t),
        factors.b_gate,
        factors.b_up,
    ]
    static = {"activation": activation, "native": not launch.interpreting()}
    whole = jax.ShapeDtypeStruct((rows, width), dtype)
    if factors.a_down is None:
        block, num_warps = _clipped(FORWARD_BLOCK, rows, width)
        (h,) = launch.pallas_call(
            functools.partial(_forward_kernel, block=block, **static),
            name="lowrank_gated_forward",
            grid=(launch.cdiv(rows, block[0]) * launch.cdiv(width, block[1]),),
            out_shape=(whole,),
            num_warps=num_warps,
        )(*inputs)
        return h.reshape(shape), None
    tile = ForwardTile(*_choice("lowrank_gated_forward", factors, FORWARD, FORWARD_LARGE))
    block, num_warps = _clipped(tile, rows, width)
    blocks, tiles = launch.cdiv(rows, block[0]), launch.cdiv(width, block[1])
    dividing = [count for count in range(1, tiles + 1) if tiles % count == 0]
    runs = next((count for count in dividing if blocks * count >= tile.programs), tiles)
    rank = factors.a_down.shape[0]
    h, sums = launch.pallas_call(
        functools.partial(_forward_and_rank_kernel, block=block, runs=runs, ahead=bool(tile.ahead), **static),
        name="lowrank_gated_forward",
        grid=(blocks * runs,),
        out_shape=(whole, jax.ShapeDtypeStruct((runs * rows, rank), jnp.float32)),
        num_warps=num_warps,
    )(*inputs, factors.a_down)
    t_down = sums.reshape(runs, rows, rank).sum(axis=0).astype(dtype)
    return h.reshape(shape), t_down.reshape(*shape[:-1], rank)


def lowrank_gated_backward(
    dh: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    factors: GatedFactors,
    *,
    activation: Activation,
    wanted: tuple[str, ...],
    in_place: bool = True,
) -> GatedGradients:
    """dgate and dup, and what is `wanted` of the other fields of `GatedGradients`, in their order.

    Args:
      dh, gate, up: [..., f], without the rank-r products.
      in_place: dgate, dup and h take the memory of gate, up and dh.
    """
    shape, (rows, width) = gate.shape, _flat(gate)
    # With maxima a thread holds more, and another tile leaves room for a second program on a multiprocessor.
    if any(name.startswith("largest") for name in wanted):
        tile = BackwardTile(*_choice(BACKWARD_AND_LARGEST, factors, BACKWARD_LARGE, BACKWARD_LARGE))
    else:
        tile = BackwardTile(*_choice("lowrank_gated_backward", factors, BACKWARD, BACKWARD_LARGE))
    block, num_warps = _clipped(tile, rows, width)
    blocks, strips = launch.cdiv(rows, block[0]), launch.cdiv(width, block[1])
    rounds = launch.cdiv(blocks, tile.runs)
    runs = launch.cdiv(blocks, rounds)
    inputs = {
        "dh": dh.reshape(rows, width),
        "gate": gate.reshape(rows, width),
        "up": up.reshape(rows, width),
        "t": _rows(factors.t),
        "b_gate": factors.b_gate,
        "b_up": factors.b_up,
    }
    if factors.g is not None and factors.a_down is not None:
        inputs |= {"g": _rows(factors.g), "a_down": factors.a_down}
    whole, rank = jax.ShapeDtypeStruct((rows, width), gate.dtype), factors.t.shape[-1]
    possible = {
        "h": whole,
        "db_gate": jax.ShapeDtypeStruct((runs * rank, width), jnp.float32),
        "db_up": jax.ShapeDtypeStruct((runs * rank, width), jnp.float32),
        "largest_dgate": jax.ShapeDtypeStruct((runs, strips), jnp.float32),
        "largest_dup": jax.ShapeDtypeStruct((runs, strips), jnp.float32),
    }
    if "a_down" in inputs:
        of_down = (runs * inputs["a_down"].shape[0], width)
        possible["da_down"] = jax.ShapeDtypeStruct(of_down, jnp.float32)
    if tile.with_g:
        possible["g_both"] = jax.ShapeDtypeStruct((strips * rows, rank), jnp.float32)
    left_out = () if tile.with_g else ("g_both",)
    outputs = {"dgate": whole, "dup": whole} | {
        name: possible[name] for name in wanted if name not in left_out
    }
    aliases = {1: 0, 2: 1} | ({0: 2} if wanted[:1] == ("h",) else {})
    results = launch.pallas_call(
        functools.partial(
            _backward_kernel,
            names=(*inputs, *outputs),
            activation=activation,
            block=block,
            rounds=rounds,
            ahead=bool(tile.ahead),
            tall=bool(tile.tall),
            native=not launch.interpreting(),
        ),
        name="lowrank_gated_backward",
        grid=(strips, runs),
        out_shape=tuple(outputs.values()),
        input_output_aliases=aliases if in_place else {},
        num_warps=num_warps,
    )(*inputs.values())
    found = dict(zip(outputs, results, strict=True))
    for name in ("da_down", "db_gate", "db_up"):
        if name in found:
            found[name] = found[name].reshape(runs, -1, width).sum(axis=0)
    if "g_both" in found:
        found["g_both"] = found["g_both"].reshape(strips, rows, rank).sum(axis=0).reshape(*shape[:-1], rank)
    found |= {name: jnp.max(found[name]) for name in ("largest_dgate", "largest_dup") if name in found}
    found |= {name: found[name].reshape(shape) for name in ("dgate", "dup", "h") if name in found}
    return GatedGradients(**found)


def lowrank_gated_reference(
    dh: jax.Array, gate: jax.Array, up: jax.Array, factors: GatedFactors, *, activation: Activation
) -> tuple[jax.Array, jax.Array, GatedGradients]:
    """(h, T of down, everything of backward) in fp32, by plain jax.numpy: the oracle of both kernels.

    The operands of the sums are rounded to the dtype of gate, as products of 16-bit arrays would find them.
    """
    exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    dtype = gate.dtype
    f: Any = jax.tree.map(lambda a: a.astype(jnp.float32), factors)
    gate = gate.astype(jnp.float32) + exact(f.t, f.b_gate.T)
    up = up.astype(jnp.float32) + exact(f.t, f.b_up.T)
    h, pullback = jax.vjp(functools.partial(gated_activation_reference, activation=activation), gate, up)
    dgate, dup = pullback(dh.astype(jnp.float32) + exact(f.g, f.a_down))
    h_, dgate_, dup_ = (a.astype(dtype).astype(jnp.float32) for a in (h, dgate, dup))
    gradients = GatedGradients(
        dgate,
        dup,
        h,
        da_down=exact(f.g.T, h_),
        db_gate=exact(f.t.T, dgate_),
        db_up=exact(f.t.T, dup_),
        g_both=exact(dgate_, f.b_gate) + exact(dup_, f.b_up),
        largest_dgate=jnp.max(jnp.abs(dgate_)),
        largest_dup=jnp.max(jnp.abs(dup_)),
    )
    return h, exact(h_, f.a_down.T), gradients


def _flat(x: jax.Array) -> tuple[int, int]:
    return math.prod(x.shape[:-1]), x.shape[-1]


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _choice(op: str, factors: GatedFactors, usual: tuned.Choice, large: tuned.Choice) -> tuned.Choice:
    """What was measured for this device, or one of the two. Sums take registers by the rank: a smaller rank's tile does
    not do. Of three adapters of one rank, gate and up have twice that together."""
    rank = max(LEAST_SIDE, factors.t.shape[-1], 0 if factors.a_down is None else 2 * factors.a_down.shape[0])
    dtype = factors.t.dtype
    found = tuned.choice(op, dtype, rank, at_least=True)
    if found is None:
        return large if rank > MOST_RANK or dtype == jnp.float32 else usual
    return found


def _clipped(block: Sequence[int], rows: int, width: int) -> tuple[tuple[int, int], int]:
    """((rows, columns), warps): no more than there are, no less than a product of tiles needs."""
    fit = tuple(
        max(LEAST_SIDE, min(side, launch.next_power_of_2(n)))
        for side, n in zip(block, (rows, width), strict=False)
    )
    return (fit[0], fit[1]), min(block[2], launch.warps_for(fit[0] * fit[1], per_thread=8))


def _place(rows, columns, tall=False):
    """The indices of a tile [rows, columns], or [columns, rows] where it is tall."""
    return (rows[None, :], columns[:, None]) if tall else (rows[:, None], columns[None, :])


def _mask(shape, rows, columns, tall=False, *, past_end=False):
    """Which elements of a tile exist; None where all do, which is known from the sizes alone.

    past_end: the whole tile may lie behind the last row.
    """
    place = _place(rows, columns, tall)
    masks = [
        index < extent
        for extent, index, checked in zip(shape, place, (past_end, False), strict=True)
        if checked or extent % index.size
    ]
    if not masks:
        return None
    return jnp.broadcast_to(
        functools.reduce(jnp.logical_and, masks), jnp.broadcast_shapes(*(i.shape for i in place))
    )


def _load(ref, rows, columns, tall=False, *, mask=_mask):
    tile, exists = ref.at[_place(rows, columns, tall)], mask(ref.shape, rows, columns, tall)
    return triton.load(tile) if exists is None else triton.load(tile, mask=exists, other=0.0)


def _side(count: int) -> jax.Array:
    """Indices of a rank: a power of two of at least a product's least side, masked where loaded."""
    return jnp.arange(max(LEAST_SIDE, launch.next_power_of_2(count)))


def _forward_kernel(gate_ref, up_ref, t_ref, b_gate_ref, b_up_ref, h_ref, *, activation, block, native):
    program, column_blocks = pl.program_id(0), launch.cdiv(gate_ref.shape[1], block[1])
    rows = (program // column_blocks) * block[0] + jnp.arange(block[0])
    columns = (program % column_blocks) * block[1] + jnp.arange(block[1])
    ranks = _side(t_ref.shape[1])
    t = _load(t_ref, rows, ranks)
    gate, up = _load(gate_ref, rows, columns), _load(up_ref, rows, columns)
    b_gate, b_up = _load(b_gate_ref, columns, ranks), _load(b_up_ref, columns, ranks)
    h = _activated(gate, up, t, b_gate, b_up, activation, native).astype(h_ref.dtype)
    triton.store(h_ref.at[_place(rows, columns)], h, mask=_mask(h_ref.shape, rows, columns))


def _activated(gate, up, t, b_gate, b_up, activation, native):
    """A tile of h, fp32."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    gate += tile_product(t, b_gate, ROWS_BY_ROWS, native=native)
    up += tile_product(t, b_up, ROWS_BY_ROWS, native=native)
    value, _ = value_and_slope(gate, activation, sigmoid_in_kernel)
    return value * up


def _forward_and_rank_kernel(
    gate_ref,
    up_ref,
    t_ref,
    b_gate_ref,
    b_up_ref,
    a_ref,
    h_ref,
    sums_ref,
    *,
    activation,
    block,
    runs,
    ahead,
    native,
):
    """A block of rows and every n-th tile of columns, so that the programs of a block read one piece of memory."""
    num_rows, width = gate_ref.shape
    run, rows = pl.program_id(0) % runs, (pl.program_id(0) // runs) * block[0] + jnp.arange(block[0])
    ranks, down_ranks = _side(t_ref.shape[1]), _side(a_ref.shape[0])
    t = _load(t_ref, rows, ranks)

    def columns_of(index):
        return (index * runs + run) * block[1] + jnp.arange(block[1])

    def load(index):
        return [_load(ref, rows, columns_of(index)) for ref in (gate_ref, up_ref)]

    def one_tile(index, tiles, total):
        columns, (gate, up) = columns_of(index), tiles
        b_gate, b_up = _load(b_gate_ref, columns, ranks), _load(b_up_ref, columns, ranks)
        h = _activated(gate, up, t, b_gate, b_up, activation, native).astype(h_ref.dtype)
        mask = _mask((num_rows, width), rows, columns)
        triton.store(h_ref.at[_place(rows, columns)], h, mask=mask)
        # Columns of A that do not exist are zeros, and add nothing.
        return total + tile_product(h, _load(a_ref, down_ranks, columns), ROWS_BY_ROWS, native=native)

    start = jnp.zeros((block[0], down_ranks.size), jnp.float32)
    total = over_tiles(launch.cdiv(width, block[1]) // runs, load, one_tile, start, ahead)
    at = sums_ref.at[_place(run * num_rows + rows, down_ranks)]
    triton.store(at, total, mask=_mask((num_rows, sums_ref.shape[1]), rows, down_ranks))


def _backward_kernel(*refs, names, activation, block, rounds, ahead, tall, native):
    """Grid (strip of columns, run of `rounds` blocks of rows)."""
    ref = dict(zip(names, refs, strict=True))
    num_rows, width = ref["gate"].shape
    dtype = ref["dgate"].dtype
    strip, run = pl.program_id(0), pl.program_id(1)
    columns = strip * block[1] + jnp.arange(block[1])
    ranks = _side(ref["t"].shape[1])
    b_gate, b_up = (_load(ref[name], columns, ranks) for name in ("b_gate", "b_up"))
    if "g" in ref:
        down_ranks = _side(ref["g"].shape[1])
        a_down = _load(ref["a_down"], down_ranks, columns, tall)
    product = functools.partial(tile_product, native=native)
    runs = launch.cdiv(num_rows, block[0] * rounds)
    # Of some runs the last block may lie behind the last row.
    masked = functools.partial(_mask, past_end=block[0] * rounds * runs != num_rows)

    def rows_of(index):
        return (index * runs + run) * block[0] + jnp.arange(block[0])

    def load(index):
        # Rows and columns that do not exist load as zeros and add nothing to any sum.
        rows = rows_of(index)
        thin = [_load(ref["t"], rows, ranks, mask=masked)]
        if "g" in ref:
            thin.append(_load(ref["g"], rows, down_ranks, mask=masked))
        return [_load(ref[name], rows, columns, tall, mask=masked) for name in ("dh", "gate", "up")], thin

    def one_block(index, tiles, sums):
        rows, (wide, thin) = rows_of(index), tiles
        dh, gate, up = (tile.astype(jnp.float32) for tile in wide)
        t = thin[0]
        # Tall: (T Bᵀ)ᵀ = B Tᵀ.
        gate += product(b_gate, t, ROWS_BY_ROWS) if tall else product(t, b_gate, ROWS_BY_ROWS)
        up += product(b_up, t, ROWS_BY_ROWS) if tall else product(t, b_up, ROWS_BY_ROWS)
        left = {"db_gate": t, "db_up": t}
        if "g" in ref:
            g = left["da_down"] = thin[1]
            dh += product(a_down, g, ROWS_BY_ROWS) if tall else product(g, a_down, ROWS_BY_COLUMNS)
        value, slope = value_and_slope(gate, activation, sigmoid_in_kernel)
        tile = {
            "dgate": (dh * up * slope).astype(dtype),
            "dup": (dh * value).astype(dtype),
            "h": (value * up).astype(dtype),
        }
        mask = masked((num_rows, width), rows, columns, tall)
        for name in ("dgate", "dup", "h"):
            if name in ref:
                triton.store(ref[name].at[_place(rows, columns, tall)], tile[name], mask=mask)
        if "g_both" in ref:
            contract = COLUMNS_BY_COLUMNS if tall else ROWS_BY_COLUMNS
            g_both = product(tile["dgate"], b_gate, contract) + product(tile["dup"], b_up, contract)
            at = ref["g_both"].at[_place(strip * num_rows + rows, ranks)]
            triton.store(at, g_both, mask=masked(ref["t"].shape, rows, ranks))
        right = {"db_gate": tile["dgate"], "db_up": tile["dup"], "da_down": tile["h"]}
        totals = {}
        for name, total in sums.items():
            if name in magnitudes:
                written = jnp.abs(tile[name.removeprefix("largest_")].astype(jnp.float32))
                totals[name] = jnp.maximum(total, written)
            elif tall:
                totals[name] = total + product(right[name], left[name], ROWS_BY_COLUMNS)
            else:
                totals[name] = total + product(left[name], right[name], COLUMNS_BY_COLUMNS)
        return totals

    summed = [name for name in ("da_down", "db_gate", "db_up") if name in ref]
    magnitudes = [name for name in ("largest_dgate", "largest_dup") if name in ref]
    sides = {name: (down_ranks if name == "da_down" else ranks) for name in summed}
    start = {
        name: jnp.zeros((block[1], side.size) if tall else (side.size, block[1]), jnp.float32)
        for name, side in sides.items()
    }
    # A maximum for each place of a tile: over the tile it is taken once, at the end, and no warp waits for the others.
    start |= {name: jnp.zeros(block[::-1] if tall else block, jnp.float32) for name in magnitudes}
    sums = over_tiles(rounds, load, one_block, start, ahead)
    for name in magnitudes:
        ref[name][run, strip] = jnp.max(sums[name])
    for name, side in sides.items():
        rank = ref[name].shape[0] // runs
        at = ref[name].at[_place(run * rank + side, columns, tall)]
        triton.store(at, sums[name], mask=_mask((rank, width), side, columns, tall))
