"""The layers of a decoder in segments, and how a segment runs: forward, and over a cache.

Unrolled, one segment holds every layer and each keeps arrays of its own. Scanned, a segment is one period of the layer
pattern, weights stacked over its repeats, and one `lax.scan`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from pronghorn.models import cache as kv_cache
from pronghorn.models.balance import Balanced, layer_choices
from pronghorn.models.blocks import attention_part, decoder_layer, feed_forward, feed_forward_norm
from pronghorn.models.config import DecoderConfig, LayerKind, LayerRope
from pronghorn.models.expert_layers import SparseMLP
from pronghorn.models.extras import Carried, add_modules, extended_layer
from pronghorn.models.layer_stack import LayerStack, run_offloaded
from pronghorn.models.layers import MLP, DecoderLayer
from pronghorn.models.memory_policies import POLICIES

LayerPart = Literal["layer", "attention", "feed_forward"]


class Segment(nnx.Module):
    """Layers `start .. start + repeats * len(layers)`: a period of the pattern, stacked over its repeats or single.

    The index of a layer is `start + repeat * len(layers) + position`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        start: int,
        period: int,
        repeats: int,
        *,
        stacked: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        leading = (repeats,) if stacked else ()
        self.start = start
        self.repeats = repeats
        self.stacked = stacked
        self.layers = nnx.List([
            DecoderLayer(
                config.of_layer(start + i),
                dtype=dtype,
                rngs=rngs,
                leading=leading,
                kind=config.layer_kinds[start + i],
                mlp=SparseMLP if config.is_sparse(start + i) else MLP,
            )
            for i in range(period)
        ])  # fmt: skip
        for i, layer in enumerate(self.layers):
            add_modules(layer, config.of_layer(start + i), dtype=dtype, rngs=rngs, leading=leading)


