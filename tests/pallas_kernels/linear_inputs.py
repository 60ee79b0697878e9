"""Arrays for the ops that hold linear layers with adapters."""

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.pallas_kernels.stacked_linears import LinearWeights
from tests.pallas_kernels.comparison import normal
from tests.pallas_kernels.test_lora_linear import Int8Weight


def linear(seed, inputs, outputs, *, rank=0, bias=False, dtype="float32"):
    """One layer; rank 0 for one without an adapter. A and B are fp32 masters."""
    return LinearWeights(
        normal(seed, (outputs, inputs), dtype, scale=inputs**-0.5),
        normal(seed + 1, (rank, inputs), scale=inputs**-0.5) if rank else None,
        normal(seed + 2, (outputs, rank)) if rank else None,
        normal(seed + 3, (outputs,), dtype) if bias else None,
    )


def quantized(layer):
    """The same layer with an int8 weight, and its twin with that weight dequantised."""
    codes = np.random.default_rng(7).integers(-127, 128, layer.weight.shape)
    weight = Int8Weight(jnp.asarray(codes, jnp.int8), jnp.linspace(0.001, 0.002, layer.weight.shape[0]))
    return layer._replace(weight=weight), layer._replace(weight=weight.dequantize())


def split(layers, fields):
    """(the arrays of these fields of every layer, a function that puts others in their place)."""
    flat = [getattr(layer, f) for layer in layers for f in fields if getattr(layer, f) is not None]

    def put(values):
        values = iter(values)
        return tuple(
            layer._replace(**{f: next(values) for f in fields if getattr(layer, f) is not None})
            for layer in layers
        )

    return flat, put


def names(first, count):
    """Labels of a comparison: those given, then one for each of `count` arrays."""
    return (*first, *(f"gradient {i}" for i in range(count)))


def saved_of_tokens(function, tokens, *arguments):
    """The sorted shapes [tokens, ..] that `function` keeps from forward to backward."""
    _, pullback = jax.vjp(function, *arguments)
    return sorted(leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.shape[:1] == (tokens,))
