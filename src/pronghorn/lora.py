"""Low-rank adapters (Hu et al. 2021, "LoRA", https://arxiv.org/abs/2106.09685) as pytrees.

A linear with an adapter computes Y = X Wᵀ + s (X Aᵀ) Bᵀ with A `[r, in]` and B `[out, r]` in fp32 and
s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732). An embedding adds
s A[:, id]ᵀ Bᵀ with A `[r, vocab]` and B `[d, r]`. W never changes; merging writes W + s B A. With DoRA the rows of
that sum are given the lengths m, see `pallas_kernels.dora`.

A functional script needs `split` and `merge` only: they turn a model into a static graph, the trainable leaves and the
frozen ones, and back.

Tied embeddings. Where a checkpoint shares one tensor between `embed_tokens` and `lm_head`, an adapter on one of the
two leaves the other as it was, while training and after merging: the merged model is untied, with both tensors
written and `tie_word_embeddings` false.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pronghorn.errors import InputError
from pronghorn.fingerprint import base_hash
from pronghorn.lora_config import (
    ALL_LINEAR as ALL_LINEAR,
)
from pronghorn.lora_config import (
    EMBEDDING,
    HEAD,
    AdapterInfo,
    LoRAConfig,
    NewTokens,
    adapter_scale,
)
from pronghorn.lora_sites import (
    MAGNITUDE,
    STARTED,
    Factors,
    Site,
    attribute_names,
    factor_names,
    select,
    sites,
)
from pronghorn.lora_start import refuse_rank, start_factors
from pronghorn.models.config import DecoderConfig
from pronghorn.models.decoder import Decoder
from pronghorn.models.layers import Constant, Embedding, Linear, LoRAParam
from pronghorn.pallas_kernels.dora import row_norms


def add_lora(
    model: Decoder, config: LoRAConfig | None = None, *, original: Callable[[str], Any] | None = None
) -> Decoder:
    """A new model with adapters; it shares the base weights' arrays with `model`, which stays as it is.

    How they start is `LoRAConfig.init`; every start but "loftq" leaves the model's function unchanged.

    Args:
      original: for "loftq": gives the weight `[out, in]` of a site such as "layers.0.mlp.up_proj" before it was
        quantised (`converters.huggingface.original_weights`).

    Raises:
      InputError: `model` has adapters already, or `config` asks for what it lacks.
    """
    config = config or LoRAConfig()
    if model.adapter is not None:
        raise InputError(
            "add_lora: the model has an adapter already; merge it with merge_lora first, or go on with it."
        )
    names, found = select(model, config), sites(model)
    key = jax.random.key(config.seed)
    factors = {}
    alphas = []
    usual = float(config.rank if config.alpha is None else config.alpha)
    for name in names:
        site = found[name]
        rank, alpha = config.rank_and_alpha(name, site.layer)
        if alpha != usual:
            alphas.append((name, alpha))
        scale = adapter_scale(rank, alpha, config.use_rslora)
        factors[name] = _start(
            site, config, rank, scale, jax.random.fold_in(key, zlib.crc32(name.encode())), original
        )
    info = AdapterInfo(
        rank=config.rank,
        alpha=usual,
        use_rslora=config.use_rslora,
        dropout=config.dropout,
        targets=(config.targets,) if isinstance(config.targets, str) else config.targets,
        layers=config.layers,
        base_hash=base_hash(model),
        alpha_pattern=tuple(alphas),
        use_dora=config.use_dora,
        init=config.init,
    )
    return attach(model, factors, info)


def _start(
    site: Site,
    config: LoRAConfig,
    rank: int,
    scale: float,
    key: jax.Array,
    original: Callable[[str], Any] | None,
) -> Factors:
    weight = None if isinstance(site.module, Embedding) else site.module.weight.get_value()
    if weight is not None and site.index is not None and not is_abstract(site):
        weight = jax.tree.map(lambda leaf: leaf[site.index], weight)
    if config.use_dora and site.name in (HEAD, EMBEDDING):
        raise InputError(
            f"lora.use_dora: {site.name} cannot have it; leave it out of lora.targets, or use_dora=false."
        )
    if site.experts and (config.use_dora or config.dropout):
        option = "use_dora" if config.use_dora else "dropout"
        raise InputError(
            f"lora.{option}: {site.name} cannot have it; leave experts out of lora.targets, or lora.{option}."
        )
    if is_abstract(site):
        fan_out, fan_in = site.shape
        if weight is not None:
            refuse_rank(config, site.shape, rank)
        leading = site.experts
        shapes = [
            jax.ShapeDtypeStruct((*leading, *s), jnp.float32)
            for s in ((rank, fan_in), (fan_out, rank), (fan_out,))
        ]
        in_base = weight is not None and config.init not in ("kaiming", "gaussian", "loftq")
        start_shapes = (shapes[0], shapes[1]) if in_base else None
        return Factors(shapes[0], shapes[1], scale, shapes[2] if config.use_dora else None, start_shapes)
    if site.experts:
        keys = jax.random.split(key, site.experts)
        stack = jnp.asarray(original(site.name)) if config.init == "loftq" and original is not None else None

        def start_one(key, one, own):
            return start_factors(
                config, site.shape, one, rank, scale, key, None if own is None else lambda: own
            )

        a, b, start = jax.vmap(start_one)(keys, weight, stack)
        return Factors(a, b, scale, None, start)
    before = None if original is None else lambda: original(site.name)
    a, b, start = start_factors(config, site.shape, weight, rank, scale, key, before)
    magnitude = row_norms(weight) if config.use_dora and weight is not None else None
    return Factors(a, b, scale, magnitude, start)


def is_abstract(site: Site) -> bool:
    """Whether the model holds shapes instead of arrays, as the planner's does."""
    return any(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(site.module.weight.get_value())
    )