def plan_segments(kinds: tuple[Any, ...]) -> tuple[tuple[int, int, int], ...]:
    """Cut a layer pattern into (start, period, repeats) with the least to compile: one body a period entry.

    Five sliding and one full, four times and two more sliding: (0, 6, 4), (24, 1, 2).
    """
    count = len(kinds)
    # best[i] = (cost, plan) for kinds[i:]; a segment costs its period, and one for the loop.
    best: list[tuple[int, tuple[tuple[int, int, int], ...]]] = [(0, ())] * (count + 1)
    for start in range(count - 1, -1, -1):
        options = []
        for period in range(1, count - start + 1):
            end = start + period
            while kinds[end : end + period] == kinds[start : start + period]:
                end += period
            rest_cost, rest = best[end]
            options.append((period + 1 + rest_cost, ((start, period, (end - start) // period), *rest)))
        # Of equal costs the longest first segment, of the shortest period.
        best[start] = min(options, key=lambda option: (option[0], -option[1][0][1] * option[1][0][2]))
    return best[0][1]


def stream_of(carried: Any) -> jax.Array:
    """The residual stream of what goes from layer to layer: itself, or one with something beside it."""
    return carried.stream if isinstance(carried, Carried | Balanced) else carried


def _inputs_of(segment: Segment, layer_inputs: jax.Array | None, position: int) -> jax.Array | None:
    """The inputs of the layers at a position of the period, stacked where the layers are."""
    if layer_inputs is None:
        return None
    first = segment.start + position
    return (
        layer_inputs[first :: len(segment.layers)][: segment.repeats]
        if segment.stacked
        else layer_inputs[first]
    )


def _run_layer(
    state: Any,
    x: Any,
    shared: Any,
    dropout_key: jax.Array | None,
    index: Any,
    *,
    graph: Any,
    config: DecoderConfig,
    pattern: tuple[LayerKind, LayerRope],
    tile_tokens: int | None,
    part: LayerPart,
):
    """The residual stream after a layer, or after a part of it; with extras, what goes on to the next layer.

    `state` is the layer's, and the input of its own where there are any.
    """
    if isinstance(x, Balanced):
        same: dict[str, Any] = {
            "graph": graph,
            "config": config,
            "pattern": pattern,
            "tile_tokens": tile_tokens,
        }
        return _run_balanced_layer(state, x, shared, dropout_key, index, part=part, **same)
    kind, layer_rope = pattern
    state, layer_input = state
    angles, (segment_ids, chunks), query_scale, _ = shared
    seen = chunks if kind == "chunked" else segment_ids
    query_scale = query_scale if layer_rope in config.query_scale_ropes else None
    key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
    cos, sin = angles[layer_rope]
    layer = nnx.merge(graph, state)
    options: dict[str, Any] = {"config": config, "kind": kind, "dropout_key": key}
    if config.extras is not None:
        return extended_layer(layer, x, layer_input, cos, sin, seen, tile_tokens=tile_tokens, **options)
    if part == "feed_forward":
        return feed_forward(layer, x, x, config=config, dropout_key=key, tile_tokens=tile_tokens)
    options["query_scale"] = query_scale
    if part == "attention":
        return attention_part(layer, x, cos, sin, seen, **options)[0]
    return decoder_layer(layer, x, cos, sin, seen, tile_tokens=tile_tokens, **options)


def _run_balanced_layer(state, x, shared, dropout_key, index, *, graph, config, part, **options):
    """`_run_layer` in its two parts, with the choices of the layer's experts added up between them."""
    run: Callable[..., jax.Array] = functools.partial(_run_layer, graph=graph, config=config, **options)
    stream = x.stream
    if part != "feed_forward":
        stream = run(state, stream, shared, dropout_key, index, part="attention")
    if part == "attention":
        return x._replace(stream=stream)
    layer = nnx.merge(graph, state[0])
    chosen, probabilities = x.chosen, x.probabilities
    if isinstance(layer.mlp, SparseMLP):
        norm = feed_forward_norm(layer, config)
        added = layer_choices(layer, norm, stream, shared[-1], config=config)
        chosen, probabilities = chosen + added[0], probabilities + added[1]
    return Balanced(
        run(state, stream, shared, dropout_key, index, part="feed_forward"), chosen, probabilities
    )


def run_segment(
    segment: Segment,
    x: Any,
    layer_inputs: jax.Array | None,
    shared: tuple[Any, ...],
    dropout_key: jax.Array | None,
    *,
    config: DecoderConfig,
    memory_policy: str,
    mlp_tile_tokens: int | None,
    return_layers: bool,
) -> tuple[jax.Array, list[jax.Array]]:
    """All layers of a segment; `shared` is (angles by rope, ids of segments and of chunks, factors of the queries,
    which tokens count where x is `Balanced`). The outputs are empty unless asked for."""
    split = [nnx.split(layer) for layer in segment.layers]
    period, policy = len(split), POLICIES[memory_policy]
    policy = policy if config.latent is None else policy.of_latents()
    # A feed-forward network that reads the stream after attention is a part of its own: that stream is its input.
    halves = policy.offloaded and bool(policy.saved) and not return_layers
    halves &= config.block not in ("parallel", "single") and config.extras is None
    parts: tuple[LayerPart, ...] = ("attention", "feed_forward") if halves else ("layer",)

    def part_of(position: int, part: LayerPart) -> Callable[..., jax.Array]:
        run: Callable[..., jax.Array] = functools.partial(
            _run_layer,
            graph=split[position][0],
            config=config.of_layer(segment.start + position),
            pattern=config.layer_pattern[segment.start + position],
            tile_tokens=mlp_tile_tokens,
            part=part,
        )
        if policy.saved is None:
            return run
        # Inside of a scan nothing can be merged across the loop; outside XLA would undo the recomputation.
        return jax.checkpoint(run, policy=policy.saveable, prevent_cse=not segment.stacked)

    layers = tuple(tuple(part_of(position, part) for part in parts) for position in range(period))
    states = tuple(
        (state, _inputs_of(segment, layer_inputs, position)) for position, (_, state) in enumerate(split)
    )
    if policy.offloaded and not return_layers:
        stack = LayerStack(layers, segment.start, segment.repeats, segment.stacked)
        return run_offloaded(stack, x, states, shared, dropout_key), []

    def one_period(x, scanned):
        repeat, states = scanned
        outputs = []
        for position, ((run,), state) in enumerate(zip(layers, states, strict=True)):
            x = run(state, x, shared, dropout_key, segment.start + repeat * period + position)
            outputs.append(stream_of(x))
        return x, tuple(outputs) if return_layers else ()

    if not segment.stacked:
        x, outputs = one_period(x, (0, states))
        return x, list(outputs)
    x, outputs = jax.lax.scan(one_period, x, (jnp.arange(segment.repeats), states))
    return x, [outputs[p][r] for r in range(segment.repeats) for p in range(period)] if return_layers else []


def decode_segment(
    segment: Segment,
    x: Any,
    layer_inputs: jax.Array | None,
    cache: Any,
    angles: Any,
    positions: jax.Array,
    *,
    config: DecoderConfig,
) -> tuple[Any, Any]:
    split = [nnx.split(layer) for layer in segment.layers]

    def one_period(x, scanned):
        states, caches = scanned
        filled = []
        for position, ((graph, _), state, layer_cache) in enumerate(zip(split, states, caches, strict=True)):
            kind, layer_rope = config.layer_pattern[segment.start + position]
            state, layer_input = state
            options: dict[str, Any] = {"config": config.of_layer(segment.start + position), "kind": kind}
            layer, given = nnx.merge(graph, state), (layer_cache, angles[layer_rope], positions)
            if config.extras is None:
                x, layer_cache = kv_cache.cached_decoder_layer(layer, x, *given, **options)
            else:
                x, layer_cache = kv_cache.cached_extended_layer(layer, x, layer_input, *given, **options)
            filled.append(layer_cache)
        return x, tuple(filled)

    states = tuple(
        (state, _inputs_of(segment, layer_inputs, position)) for position, (_, state) in enumerate(split)
    )
    if segment.stacked:
        return jax.lax.scan(one_period, x, (states, cache))
    return one_period(x, (states, cache))
