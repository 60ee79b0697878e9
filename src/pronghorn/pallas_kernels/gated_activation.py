"""The gate of a gated feed-forward layer: h = f(gate) · up, with the gradients of both in one pass.

    f(e) = e σ(e)                                   f'(e) = σ(e) (1 + e (1 − σ(e)))                      "silu"
    f(e) = e Φ(e)                                   f'(e) = Φ(e) + e φ(e)                                "gelu"
    f(e) = e (1 + tanh u) / 2, u = √(2/π) (e + 0.044715 e³)                                              "gelu_tanh"
                                                    f'(e) = (1 + tanh u) / 2 + e (1 − tanh² u) u'(e) / 2

Φ and φ are the distribution and the density of the standard normal. From D = ∂L/∂h: ∂L/∂up = D f(gate) and
∂L/∂gate = D up f'(gate). Saved: gate and up, named "gated_activation_gate" and "gated_activation_up" for
`jax.checkpoint` policies; backward rebuilds f(gate). Everything is fp32, rounded once.

Where one product makes both, gate and up are the halves of one array, and their gradients are those of another: nothing
is sliced or joined, which would be a pass over memory each. Such an array goes by gate's name.

Sources: Shazeer, GLU Variants Improve Transformer, 2020, https://arxiv.org/abs/2002.05202; Hendrycks and Gimpel,
Gaussian Error Linear Units, 2016, https://arxiv.org/abs/1606.08415.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import launch, tuned
from pronghorn.pallas_kernels.tile_operations import ptx

Activation = Literal["silu", "gelu_tanh", "gelu"]

# What `tuned` may replace: elements a program, at most how many columns of them, elements a thread.
BLOCK = (4096, 2048, 16)

# exp(z²) erfc(z) = t Σ c_i tⁱ with t = 1 / (1 + 0.4 z) for 0 <= z <= 9.6, relative error 6.3e-8: least squares of the
# relative error in Chebyshev nodes of t, against scipy.special.erfcx.
_ERFCX_SLOPE = 0.4
_ERFCX = (
    0.22563166916370392,
    0.2264823019504547,
    0.20163898169994354,
    0.1942518651485443,
    0.07798467576503754,
    0.09020859748125076,
    0.08227790147066116,
    -0.13960148394107819,
    0.04112555459141731,
)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def check_activation(activation: str) -> None:
    """Raises InputError for a name that no gate has."""
    if activation not in get_args(Activation):
        raise InputError(
            f"activation={activation!r} is not known; use one of {', '.join(get_args(Activation))}."
        )


def gated_activation(
    gate: jax.Array,
    up: jax.Array | None,
    *,
    activation: Activation = "silu",
    implementation: launch.Implementation | None = None,
) -> jax.Array:
    """activation(gate) · up.

    Args:
      gate, up: [..., f], one dtype: bf16, fp16 or fp32; or gate and up beside each other, [..., 2 f], and None.
      activation: "silu" (SwiGLU), "gelu_tanh" (GeGLU as in Gemma) or "gelu" (exact).
      implementation: "pallas", "xla" or None for the platform's default.

    Returns:
      [..., f] in the dtype of gate.

    Raises:
      InputError: for an unknown activation, or shapes or dtypes that differ.
    """
    check_activation(activation)
    gates = checked_gates("gated_activation", gate, up)
    if launch.resolve(implementation) == "xla" or gate.size == 0:
        return gated_activation_reference(*gates, activation=activation)
    return _gated_activation(gates, activation)


def checked_gates(op: str, gate: jax.Array, up: jax.Array | None) -> tuple[jax.Array, ...]:
    """(gate, up), or (gate beside up,) where up is None; raises InputError where they do not fit."""
    if up is None:
        if gate.shape[-1] % 2:
            raise InputError(f"{op}: gate {gate.shape} without up must hold both, and have an even width.")
        return (gate,)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise InputError(
            f"{op}: gate is {gate.dtype}{gate.shape}, up is {up.dtype}{up.shape}; they must be alike."
        )
    return gate, up


def named_gates(op: str, gates: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The arrays of `checked_gates` with names for `jax.checkpoint` policies."""
    return tuple(
        checkpoint_name(array, f"{op}_{half}") for array, half in zip(gates, ("gate", "up"), strict=False)
    )


