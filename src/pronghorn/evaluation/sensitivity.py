"""What it costs to quantise each linear weight of a model: KL on the logits, one module at a time.

    cost(m, k) = mean_t KL_t        KL_t = Σ_v p_t(v) (log p_t(v) - log q_t(v))

with p the predictions of the model as it is and q those of the same model with module m alone in kind k, at every
position t of a calibration text, in fp32. Costs of single modules nearly add up to that of quantising them all, which
errors of weights or activations do not predict, so a choice within a budget can be made on them
(`quantization.recipe.allocate`).

Layers below the module are not run again: the text's hidden states in front of each layer are kept as the measurement
climbs, and each layer is one call of one compiled program, the same for every layer of its kind. A measurement so
costs half a forward pass and the head.

Source of the method: EXL2's and EXL3's measured conversion (github.com/turboderp-org/exllamav3), which swaps modules
one at a time and compares logits.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pronghorn.errors import InputError
from pronghorn.evaluation.losses import KLDivergence
from pronghorn.models import rope
from pronghorn.models.blocks import decoder_layer
from pronghorn.models.decoder import Decoder, chunk_ids
from pronghorn.models.families import family_named
from pronghorn.models.parameters import named_parameters
from pronghorn.quantization import QuantizationConfig, is_quantized, quantize
from pronghorn.quantization.quantize_model import choose

_TILE = 128  # positions whose logits are computed at a time

Costs = dict[str, dict[str, float]]


class Sensitivity:
    """A model and a text, to measure on.

    Args:
      model: in fp32, layers unrolled, without an adapter and not quantised.
      input_ids: int `[rows, tokens]` of the calibration text, no padding. The predictions are held in fp32: rows
        times tokens times the vocabulary.

    Raises:
      InputError: another model.
    """

    def __init__(self, model: Decoder, input_ids: np.ndarray):
        if model.adapter is not None or any(segment.stacked for segment in model.segments):
            raise InputError("sensitivity: measure a model without an adapter, loaded with unrolled layers.")
        if model.config.extras is not None:
            raise InputError(
                f"sensitivity: layers of {model.config.family} read more than the residual stream, and none can be "
                "measured alone; quantise the whole model."
            )
        if any(is_quantized(p.variable.get_value()) for p in named_parameters(model).values()):
            raise InputError("sensitivity: the model is quantised already; give the 16-bit one.")
        self.model = model
        self.input_ids = jnp.asarray(input_ids, jnp.int32)
        self._layers = [nnx.split(layer) for layer in model.segments[0].layers]
        self._ends = nnx.split(model)
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape)
        self._angles = rope.layer_angles(model.config, positions)
        self._query_scale = rope.query_scale(model.config, positions)
        self._chunks = chunk_ids(model.config, positions, None)
        names = family_named(model.config.family).tensor_names(model.config)
        chosen = choose(named_parameters(model), names, QuantizationConfig())
        self._places = {names[ours].removesuffix(".weight"): _place(ours) for ours in chosen}
        with jax.default_matmul_precision("highest"):
            self._first = _embed(*self._ends, self.input_ids)
            self._reference = _log_probabilities(*self._ends, self._above(0, self._first))

    @property
    def modules(self) -> dict[str, tuple[int, ...]]:
        """{module: shape of its weight} of everything that can be measured, layer by layer."""
        return {module: self._weight(module).shape for module in self._places}

    def measure(
        self,
        wanted: Iterable[tuple[str, QuantizationConfig]],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Costs:
        """{module: {kind: KL in nats a token}} of single modules, each alone in the model.

        Args:
          wanted: (module, how it is quantised).
          progress: called with how many are done and how many there are.
        """
        by_layer: dict[int, list[tuple[str, QuantizationConfig]]] = {}
        for module, how in wanted:
            by_layer.setdefault(self._places[module][0], []).append((module, how))
        total, done = sum(map(len, by_layer.values())), 0
        costs: Costs = {}
        x = self._first
        with jax.default_matmul_precision("highest"):
            for index in range(max(by_layer, default=-1) + 1):
                for module, how in by_layer.get(index, []):
                    y = self._run(index, x, {self._places[module][1]: _rounded(self._weight(module), how)})
                    costs.setdefault(module, {})[how.kind] = self._divergence(self._above(index + 1, y))
                    done += 1
                    if progress is not None:
                        progress(done, total)
                x = self._run(index, x, {})
        return costs

    def joint(self, ways: Mapping[str, QuantizationConfig]) -> KLDivergence:
        """How far the model is from itself with all these modules quantised together."""
        x = self._first
        with jax.default_matmul_precision("highest"):
            for index in range(len(self._layers)):
                changed = {
                    place: _rounded(self._weight(module), ways[module])
                    for module, (layer, place) in self._places.items()
                    if layer == index and module in ways
                }
                x = self._run(index, x, changed)
            divergence, agrees = map(np.asarray, _compare(*self._ends, x, self._reference))
        return KLDivergence(
            mean=float(divergence.mean(dtype=np.float64)),
            p99=float(np.quantile(divergence, 0.99)),
            maximum=float(divergence.max()),
            top1_agreement=float(agrees.mean()),
            positions=divergence.size,
        )

    def _weight(self, module: str) -> jax.Array:
        layer, path = self._places[module]
        return _at(self._layers[layer][1], path).get_value()

    def _run(self, index: int, x: jax.Array, changed: Mapping[tuple[str, ...], jax.Array]) -> jax.Array:
        """One layer, with other weights at some of its places."""
        graph, state = self._layers[index]
        if changed:
            state = jax.tree.map(lambda leaf: leaf, state)
            for path, weight in changed.items():
                _at(state, path).set_value(weight)
        kind, layer_rope = self.model.config.layer_pattern[index]
        scaled = layer_rope in self.model.config.query_scale_ropes
        angles = (*self._angles[layer_rope], self._query_scale if scaled else None)
        seen = self._chunks if kind == "chunked" else None
        return _layer(graph, state, x, angles, seen, config=self.model.config, kind=kind)

    def _above(self, index: int, x: jax.Array) -> jax.Array:
        for upper in range(index, len(self._layers)):
            x = self._run(upper, x, {})
        return x

    def _divergence(self, x: jax.Array) -> float:
        return float(np.asarray(_compare(*self._ends, x, self._reference)[0]).mean(dtype=np.float64))


def _place(name: str) -> tuple[int, tuple[str, ...]]:
    """(layer, path in it) of "layers.3.mlp.up_proj.weight"."""
    _, layer, *path = name.split(".")
    return int(layer), tuple(path)


def _at(state: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, state)


@functools.partial(jax.jit, static_argnums=1)
def _rounded(weight: jax.Array, how: QuantizationConfig) -> jax.Array:
    return quantize(weight, how).dequantize().astype(weight.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph: Any, state: Any, input_ids: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).embed(input_ids)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("config", "kind"))
def _layer(
    graph: Any, state: Any, x: jax.Array, angles: Any, seen: Any, *, config: Any, kind: Any
) -> jax.Array:
    cos, sin, query_scale = angles
    layer = nnx.merge(graph, state)
    return decoder_layer(layer, x, cos, sin, seen, config=config, kind=kind, query_scale=query_scale)


def _tiles(x: jax.Array) -> tuple[jax.Array, int]:
    """`[tiles, _TILE, ..]` of `[rows, tokens, ..]`, the last one padded; and how many positions are real."""
    flat = x.reshape(-1, x.shape[-1])
    count = flat.shape[0]
    return jnp.pad(flat, ((0, -count % _TILE), (0, 0))).reshape(-1, _TILE, x.shape[-1]), count


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(graph: Any, state: Any, x: jax.Array) -> jax.Array:
    model = nnx.merge(graph, state)
    return jax.lax.map(lambda rows: jax.nn.log_softmax(model.logits(model.norm(rows))), _tiles(x)[0])


@functools.partial(jax.jit, static_argnums=0)
def _compare(graph: Any, state: Any, x: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL fp32 and whether both prefer the same token, of each position."""
    model = nnx.merge(graph, state)
    tiles, count = _tiles(x)

    def one_tile(both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, log_p = both
        log_q = jax.nn.log_softmax(model.logits(model.norm(rows)))
        # a token of probability 0 in both adds nothing; 0 * inf would be NaN
        terms = jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * (log_p - log_q))
        return jnp.sum(terms, axis=-1), jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)

    divergence, agrees = jax.lax.map(one_tile, (tiles, reference))
    return divergence.reshape(-1)[:count], agrees.reshape(-1)[:count]
