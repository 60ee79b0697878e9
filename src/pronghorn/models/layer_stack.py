"""The layers of a segment one after the other, for memory policies that keep residuals in pinned host memory.

A layer is one part, or two: attention, and the feed-forward network.

    forward    a part computes; what it saved leaves for the host meanwhile
    backward   a part is differentiated; what the part below saved comes back meanwhile

What is saved is what `jax.checkpoint` around a layer saves under its policy. `jax.checkpoint` can offload by itself,
but under `lax.scan` an array is then fetched where it is first read, and the device waits for it: on an H100 at 8,192
tokens 1.3 ms for every 64 MiB of a layer of 20 ms. So the gradient of the stack is written here: the backward pass
holds two parts' residuals, those in use and those on their way.

A part's vector-Jacobian product is a pytree of the arrays it needs. Those that came in (weights, angles, segment ids)
are recognised by identity and read again from where they are; the others are the residuals.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pronghorn.models.ordering import same_after, zero_after
from pronghorn.pallas_kernels.launch import Static

# Smaller arrays stay where they are: a transfer costs some microseconds of its own.
SMALLEST_OFFLOADED = 1 << 20

LayerPart = Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerStack:
    """What is static about a segment's layers.

    Attributes:
      layers: of each position of the period, the layer's parts in order: `(state, x, shared, dropout_key, index) -> x`
        under `jax.checkpoint`.
      start, repeats: the index of a layer is start + repeat * len(layers) + position.
      stacked: whether states have a leading axis of `repeats`, which is scanned over.
    """

    layers: tuple[tuple[LayerPart, ...], ...]
    start: int
    repeats: int
    stacked: bool

    def index(self, repeat: Any, position: int) -> Any:
        """Of a layer in the model."""
        return self.start + repeat * len(self.layers) + position

    def parts(self) -> list[tuple[int, LayerPart]]:
        """(position, part) of one period, in order."""
        return [(position, part) for position, parts in enumerate(self.layers) for part in parts]


@dataclasses.dataclass(frozen=True, eq=False)
class _Pullback:
    """How a part's pullback is put together again: `places[i]` is an input of the part, or one of those saved."""

    structure: Any
    places: tuple[tuple[bool, int], ...]  # (is an input, index)


def run_offloaded(stack: LayerStack, x: Any, states: tuple, shared: Any, dropout_key: Any) -> Any:
    """x after all layers; differentiable in x and in every leaf of `states`.

    Args:
      x: `[batch, seq, d]`, or a pytree of what goes from layer to layer.
      states: of each position, the layer's arrays, with a leading axis of `repeats` where stacked.
      shared: what all layers read and nothing is differentiated by.
      dropout_key: None drops nothing.
    """
    return _run(stack, x, states, shared, dropout_key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(stack, x, states, shared, dropout_key):
    def one_period(x, repeat, states):
        for position, part in stack.parts():
            x = part(states[position], x, shared, dropout_key, stack.index(repeat, position))
        return x, ()

    return _loop(stack, one_period, x, states)[0]


def _run_forward(stack, x, states, shared, dropout_key):
    trained = tuple(tuple(leaf.perturbed for leaf in jax.tree.leaves(state)) for state in states)
    values = jax.custom_derivatives.custom_vjp_primal_tree_values
    x, states, shared, dropout_key = values((x, states, shared, dropout_key))
    pullbacks: dict[int, _Pullback] = {}

    def one_period(x, repeat, states):
        saved = []
        for number, (position, part) in enumerate(stack.parts()):
            rest = shared, dropout_key, stack.index(repeat, position)
            x, arrays, pullbacks[number] = _differentiated(part, trained[position], x, states[position], rest)
            saved.append([_to_host(array) for array in arrays])
            if number > 0 and not stack.stacked:
                # Nothing else tells XLA that what the part before saved has left the device by now.
                x, saved[-2] = jax.lax.optimization_barrier((x, saved[-2]))
        return x, tuple(saved)

    y, saved = _loop(stack, one_period, x, states)
    static = Static((trained, tuple(pullbacks[number] for number in range(len(pullbacks)))))
    return y, (saved, states, shared, dropout_key, static)


def _run_backward(stack, residuals, dy):
    # Keys and values that later layers read go along with x; nothing reads them in the end.
    dy = jax.tree.map(_as_array, dy, is_leaf=_is_symbolic_zero)
    saved, states, shared, dropout_key, static = residuals
    trained, pullbacks = static.value
    parts = stack.parts()
    last = len(parts) - 1

    def one_period(carry, repeat, states):
        dx, arrived = carry
        gradients: list[Any] = [None] * len(states)
        done = zero_after(())
        for number in range(last, -1, -1):
            position, arrays = parts[number][0], arrived
            if number > 0:
                dx, arrived = _fetch(stack, dx, saved[number - 1], repeat)
            elif stack.stacked:
                dx, arrived = _fetch(stack, dx, saved[last], jnp.maximum(repeat - 1, 0))
            rest = shared, dropout_key, stack.index(repeat, position)
            state = states[position] if stack.stacked else _after(done, states[position])
            inputs = jax.tree.leaves((state, rest))
            pullback = pullbacks[number]
            found = [(inputs if is_input else arrays)[place] for is_input, place in pullback.places]
            of_trained, dx = jax.tree.unflatten(pullback.structure, found)(dx)
            done = zero_after(of_trained)
            # A leaf that only the layer's other part reads has a gradient of zero here, which XLA drops from the sum.
            others = gradients[position]
            gradients[position] = of_trained if others is None else jax.tree.map(jnp.add, others, of_trained)
        return (dx, arrived), tuple(gradients)

    dy, arrived = _fetch(stack, dy, saved[last], stack.repeats - 1)
    (dx, _), gradients = _loop(stack, one_period, (dy, arrived), states, reverse=True)
    of_states = []
    for state, flags, found in zip(states, trained, gradients, strict=True):
        rest = iter(found)
        leaves = [next(rest) if flag else None for flag in flags]
        of_states.append(jax.tree.unflatten(jax.tree.structure(state), leaves))
    return dx, tuple(of_states), None, None


_run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


def _is_symbolic_zero(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.SymbolicZero)


def _as_array(leaf: Any) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype) if _is_symbolic_zero(leaf) else leaf