def halves(gates: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(gate, up) of the arrays of `checked_gates`, in plain jax.numpy."""
    gate, up = gates if len(gates) == 2 else jnp.split(gates[0], 2, axis=-1)
    return gate, up


def as_gates(gradients: Sequence[jax.Array], gates: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """(dgate, dup) as `gates` lie."""
    return tuple(gradients) if len(gates) == 2 else (jnp.concatenate(gradients, axis=-1),)


def gated_activation_reference(
    gate: jax.Array, up: jax.Array | None = None, *, activation: Activation = "silu"
) -> jax.Array:
    """The oracle of `gated_activation`, in plain jax.numpy."""
    gate, up = halves((gate,) if up is None else (gate, up))
    gate32, up32 = gate.astype(jnp.float32), up.astype(jnp.float32)
    f = (
        jax.nn.silu(gate32)
        if activation == "silu"
        else jax.nn.gelu(gate32, approximate=activation == "gelu_tanh")
    )
    return (f * up32).astype(gate.dtype)


def normal_cdf_and_pdf(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Φ(x), φ(x)) of the standard normal in fp32, both from one exponential.

    Pallas Triton lowers no erf. Φ(−|x|) = exp(−x²/2) erfcx(|x| / √2) / 2 keeps the relative error of the far tail at
    the exponential's, where (1 + erf) / 2 would cancel to zero.
    """
    t = 1.0 / (1.0 + (_ERFCX_SLOPE * math.sqrt(0.5)) * jnp.abs(x))
    polynomial = jnp.full_like(t, _ERFCX[-1])
    for coefficient in _ERFCX[-2::-1]:
        polynomial = polynomial * t + coefficient
    exponential = jnp.exp(-0.5 * x * x)
    tail = 0.5 * exponential * (polynomial * t)
    return jnp.where(x > 0, 1.0 - tail, tail), exponential * (1.0 / math.sqrt(2.0 * math.pi))


def sigmoid_in_kernel(x: jax.Array) -> jax.Array:
    """1 / (1 + 2^(-x log2 e)) by the hardware's exponential and reciprocal, each within two units of fp32's last place.

    Left to the compiler it is 20 instructions, for the sake of subnormal exponentials and of the last bit of a
    division.
    """
    if launch.interpreting():
        return jax.nn.sigmoid(x)
    return ptx(
        "{.reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, 0f3F800000; "
        "rcp.approx.ftz.f32 $0, t;}",
        x,
    )


def value_and_slope(
    gate: jax.Array, activation: Activation, sigmoid: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid
) -> tuple[jax.Array, jax.Array]:
    """(f(gate), f'(gate)) in fp32; the compiler drops the half that is not used. Kernels pass `sigmoid_in_kernel`."""
    if activation == "silu":
        s = sigmoid(gate)
        return gate * s, s * (1.0 + gate * (1.0 - s))
    if activation == "gelu":
        cdf, pdf = normal_cdf_and_pdf(gate)
        return gate * cdf, cdf + gate * pdf
    square = gate * gate
    tanh = jnp.tanh(_SQRT_2_OVER_PI * gate * (1.0 + _CUBIC * square))
    inner_slope = _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * square)
    half_sum = 0.5 * (1.0 + tanh)
    return gate * half_sum, half_sum + 0.5 * gate * (1.0 - tanh * tanh) * inner_slope


