"""The gate of a gated MLP with adapters: its kernels finish the rank-r products of gate, up and down while they pass.

gate = e + T B_gᵀ, up = u + T B_uᵀ and dh = D + G A come as a large product (e, u, D) and two thin factors each, and

    h     = f(gate) up
    dgate = dh up f'(gate)        dup = dh f(gate)
    dA    = Gᵀ h                  dB_g = Tᵀ dgate           dB_u = Tᵀ dup            (all [rank, f])

with f as in `gated_activation`. A rank-r product that is added by cuBLAS is written and read at the size of the layer's
widest array, and each gradient of an adapter reads one of those again; here both are tensor-core products of tiles that
are in registers anyway. Per layer and token that saves four passes over [tokens, f] in forward and eight in backward,
and h is never written where only adapters are trained.

Backward gives each program a strip of columns and every n-th run of rows, so that the sums over rows stay in registers;
one partial sum a run is added up outside: no atomics, so a rerun is bit-exact. Products take 16-bit operands as cuBLAS
would and add up in fp32; fp32 operands keep fp32's precision.

These are parts of `gated_mlp`, which says what is saved. Sources: those of `gated_activation` and `lora_linear`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.pallas_kernels import launch
from pronghorn.pallas_kernels.gated_activation import Activation, sigmoid_in_kernel, value_and_slope
from pronghorn.pallas_kernels.tile_operations import (
    COLUMNS_BY_COLUMNS,
    ROWS_BY_COLUMNS,
    ROWS_BY_ROWS,
    tile_product,
)

# A product of tiles has no side under 16.
LEAST_SIDE = 16
# Rows and columns of a tile and warps of a program. A row of a tile fills whole 128-byte lines.
FORWARD_BLOCK = (64, 64, 4)
BACKWARD_BLOCK = (32, 64, 4)
# Runs of rows, and so partial sums, of the adapters' gradients: they follow from the shape alone, and so does the last
# bit of the sums.
MOST_ROW_RUNS = 8


class GatedFactors(NamedTuple):
    """The thin factors: T [tokens, r] with B_gate and B_up [f, r], and G [tokens, q] with A_down [q, f]; one dtype.

    B holds the scale. G and A_down are None where down has no adapter, or forward runs.
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
      largest_dgate, largest_dup: fp32 [], the largest magnitude of each, for a product that rounds it.
    """

    dgate: Any = None
    dup: Any = None
    h: Any = None
    da_down: Any = None
    db_gate: Any = None
    db_up: Any = None
    largest_dgate: Any = None
    largest_dup: Any = None


def lowrank_gated_forward(
    gate: jax.Array, up: jax.Array, factors: GatedFactors, *, activation: Activation
) -> jax.Array:
    """h [..., f] in the dtype of gate; gate and up [..., f] lack the rank-r products of `factors`."""
    shape, (rows, width) = gate.shape, _flat(gate)
    block, num_warps = _clipped(FORWARD_BLOCK, rows, width)
    (h,) = launch.pallas_call(
        functools.partial(
            _forward_kernel, activation=activation, block=block, native=not launch.interpreting()
        ),
        name="lowrank_gated_forward",
        grid=(launch.cdiv(rows, block[0]) * launch.cdiv(width, block[1]),),
        out_shape=(jax.ShapeDtypeStruct((rows, width), gate.dtype),),
        num_warps=num_warps,
    )(gate.reshape(rows, width), up.reshape(rows, width), _rows(factors.t), factors.b_gate, factors.b_up)
    return h.reshape(shape)


def lowrank_gated_backward(
    dh: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    factors: GatedFactors,
    *,
    activation: Activation,
    wanted: tuple[str, ...],
) -> GatedGradients:
    """dgate and dup over the memory of gate and up, and what is `wanted` of the other fields of `GatedGradients`, in
    their order.

    Args:
      dh, gate, up: [..., f], without the rank-r products.
    """
    shape, (rows, width) = gate.shape, _flat(gate)
    block, num_warps = _clipped(BACKWARD_BLOCK, rows, width)
    blocks = launch.cdiv(rows, block[0])
    runs = max(count for count in range(1, MOST_ROW_RUNS + 1) if blocks % count == 0)
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
    whole = jax.ShapeDtypeStruct((rows, width), gate.dtype)
    outputs = {"dgate": whole, "dup": whole}
    for name in wanted:
        if name.startswith("largest"):
            outputs[name] = jax.ShapeDtypeStruct((runs, launch.cdiv(width, block[1])), jnp.float32)
            continue
        rank = inputs["g" if name == "da_down" else "t"].shape[1] if name != "h" else 0
        outputs[name] = whole if name == "h" else jax.ShapeDtypeStruct((runs * rank, width), jnp.float32)
    results = launch.pallas_call(
        functools.partial(
            _backward_kernel,
            names=(*inputs, *outputs),
            activation=activation,
            block=block,
            runs=runs,
            native=not launch.interpreting(),
        ),
        name="lowrank_gated_backward",
        grid=(launch.cdiv(width, block[1]), runs),
        out_shape=tuple(outputs.values()),
        input_output_aliases={1: 0, 2: 1} | ({0: 2} if wanted[:1] == ("h",) else {}),
        num_warps=num_warps,
    )(*inputs.values())
    found = dict(zip(outputs, results, strict=True))
    sums = {
        name: found[name].reshape(runs, -1, width).sum(axis=0) if name in found else None
        for name in ("da_down", "db_gate", "db_up")
    }
    largest = {name: jnp.max(found[name]) for name in ("largest_dgate", "largest_dup") if name in found}
    h = found["h"].reshape(shape) if "h" in found else None
    return GatedGradients(found["dgate"].reshape(shape), found["dup"].reshape(shape), h, **sums, **largest)


def _flat(x: jax.Array) -> tuple[int, int]:
    return math.prod(x.shape[:-1]), x.shape[-1]


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _clipped(block: tuple[int, int, int], rows: int, width: int) -> tuple[tuple[int, int], int]:
    """((rows, columns), warps): no more than there are, no less than a product of tiles needs."""
    fit = tuple(
        max(LEAST_SIDE, min(side, launch.next_power_of_2(n)))
        for side, n in zip(block, (rows, width), strict=False)
    )
    return (fit[0], fit[1]), min(block[2], launch.warps_for(fit[0] * fit[1], per_thread=16))


def _mask(shape, rows, columns):
    """Which elements of a tile exist; None where all do, which is known from the sizes alone."""
    pairs = ((shape[0], rows[:, None]), (shape[1], columns[None, :]))
    masks = [index < extent for extent, index in pairs if extent % index.size]
    if not masks:
        return None
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), (rows.size, columns.size))


def _load(ref, rows, columns):
    tile, mask = ref.at[rows[:, None], columns[None, :]], _mask(ref.shape, rows, columns)
    return triton.load(tile) if mask is None else triton.load(tile, mask=mask, other=0.0)


def _side(count: int) -> jax.Array:
    """Indices of a rank: a power of two of at least a product's least side, masked where loaded."""
    return jnp.arange(max(LEAST_SIDE, launch.next_power_of_2(count)))