def attach(
    model: Decoder,
    factors: Mapping[str, Factors],
    info: AdapterInfo,
    new_rows: Mapping[str, jax.Array] | None = None,
) -> Decoder:
    """A new model that shares `model`'s base arrays and has the given factors at the given sites.

    Where the model was given new tokens, their rows of embedding and head are trained too: they start at `new_rows`
    (fp32 `[count, d]` for "embed_tokens" and "lm_head"), or as they are in the weights.

    Where layers are stacked, layers of the stack without factors get zeros for both A and B. Both gradients are zero
    then (each is a product with the other factor), so such a layer stays exactly as it was.

    Raises:
      InputError: layers of one stack with different ranks or scales, or of which only some have DoRA, which a stack
        cannot hold; an adapter on an embedding or head that has new tokens.
    """
    if model.new_tokens is not None and (HEAD in factors or EMBEDDING in factors):
        raise InputError(
            f"lora.targets: {HEAD} and {EMBEDDING} cannot have an adapter beside the trained rows of new tokens; leave "
            "them out, or train every weight with lora: null."
        )
    model = shallow_copy(model)
    groups: dict[int, list[Site]] = {}
    for site in sites(model).values():
        groups.setdefault(id(site.module), []).append(site)
    for group in groups.values():
        present = [site for site in group if site.name in factors]
        if not present:
            continue
        module, first = present[0].module, factors[present[0].name]
        if any(
            (f.a.shape, f.scale) != (first.a.shape, first.scale) for f in (factors[s.name] for s in present)
        ):
            raise InputError(
                f"the adapter of {present[0].name} differs in rank or scale from another layer's, which stacked "
                'layers cannot hold; load the model with layers="unrolled".'
            )
        stacked = present[0].index is not None
        if first.magnitude is not None and len(present) < len(group):
            raise InputError(
                f"lora.use_dora: only some of the layers stacked with {present[0].name} have an adapter, which stacked "
                'layers cannot hold; load the model with layers="unrolled".'
            )
        if stacked:
            first = _stack_factors([factors.get(site.name) for site in group], first)
        out_axis, in_axis = module.weight.get_metadata()["logical_axes"][-2:]
        if isinstance(module, Embedding):
            out_axis, in_axis = in_axis, out_axis
        leading = ("layers",) * stacked + ("experts",) * len(present[0].experts)
        name_a, name_b = factor_names(module)
        setattr(module, name_a, LoRAParam(first.a, logical_axes=(*leading, "rank", in_axis)))
        setattr(module, name_b, LoRAParam(first.b, logical_axes=(*leading, out_axis, "rank")))
        if first.magnitude is not None:
            setattr(module, MAGNITUDE, LoRAParam(first.magnitude, logical_axes=(*leading, out_axis)))
        if first.start is not None:
            a0, b0 = first.start
            setattr(module, STARTED[0], Constant(a0, logical_axes=(*leading, "rank", in_axis)))
            setattr(module, STARTED[1], Constant(b0, logical_axes=(*leading, out_axis, "rank")))
        module.lora_scale = first.scale
        module.lora_dropout = info.dropout
        if isinstance(module, Linear) and present[0].name == HEAD:
            model.lm_head = module  # in a tied model the head was made by `tied_head`
    if model.new_tokens is not None:
        attach_new_rows(model, new_rows)
    model.adapter = info
    return model


def attach_new_rows(model: Decoder, new_rows: Mapping[str, jax.Array] | None = None) -> None:
    """Make the rows of the model's new tokens trainable, in place; see `attach`."""
    tokens: NewTokens = model.new_tokens
    model.embed_tokens.first_new = tokens.first
    modules: dict[str, Linear | Embedding] = {EMBEDDING: model.embed_tokens}
    if not model.config.tie_word_embeddings and model.lm_head is not None:
        modules[HEAD] = model.lm_head
    for name, module in modules.items():
        if new_rows is not None and name not in new_rows:
            continue
        weight = module.weight.get_value()
        shape = (tokens.count, weight.shape[1])
        rows: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
        if new_rows is not None:
            rows = new_rows[name]
        elif not isinstance(weight, jax.ShapeDtypeStruct):
            rows = weight[tokens.first : tokens.first + tokens.count].astype(jnp.float32)
        setattr(module, "lora_new_rows", LoRAParam(rows, logical_axes=("new_tokens", "hidden")))  # noqa: B010