def tile_of_program(shape, block):
    """Indices and mask of this program's block; columns run fastest, so neighbours read neighbouring memory."""
    program, column_blocks = pl.program_id(0), launch.cdiv(shape[1], block[1])
    rows = (program // column_blocks) * block[0] + jnp.arange(block[0])
    columns = (program % column_blocks) * block[1] + jnp.arange(block[1])
    tile = (rows[:, None], columns[None, :])
    return tile, launch.in_bounds(shape, *tile)


def places_of_gates(refs: Sequence[Any], tile: Any, width: int) -> list[Any]:
    """Where gate's and up's elements of a tile [.., width] lie, in two refs, or in the halves of one."""
    if len(refs) == 2:
        return [ref.at[tile] for ref in refs]
    rows, columns = tile
    return [refs[0].at[rows, columns], refs[0].at[rows, width + columns]]


def load_wide(places: Sequence[Any], mask: Any) -> tuple[jax.Array, ...]:
    """What lies at each of these places of a kernel, in fp32."""
    return tuple(triton.load(place, mask=mask, other=0.0).astype(jnp.float32) for place in places)


def store_all(places: Sequence[Any], values: Sequence[jax.Array], mask: Any) -> None:
    """Store each value at its place, rounded to what that holds."""
    for place, value in zip(places, values, strict=True):
        triton.store(place, value.astype(place.dtype), mask=mask)


def _forward_kernel(*refs, activation, block):
    *gates, out_ref = refs
    tile, mask = tile_of_program(out_ref.shape, block)
    gate, up = load_wide(places_of_gates(gates, tile, out_ref.shape[1]), mask)
    value, _ = value_and_slope(gate, activation, sigmoid_in_kernel)
    store_all([out_ref.at[tile]], [value * up], mask)


def _backward_kernel(dout_ref, *refs, activation, block):
    """refs: gate and up (one ref or two), their gradients, and h where it is asked for."""
    count, width = len(refs) // 2, dout_ref.shape[1]
    tile, mask = tile_of_program(dout_ref.shape, block)
    places = [dout_ref.at[tile], *places_of_gates(refs[:count], tile, width)]
    dout, gate, up = load_wide(places, mask)
    value, slope = value_and_slope(gate, activation, sigmoid_in_kernel)
    gradients = places_of_gates(refs[count : 2 * count], tile, width)
    store_all(gradients, [dout * up * slope, dout * value], mask)
    store_all([ref.at[tile] for ref in refs[2 * count :]], [value * up] * (len(refs) % 2), mask)


def _block(rows: int, width: int, elements: int, most_columns: int) -> tuple[int, int]:
    """(rows, columns) of a program: columns that divide the width where a fair power of two does, else padded."""
    dividing = width & -width
    columns = min(dividing if dividing >= 256 else launch.next_power_of_2(width), most_columns)
    return min(max(1, elements // columns), launch.next_power_of_2(rows)), columns


def launch_options(name: str, shape: tuple[int, int], dtype: Any) -> tuple[tuple[int], tuple[int, int], int]:
    """(grid, block, warps) of a launch over [rows, width], by what was measured for `name`."""
    rows, width = shape
    elements, most_columns, per_thread = tuned.choice(name, dtype, width) or BLOCK
    block = _block(rows, width, elements, most_columns)
    grid = (launch.cdiv(rows, block[0]) * launch.cdiv(width, block[1]),)
    return grid, block, launch.warps_for(block[0] * block[1], per_thread=per_thread)


def launch_rows(kernel, name, arguments, outputs, aliases, **static):
    """Launch an elementwise kernel, which is given `block` and `static`, over arrays [..., f].

    Arrays that hold gate and up are [..., 2 f]; `outputs` are arrays of the shapes of what the kernel writes.
    """
    leading, dtype = arguments[0].shape[:-1], arguments[0].dtype
    rows, width = math.prod(leading), min(array.shape[-1] for array in (*arguments, *outputs))
    grid, block, num_warps = launch_options(name, (rows, width), dtype)
    results = launch.pallas_call(
        functools.partial(kernel, block=block, **static),
        name=name,
        grid=grid,
        out_shape=tuple(jax.ShapeDtypeStruct((rows, like.shape[-1]), dtype) for like in outputs),
        input_output_aliases=aliases,
        num_warps=num_warps,
    )(*(a.reshape(rows, a.shape[-1]) for a in arguments))
    return tuple(r.reshape(*leading, r.shape[-1]) for r in results)


def launch_forward(kernel: Any, name: str, gates: Sequence[jax.Array], **static: Any) -> jax.Array:
    """h [..., f] of the arrays of `checked_gates`, by an elementwise kernel."""
    width = gates[0].shape[-1] // (3 - len(gates))
    h = jax.ShapeDtypeStruct((*gates[0].shape[:-1], width), gates[0].dtype)
    return launch_rows(kernel, name, gates, (h,), {}, **static)[0]


def gates_in_place(gates: Sequence[jax.Array]) -> dict[int, int]:
    """Aliases of a launch of (D, *gates) whose first outputs are the gates' gradients: each program reads its elements
    before it writes them, so the gradients take the memory of what was saved."""
    return {1 + place: place for place in range(len(gates))}


def gated_activation_forward(
    gate: jax.Array, up: jax.Array, *, activation: Activation, with_kernel: bool
) -> jax.Array:
    """h without a gradient, for ops that hold this one and write their own."""
    if with_kernel and gate.size:
        return launch_forward(_forward_kernel, "gated_activation_forward", (gate, up), activation=activation)
    return gated_activation_reference(gate, up, activation=activation)


def gated_activation_backward(
    dh: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    *,
    activation: Activation,
    with_h: bool,
    with_kernel: bool,
    in_place: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(dgate, dup, h), each [..., f]: both gradients and, where asked for, h again, in one pass over what was saved.

    The kernel writes them over the memory of gate, up and dh where it may: `in_place`.
    """
    if with_kernel and gate.size:
        aliases = {} if not in_place else {1: 0, 2: 1, 0: 2} if with_h else gates_in_place((gate, up))
        arguments = dh, gate, up
        results = launch_rows(
            _backward_kernel,
            "gated_activation_backward",
            arguments,
            (gate, up, *[dh] * with_h),
            aliases,
            activation=activation,
        )
        return results[0], results[1], results[2] if with_h else None
    dtype = gate.dtype
    # The barrier keeps XLA from finding forward's h equal to this one and alive until here.
    dh, gate, up = (a.astype(jnp.float32) for a in jax.lax.optimization_barrier((dh, gate, up)))
    value, slope = value_and_slope(gate, activation)
    h = (value * up).astype(dtype) if with_h else None
    return (dh * up * slope).astype(dtype), (dh * value).astype(dtype), h


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gated_activation(gates, activation):
    return launch_forward(_forward_kernel, "gated_activation_forward", gates, activation=activation)


def _gated_activation_forward(gates, activation):
    gates = named_gates("gated_activation", gates)
    return _gated_activation(gates, activation), gates


def _gated_activation_backward(activation, gates, dout):
    arguments, name = (dout, *gates), "gated_activation_backward"
    aliases = gates_in_place(gates)
    return (launch_rows(_backward_kernel, name, arguments, gates, aliases, activation=activation),)


_gated_activation.defvjp(_gated_activation_forward, _gated_activation_backward)