def _forward_kernel(gate_ref, up_ref, t_ref, b_gate_ref, b_up_ref, h_ref, *, activation, block, native):
    program, column_blocks = pl.program_id(0), launch.cdiv(gate_ref.shape[1], block[1])
    rows = (program // column_blocks) * block[0] + jnp.arange(block[0])
    columns = (program % column_blocks) * block[1] + jnp.arange(block[1])
    ranks = _side(t_ref.shape[1])
    t = _load(t_ref, rows, ranks)
    gate = _load(gate_ref, rows, columns).astype(jnp.float32)
    gate += tile_product(t, _load(b_gate_ref, columns, ranks), ROWS_BY_ROWS, native=native)
    up = _load(up_ref, rows, columns).astype(jnp.float32)
    up += tile_product(t, _load(b_up_ref, columns, ranks), ROWS_BY_ROWS, native=native)
    value, _ = value_and_slope(gate, activation, sigmoid_in_kernel)
    h = (value * up).astype(h_ref.dtype)
    triton.store(h_ref.at[rows[:, None], columns[None, :]], h, mask=_mask(h_ref.shape, rows, columns))


def _backward_kernel(*refs, names, activation, block, runs, native):
    """Grid (strip of columns, run of rows)."""
    ref = dict(zip(names, refs, strict=True))
    num_rows, width = ref["gate"].shape
    dtype = ref["dgate"].dtype
    run = pl.program_id(1)
    columns = pl.program_id(0) * block[1] + jnp.arange(block[1])
    ranks = _side(ref["t"].shape[1])
    b_gate, b_up = (_load(ref[name], columns, ranks) for name in ("b_gate", "b_up"))
    if "g" in ref:
        down_ranks = _side(ref["g"].shape[1])
        a_down = _load(ref["a_down"], down_ranks, columns)

    rounds = launch.cdiv(num_rows, block[0] * runs)

    def rows_of(index):
        return (index * runs + run) * block[0] + jnp.arange(block[0])

    def load(index):
        # Rows and columns that do not exist load as zeros and add nothing to any sum.
        rows = rows_of(index)
        thin = [_load(ref["t"], rows, ranks)] + ([_load(ref["g"], rows, down_ranks)] if "g" in ref else [])
        return [_load(ref[name], rows, columns) for name in ("dh", "gate", "up")], thin

    def one_block(index, carry):
        sums, (wide, thin) = carry
        following = load(jnp.minimum(index + 1, rounds - 1))  # in flight while this block is worked on
        rows = rows_of(index)
        dh, gate, up = (tile.astype(jnp.float32) for tile in wide)
        t = thin[0]
        gate += tile_product(t, b_gate, ROWS_BY_ROWS, native=native)
        up += tile_product(t, b_up, ROWS_BY_ROWS, native=native)
        left = {"db_gate": t, "db_up": t}
        if "g" in ref:
            left["da_down"] = thin[1]
            dh += tile_product(left["da_down"], a_down, ROWS_BY_COLUMNS, native=native)
        value, slope = value_and_slope(gate, activation, sigmoid_in_kernel)
        tile = {
            "dgate": (dh * up * slope).astype(dtype),
            "dup": (dh * value).astype(dtype),
            "h": (value * up).astype(dtype),
        }
        mask = _mask((num_rows, width), rows, columns)
        for name in ("dgate", "dup", "h"):
            if name in ref:
                triton.store(ref[name].at[rows[:, None], columns[None, :]], tile[name], mask=mask)
        right = {"db_gate": tile["dgate"], "db_up": tile["dup"], "da_down": tile["h"]}
        totals = {}
        for name, total in sums.items():
            if name in magnitudes:
                written = tile[name.removeprefix("largest_")].astype(jnp.float32)
                totals[name] = jnp.maximum(total, jnp.max(jnp.abs(written), axis=0))
            else:
                totals[name] = total + tile_product(
                    left[name], right[name], COLUMNS_BY_COLUMNS, native=native
                )
        return totals, following

    summed = [name for name in ("da_down", "db_gate", "db_up") if name in ref]
    sides = {name: (down_ranks if name == "da_down" else ranks) for name in summed}
    start = {name: jnp.zeros((sides[name].shape[0], block[1]), jnp.float32) for name in summed}
    magnitudes = [name for name in ("largest_dgate", "largest_dup") if name in ref]
    start |= {name: jnp.zeros(block[1], jnp.float32) for name in magnitudes}
    sums, _ = lax.fori_loop(0, rounds, one_block, (start, load(0)))
    for name in magnitudes:
        ref[name][run, pl.program_id(0)] = jnp.max(sums[name])
    for name in summed:
        rank = ref[name].shape[0] // runs
        at = ref[name].at[run * rank + sides[name][:, None], columns[None, :]]
        triton.store(at, sums[name], mask=_mask((rank, width), sides[name], columns))