def _stack_factors(parts: Sequence[Factors | None], like: Factors) -> Factors:
    """The factors of all layers of a stack in one; zeros for a layer without."""
    leaves, structure = jax.tree.flatten(like._replace(scale=None))
    given = [None if part is None else jax.tree.leaves(part._replace(scale=None)) for part in parts]
    stacked = [_stack([None if g is None else g[i] for g in given], leaf) for i, leaf in enumerate(leaves)]
    joined: Factors = jax.tree.unflatten(structure, stacked)
    return joined._replace(scale=like.scale)


def _stack(parts: Sequence[Any], like: Any) -> Any:
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(parts), *like.shape), like.dtype)
    return jnp.stack([jnp.zeros_like(like) if part is None else part for part in parts])


def shallow_copy(model: Decoder) -> Decoder:
    """A new module tree with new variables around the same arrays."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))


def split(model: Decoder) -> tuple[Any, Any, Any]:
    """(graph, trainable, frozen): the adapters are trainable where there are any, else every parameter that is not
    quantised (full fine-tuning). `graph` is static and hashable; the other two are pytrees of arrays."""
    adapted = any(site.adapted for site in sites(model).values())
    chosen = LoRAParam if adapted else _trainable_in_full
    graph, *states = nnx.split(model, chosen, ...)
    return graph, states[0], states[1]


def _trainable_in_full(path: Any, value: Any) -> bool:
    return isinstance(value, nnx.Param) and not hasattr(value.get_value(), "dequantize")


def merge(graph: Any, trainable: Any, frozen: Any) -> Decoder:
    """The model that `split` took apart, with these leaves. Cheap, and made to be traced."""
    return nnx.merge(graph, trainable, frozen)


@jax.jit
def _merged(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float, magnitude: Any = None) -> jax.Array:
    delta = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
    merged = weight.astype(jnp.float32) + scale * delta
    if magnitude is not None:
        merged *= (magnitude / jnp.linalg.norm(merged, axis=1))[:, None]
    return merged.astype(weight.dtype)


def merged_weight(site: Site) -> jax.Array:
    """W + s B A of one site, computed in fp32 and rounded once to the dtype of W; W itself without an adapter.

    A quantised W is dequantised first: the result is never quantised again.
    """
    weight = site.module.weight.get_value()
    if site.index is not None:
        weight = jax.tree.map(lambda leaf: leaf[site.index], weight)
    if hasattr(weight, "dequantize"):
        weight = weight.dequantize()
    if site.new_rows is not None:
        rows = site.new_rows.get_value().astype(weight.dtype)
        weight = jax.lax.dynamic_update_slice_in_dim(weight, rows, site.first_new, axis=0)
    factors = site.factors
    if factors is None:
        return weight
    a, b, scale, magnitude, _ = factors
    if isinstance(site.module, Embedding):
        a, b = b.T, a.T  # the delta of [vocab, d] is (B A)ᵀ = Aᵀ Bᵀ
    return _merged(weight, a, b, scale, magnitude)


def merged_config(model: Decoder) -> DecoderConfig:
    """The architecture after merging: untied where an adapter made embedding and head differ."""
    places = sites(model)
    touched = places[HEAD].adapted or places[EMBEDDING].adapted
    if model.config.tie_word_embeddings and touched:
        return dataclasses.replace(model.config, tie_word_embeddings=False)
    return model.config


def merge_lora(model: Decoder) -> Decoder:
    """A new model without adapters whose weights are W + s B A (fp32, rounded once); untouched weights are shared.

    A tied model whose embedding or head has an adapter comes out untied. `model` stays as it is.
    """
    merged = shallow_copy(model)
    config = merged_config(model)
    groups: dict[int, list[Site]] = {}
    for site in sites(merged).values():
        groups.setdefault(id(site.module), []).append(site)
    # All products first: in a tied model two modules hold one variable.
    weights = {
        key: [merged_weight(site) for site in group]
        for key, group in groups.items()
        if group[0].adapted
        or (group[0].name == HEAD and config != model.config)
        or (group[0].new_rows is not None and not (group[0].name == HEAD and config.tie_word_embeddings))
    }
    for key, values in weights.items():
        site = groups[key][0]
        module = site.module
        value = jnp.stack(values) if site.index is not None else values[0]
        metadata = {"logical_axes": module.weight.get_metadata()["logical_axes"]}
        module.weight = nnx.Param(value, **metadata)
        for name in attribute_names(module):
            setattr(module, name, nnx.data(None))
        module.lora_scale, module.lora_dropout = 1.0, 0.0
        if isinstance(module, Linear) and site.name == HEAD:
            merged.lm_head = module
    merged.config = config
    merged.adapter = merged.new_tokens = None
    return merged


def remove_lora(model: Decoder) -> Decoder:
    """The base of an adapted model: a new model without adapters, nothing merged, sharing `model`'s arrays."""
    base = shallow_copy(model)
    for site in sites(base).values():
        for name in attribute_names(site.module):
            setattr(site.module, name, nnx.data(None))
        site.module.lora_scale, site.module.lora_dropout = 1.0, 0.0
    if base.config.tie_word_embeddings:
        base.lm_head = nnx.data(None)
    base.adapter = None
    return base
