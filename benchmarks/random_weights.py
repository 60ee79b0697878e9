"""A model of true shape with random weights: one weight at a time is drawn, in parts, and quantised if asked for."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pronghorn.models.config import DecoderConfig
from pronghorn.models.decoder import Decoder, LayerLayout
from pronghorn.models.families import family_named
from pronghorn.models.layers import INITIALIZER_RANGE
from pronghorn.models.parameters import assign, named_parameters
from pronghorn.quantization import QuantizationConfig, quantize
from pronghorn.quantization.mxfp4 import MXFP4Array, empty_like_mxfp4
from pronghorn.quantization.quantize_model import choose, empty_like, make_abstract

_LARGEST_DRAWN = 1 << 26


def random_model(config: DecoderConfig, kind: str | None, *, dtype: Any, layers: LayerLayout) -> Decoder:
    """Linears inside of layers of one kind ("nf4", None for `dtype`), the rest in `dtype`; norms multiply by one."""
    model, how = _abstract(config, kind, dtype, layers)
    sizes = {name: parameter.shape for name, parameter in named_parameters(model).items()}
    assign(model, _Drawn(sizes, how, dtype, 1.0 - config.norm_weight_offset))
    return model


def abstract_model(config: DecoderConfig, kind: str | None, *, dtype: Any, layers: LayerLayout) -> Decoder:
    """`random_model` with shapes in the place of arrays: to compile for before anything is on the device."""
    return _abstract(config, kind, dtype, layers)[0]


def _abstract(
    config: DecoderConfig, kind: str | None, dtype: Any, layers: LayerLayout
) -> tuple[Decoder, dict[str, QuantizationConfig]]:
    """The model of shapes, and which of its weights are quantised how."""
    model = Decoder.abstract(config, dtype=dtype, layers=layers)
    if kind is None:
        return model, {}
    parameters = named_parameters(model)
    how = choose(parameters, family_named(config.family).tensor_names(config), QuantizationConfig(kind))  # type: ignore[arg-type]
    make_abstract(parameters, {name: empty_like(parameters[name].shape, dtype, how[name]) for name in how})
    return model, how


def shapes_of(tree: Any) -> Any:
    """What a program that is compiled for `tree` takes for granted of it; for arrays and shapes alike."""
    return jax.tree.structure(tree), [(leaf.shape, jnp.dtype(leaf.dtype)) for leaf in jax.tree.leaves(tree)]


def require_shapes(tree: Any, compiled_for: Any, model: str) -> None:
    """Refuse to run a program of shapes, `shapes_of` of its arguments, with others."""
    if shapes_of(tree) != compiled_for:
        raise RuntimeError(f"{model}: the drawn weights are not those that the step was compiled for.")


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(seed: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    # In parts: the random bits of a large embedding are more than the memory that a step's peak leaves.
    parts = math.gcd(shape[0], 16) if math.prod(shape) > _LARGEST_DRAWN else 1
    size = (shape[0] // parts, *shape[1:])

    def part(key: jax.Array) -> jax.Array:
        return (INITIALIZER_RANGE * jax.random.normal(key, size, jnp.float32)).astype(dtype)

    return jax.lax.map(part, jax.random.split(jax.random.key(seed), parts)).reshape(shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mxfp4(seed: Any, shape: tuple[int, ...], dtype: Any) -> MXFP4Array:
    """Such weights are never made of others: random codes, scaled to a deviation of about INITIALIZER_RANGE."""
    form = empty_like_mxfp4(shape, dtype)
    codes = jax.random.bits(jax.random.key(seed), form.codes.shape, jnp.uint8)
    scales = jnp.full(form.scales.shape, 127 + round(math.log2(INITIALIZER_RANGE / 2.9)), jnp.uint8)
    return MXFP4Array(codes, scales, form.dtype_name)


class _Drawn(Mapping[str, Any]):
    """Each weight drawn, and quantised, when it is asked for; norms are `norm`, biases and sinks zeros, and a delta net
    starts as `layers.DeltaNet` does."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        how: Mapping[str, QuantizationConfig],
        dtype: Any,
        norm: float,
    ):
        self._shapes, self._how, self._dtype, self._norm = shapes, how, dtype, norm

    def __getitem__(self, name: str) -> Any:
        shape = self._shapes[name]
        if name.endswith(".A_log"):
            rates = jnp.linspace(1.0, 16.0, shape[-1], dtype=jnp.float32)
            return jnp.broadcast_to(jnp.log(rates), shape).astype(self._dtype)
        if name.endswith((".dt_bias", ".linear_attn.norm.weight")):  # this norm's weight is the scale itself
            return jnp.ones(shape, self._dtype)
        if name.endswith(("bias", "sinks")):
            return jnp.zeros(shape, self._dtype)
        if len(shape) == 1:
            return jnp.full(shape, self._norm, self._dtype)
        seed, how = list(self._shapes).index(name), self._how.get(name)
        if how is not None and how.kind == "mxfp4":
            return _mxfp4(seed, shape, self._dtype)
        weight = _normal(seed, shape, self._dtype)
        return weight if how is None else quantize(weight, how)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