def _loop(
    stack: LayerStack, one_period: Callable, carry: Any, states: tuple, *, reverse: bool = False
) -> Any:
    """(carry, outputs): one_period(carry, repeat, states) for every repeat; outputs stacked where layers are."""
    if not stack.stacked:
        return one_period(carry, 0, states)

    def body(carry, scanned):
        repeat, states = scanned
        zero = repeat >> 31  # which XLA does not know
        return one_period(carry, repeat, jax.tree.map(lambda leaf: _by_kernel(leaf, zero), states))

    return jax.lax.scan(body, carry, (jnp.arange(stack.repeats), states), reverse=reverse)


def _by_kernel(leaf: jax.Array, zero: jax.Array) -> jax.Array:
    """A slice of a stack, itself, in a form that XLA takes with a kernel where it would copy: codes and vectors.

    Copies on the device go into the queues of those to the host and back, where a norm's weight or a layer's codes
    would wait for hundreds of MiB that came before them. Matrices are read in place by their products.
    """
    return leaf if leaf.ndim > 1 and leaf.dtype != jnp.uint8 else same_after(zero, leaf)


def _after(zero: jax.Array, state: Any) -> Any:
    """`state`, whose vectors are there no sooner than `zero`.

    Nothing but the optimizer waits for the gradients of a part. XLA would put them off to the end of the program and
    keep what they are products of, 200 MB a layer of an 8B model at 8,192 tokens. So the norms of the part below wait.
    """

    def waits(leaf: Any) -> bool:
        return leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.floating)

    return jax.tree.map(lambda leaf: same_after(zero, leaf) if waits(leaf) else leaf, state)


def _differentiated(part, trained, x, state, rest):
    """(y, residuals, how to put the pullback together) of one part; `rest` are its arguments after x."""
    leaves, structure = jax.tree.flatten(state)

    def call(variables, x):
        variables = iter(variables)
        merged = [next(variables) if flag else leaf for leaf, flag in zip(leaves, trained, strict=True)]
        return part(jax.tree.unflatten(structure, merged), x, *rest)

    y, pull = jax.vjp(call, [leaf for leaf, flag in zip(leaves, trained, strict=True) if flag], x)
    inputs = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves((state, rest)))}
    needed, pull_structure = jax.tree.flatten(pull)
    saved: dict[int, Any] = {id(leaf): leaf for leaf in needed if id(leaf) not in inputs}
    order = {key: place for place, key in enumerate(saved)}
    places = tuple(
        (True, inputs[id(leaf)]) if id(leaf) in inputs else (False, order[id(leaf)]) for leaf in needed
    )
    return y, list(saved.values()), _Pullback(pull_structure, places)


def _moves(array: Any) -> bool:
    return array.size * array.dtype.itemsize >= SMALLEST_OFFLOADED


def _to_host(array):
    return jax.device_put(array, jax.memory.Space.Host) if _moves(array) else array


def _fetch(stack, dx, saved, repeat):
    """(dx, a part's residuals on the device); not before dx, the gradient that the part above starts from."""
    if not stack.stacked or len(stack.layers) > 1:
        dx, saved = jax.lax.optimization_barrier((dx, saved))
    here = saved
    if stack.stacked:
        here = [jax.lax.dynamic_index_in_dim(array, repeat, keepdims=False) for array in saved]
    return dx, [jax.device_put(array, jax.memory.Space.Device) if _moves(array) else array for array in here]
