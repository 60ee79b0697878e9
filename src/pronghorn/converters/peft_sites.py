"""Where PEFT puts adapters: the linears of transformers, some of which are several of ours.

Phi 3 stores q, k and v as `qkv_proj` and gate and up as `gate_up_proj`; here each part has an adapter of its own. Both
ways are exact, as long as the parts share a scale. With parts p of `rows_p` rows each:

    reading   B's rows are cut: part p has A and B_p. Where no column of B serves two parts (what we write), a part
              keeps only the columns that are its own, and a part without any has no adapter.
    writing   Parts that share one A bit for bit: that A and the B_p, one above the other. Otherwise the A_p lie one
              above the other and B is zero but for its blocks B_p: the rank is the sum of theirs, alpha grows alike.

gpt-oss and Llama 4 have the linears of all experts as bare parameters (PEFT's `target_parameters`), gate and up as one.
The same holds there, with an axis of experts in front of A and B; `ParameterSite` has how a file holds it.

Other mixtures have a linear an expert in their files, and two parameters of all experts in the memory of transformers.
PEFT 0.21 turns adapters that name such linears (in most of these families) into those of the parameters, by last names
alone: `down_proj` means the experts', in every layer, and no other linear of that name gets what is its own. So here
adapters of experts are written as those of the parameters, unless PEFT's reading is what is meant (`joins_experts`),
and linears that share a name with theirs by the name of their weight, in `target_parameters` (`named_like_experts`):
the same adapter in the same tensors.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pronghorn.converters.text_towers import wrapped_name
from pronghorn.errors import InputError
from pronghorn.lora import AdapterInfo, adapter_scale
from pronghorn.lora_sites import Factors, Site, sites
from pronghorn.models.decoder import Decoder
from pronghorn.models.families import family_named
from pronghorn.models.tensor_names import InterleavedTensor


@dataclasses.dataclass(frozen=True)
class FusedSite:
    """A linear of transformers that is several of ours, named "layers.3.self_attn.qkv_proj"."""

    name: str
    parts: tuple[Site, ...]

    @property
    def layer(self) -> int | None:
        return self.parts[0].layer

    @property
    def shape(self) -> tuple[int, int]:
        """(fan out, fan in)."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def file_shapes(self) -> Any:
        """Of A and B in a file, given the rank."""
        fan_out, fan_in = self.shape
        return lambda rank: ((rank, fan_in), (fan_out, rank))

    def join(self, blocks: list[np.ndarray]) -> np.ndarray:
        """B of the whole, from those of the parts."""
        return np.concatenate(blocks)

    def cut(self, b: np.ndarray) -> list[np.ndarray]:
        """B of the parts, from that of the whole."""
        return np.split(b, np.cumsum([part.shape[0] for part in self.parts])[:-1])

    def to_file(self, a: Any, b: Any) -> tuple[Any, Any]:
        """A and B as PEFT has them."""
        return a, b

    def from_file(self, a: Any, b: Any) -> tuple[Any, Any]:
        """The inverse of `to_file`."""
        return a, b


@dataclasses.dataclass(frozen=True)
class ParameterSite(FusedSite):
    """A bare parameter of transformers of one or several linears that all experts have, `[experts, in, out]` or
    `[experts, out, in]`, named "layers.3.mlp.experts.gate_up_proj".

    A is `[experts, r, in]` and B `[experts, out, r]`. PEFT has them as `[experts r, in]` and `[out, r experts]`, in B
    the columns of one rank side by side.

    Attributes:
      layout: how the parameter holds its linears.
      experts: how many there are.
      swapped: PEFT 0.21 takes `[experts, in, out]` for `[experts, out, in]`, transformers not marking the module as
        transposed. The update of a transposed matrix is (B A)ᵀ = Aᵀ Bᵀ, so its `lora_A` is our Bᵀ and its `lora_B` our
        Aᵀ: the same function, with the other factor zero where PEFT starts.
    """

    layout: InterleavedTensor
    experts: int
    swapped: bool

    @property
    def file_shapes(self) -> Any:
        fan_out, fan_in = self.shape[::-1] if self.swapped else self.shape
        return lambda rank: ((rank * self.experts, fan_in), (fan_out, rank * self.experts))

    def join(self, blocks: list[np.ndarray]) -> np.ndarray:
        return np.swapaxes(self.layout.join(blocks), -1, -2)

    def cut(self, b: np.ndarray) -> list[np.ndarray]:
        return [self.layout.cut(np.swapaxes(b, -1, -2), place) for place in range(len(self.parts))]

    def to_file(self, a: Any, b: Any) -> tuple[Any, Any]:
        a, b = self._turned(np.asarray(a), np.asarray(b))
        return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)

    def from_file(self, a: Any, b: Any) -> tuple[Any, Any]:
        a, b = np.asarray(a), np.asarray(b)
        return self._turned(
            a.reshape(self.experts, -1, a.shape[1]),
            b.reshape(len(b), -1, self.experts).transpose(2, 0, 1),
        )

    def _turned(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2)) if self.swapped else (a, b)


@dataclasses.dataclass(frozen=True)
class ExpertSite(Site):
    """One expert's part of a linear that all experts have, named "layers.3.mlp.experts.7.up_proj".

    Attributes:
      stack: name of the linear's site.
      expert: its number.
    """

    stack: str = ""
    expert: int = 0

    @property
    def experts(self) -> tuple[int, ...]:
        return ()

    @property
    def factors(self) -> Factors | None:
        """The expert's own A and B, or None."""
        found = super().factors
        return None if found is None else found._replace(a=found.a[self.expert], b=found.b[self.expert])


def join_experts(
    folder: Any, places: Mapping[str, Site | FusedSite], factors: Mapping[str, Factors]
) -> dict[str, Factors]:
    """{our name: factors}, those of experts stacked on an axis of their own.

    Args:
      folder: of the adapter, for errors.
      places: from `peft_sites`.

    Raises:
      InputError: experts of one linear without an adapter, or with another rank or scale than the others'.
    """
    joined: dict[str, Factors] = {}
    stacks: dict[str, list[Factors | None]] = {}
    for name, site in places.items():
        if isinstance(site, ExpertSite):
            stacks.setdefault(site.stack, []).append(factors.get(name))
        elif name in factors:
            joined[name] = factors[name]
    joined |= {name: own for name, own in factors.items() if name not in places}  # parts of a fused linear
    for stack, found in stacks.items():
        present = [own for own in found if own is not None]
        if not present:
            continue
        if len(present) < len(found) or len({(own.a.shape, own.scale) for own in present}) > 1:
            raise InputError(
                f"{folder}: the adapters of {stack} are not of every expert with one rank and scale, which the stacked "
                "weights need; merge the adapter with PEFT."
            )
        a, b = (jnp.stack([jnp.asarray(getattr(own, name)) for own in present]) for name in "ab")
        joined[stack] = Factors(a, b, present[0].scale)
    return joined


def peft_sites(model: Decoder, *, joined_experts: bool = False) -> dict[str, Site | FusedSite]:
    """Every place where PEFT can put an adapter, by our name of it.

    Args:
      joined_experts: linears that a file holds expert by expert are two bare parameters of all experts, as they are in
        the memory of transformers 5, gate's rows above up's. Otherwise they are a place an expert, which PEFT joins.
    """
    family = family_named(model.config.family)
    found: dict[str, Site | FusedSite] = {}
    bare: dict[str, Site] = {}
    stacks: dict[str, Site] = {}
    parameters = _bare_parameters(model)
    for name, site in sites(model).items():
        if name in parameters:
            bare[name] = site
            continue
        if not site.experts:
            found[name] = site
            continue
        if joined_experts:
            stacks[name] = site
            continue
        holder, _, leaf = name.rpartition(".")
        for expert in range(site.experts[0]):
            own = f"{holder}.{expert}.{leaf}"
            found[own] = ExpertSite(own, site.module, site.index, site.layer, stack=name, expert=expert)
    ours = {theirs: name for name, theirs in family.tensor_names(model.config).items()}
    for tensor, pieces in family.fused_tensors(model.config).items():
        if not tensor.endswith(".weight"):
            continue
        parts = tuple(found.pop(ours[piece].removesuffix(".weight")) for piece, _ in pieces)
        name = f"{parts[0].name.rpartition('.')[0]}.{_module(tensor).rpartition('.')[2]}"
        found[name] = FusedSite(name, parts)  # type: ignore[arg-type]  # a part is no fused site
    for tensor, layout in family.interleaved_tensors(model.config).items():
        if layout.parts[0].endswith(".weight"):
            linears = tuple(bare[ours[part].removesuffix(".weight")] for part in layout.parts)
            if layout.by_rows:  # in memory transformers has these as it has stacks
                stacks |= {site.name: site for site in linears}
                continue
            name = f"{linears[0].name.rpartition('.')[0]}.{tensor.rpartition('.')[2]}"
            swapped = layout.transposed and not layout.marked
            found[name] = ParameterSite(name, linears, layout, linears[0].experts[0], swapped)
    for holder in dict.fromkeys(name.rpartition(".")[0] for name in stacks):
        for name, leaves in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            linears = tuple(stacks[f"{holder}.{leaf}"] for leaf in leaves)
            layout = InterleavedTensor(tuple(site.name for site in linears), transposed=True, in_turn=False)
            whole = f"{holder}.{name}"
            found[whole] = ParameterSite(whole, linears, layout, linears[0].experts[0], swapped=False)
    return found


def _bare_parameters(model: Decoder) -> set[str]:
    """Our names of the linears that are part of a bare parameter of all experts in transformers."""
    family = family_named(model.config.family)
    layouts = family.interleaved_tensors(model.config).values()
    parts = {part for layout in layouts for part in layout.parts}
    tensors = family.tensor_names(model.config)
    return {_module(name) for name, theirs in tensors.items() if theirs in parts and name.endswith(".weight")}


def parameter_paths(
    places: Mapping[str, Any], modules: Mapping[str, str], chosen: Collection[str]
) -> dict[str, str]:
    """{our name: the path of the adapter in PEFT} of the chosen bare parameters. PEFT wraps a module once for each of
    its parameters, in their order: the last is outermost, and those before it are in its `base_layer`."""
    found: dict[str, str] = {}
    for name in reversed([name for name, site in places.items() if isinstance(site, ParameterSite)]):
        if name in chosen:
            path = modules[name].rpartition(".")[0]
            while path in found.values():
                path += ".base_layer"
            found[name] = path
    return found


def named_like_experts(model: Decoder, modules: Mapping[str, str]) -> set[str]:
    """Our names of the linears that share a last name with those that a file holds expert by expert.

    Args:
      modules: from `module_names`.
    """
    stacks = family_named(model.config.family).stacked_tensors(model.config)
    of_experts = {_last(_module(parts[0])) for parts in stacks.values()}
    places = sites(model)
    return {
        name
        for name, module in modules.items()
        if name in places and not places[name].experts and _last(module) in of_experts
    }


def joins_experts(model: Decoder, info: AdapterInfo) -> bool:
    """Whether adapters of experts that a file holds one by one are written as those of two parameters.

    PEFT 0.21 reads single experts' as one of both gate and up, or of down, of every layer, with the rank and the scale
    of the whole adapter, that of rsLoRA counted wrongly. Where the adapter is not so, or other linears have the names.
    """
    bare = _bare_parameters(model)
    stacks = {name: site for name, site in sites(model).items() if site.experts and name not in bare}
    found = {name: factors_at(site) for name, site in stacks.items()}
    adapted = {name: factors for name, factors in found.items() if factors is not None}
    if not adapted:
        return False
    wrapped = model.source is not None and model.source.wrapped
    if wrapped or info.use_rslora or named_like_experts(model, module_names(model)):
        return True
    leaves = {_last(name) for name in adapted}
    chosen = {name for name in stacks if _last(name) in leaves}
    if chosen != set(adapted) or len(leaves & {"gate_proj", "up_proj"}) == 1:
        return True
    alike = (info.rank, adapter_scale(info.rank, info.alpha, False))
    if any((factors.a.shape[-2], factors.scale) != alike for factors in adapted.values()):
        return True
    gates = {name: factors for name, factors in adapted.items() if _last(name) == "gate_proj"}
    # One A of both, as PEFT makes it.
    return any(
        bool(jnp.array_equal(gate.a, adapted[f"{name.rpartition('.')[0]}.up_proj"].a))
        for name, gate in gates.items()
    )


def module_names(model: Decoder, *, joined_experts: bool = False) -> dict[str, str]:
    """{our name of a place: the module's path in transformers} of all `peft_sites`."""
    family = family_named(model.config.family)
    tensors = family.tensor_names(model.config)
    fused = {pieces[0][0]: name for name, pieces in family.fused_tensors(model.config).items()}
    stacks = family.stacked_tensors(model.config)
    layouts = family.interleaved_tensors(model.config)
    modules = family.names_in_memory(model.config)
    names = {}
    for name, site in peft_sites(model, joined_experts=joined_experts).items():
        if isinstance(site, ExpertSite):
            names[name] = _module(stacks[tensors[f"{site.stack}.weight"]][site.expert])
            continue
        if isinstance(site, ParameterSite):
            weight = f"{site.parts[0].name}.weight"
            held = next((t for t, layout in layouts.items() if layout.parts[0] == tensors[weight]), None)
            names[name] = held or f"model.{name}"
            if held is not None and layouts[held].by_rows:  # the file has other names
                holder = _module(modules[weight]).rpartition(".")[0]
                names[name] = f"{holder}.{name.rpartition('.')[2]}"
            continue
        first = site.parts[0].name if isinstance(site, FusedSite) else name
        tensor = modules.get(f"{first}.weight", "lm_head.weight")
        names[name] = _module(fused.get(tensor, tensor))
    if model.source is not None and model.source.wrapped:
        return {name: wrapped_name(module, family.tower) for name, module in names.items()}
    return names


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def part_names(places: Mapping[str, Site | FusedSite], chosen: set[str]) -> list[str]:
    """Our own linears of the chosen places."""
    names: list[str] = []
    for name in sorted(chosen):
        site = places[name]
        if isinstance(site, FusedSite):
            names += [part.name for part in site.parts]
        else:
            names.append(site.stack if isinstance(site, ExpertSite) else name)
    return list(dict.fromkeys(names))


def factors_at(site: Site | FusedSite) -> Factors | None:
    """The adapter at a place as PEFT has it, or None.

    Raises:
      InputError: the parts of one linear have different scales.
    """
    if isinstance(site, Site):
        factors = site.factors
        # In a stack, two factors of zeros mean that this layer has none.
        if factors is None or (site.index is not None and not jnp.any(factors.a) and not jnp.any(factors.b)):
            return None
        return factors
    found = [factors_at(part) for part in site.parts]
    present = [factors for factors in found if factors is not None]
    if not present:
        return None
    scale = present[0].scale
    if any(factors.scale != scale for factors in present):
        raise InputError(
            f"{site.name} is one linear in transformers, and the adapters of its parts have different scales, which "
            "PEFT cannot hold; save the model with save_merged."
        )
    lengths = [factors.magnitude for factors in present if factors.magnitude is not None]
    if lengths and len(lengths) < len(found):
        raise InputError(
            f"{site.name} is one linear in transformers, and only some of its parts have DoRA, which PEFT cannot hold; "
            "save the model with save_merged."
        )
    magnitude = np.concatenate([np.asarray(part) for part in lengths]) if lengths else None
    arrays = [np.asarray(factors.a) for factors in present]
    if len(present) == len(found) and all(a.tobytes() == arrays[0].tobytes() for a in arrays):
        b = site.join([np.asarray(factors.b) for factors in present])
        return Factors(arrays[0], b, scale, magnitude)
    blocks = [None if factors is None else np.asarray(factors.b) for factors in found]
    return Factors(np.concatenate(arrays, axis=-2), _block_diagonal(site, blocks), scale, magnitude)


def _block_diagonal(site: FusedSite, blocks: list[np.ndarray | None]) -> np.ndarray:
    """PEFT's B from those of the parts; a part without one has rows of zeros."""
    leading = next(block.shape[:-2] for block in blocks if block is not None)
    rank = sum(block.shape[-1] for block in blocks if block is not None)
    padded, column = [], 0
    for part, block in zip(site.parts, blocks, strict=True):
        b = np.zeros((*leading, part.shape[0], rank), np.float32)
        if block is not None:
            b[..., column : column + block.shape[-1]] = block
            column += block.shape[-1]
        padded.append(b)
    return site.join(padded)


def fused_gradients(site: FusedSite, gradients: FusedSite) -> dict[str, np.ndarray]:
    """{"A": .., "B": ..}: the gradients of PEFT's factors on one linear, from those of ours on its parts.

    Args:
      site, gradients: of a model, and of the same model with gradients in place of its factors.
    """
    joined, moved = factors_at(site), factors_at(gradients)
    if joined is None or moved is None:
        return {}
    if joined.a.shape == moved.a.shape:
        a, b = site.to_file(moved.a, moved.b)
    else:
        found = [part.factors for part in gradients.parts if part.factors is not None]  # of one A
        a_sum = np.sum([factors.a for factors in found], axis=0)
        a, b = site.to_file(a_sum, site.join([np.asarray(factors.b) for factors in found]))
    return {"A": a, "B": b}


def trained_entries(site: FusedSite) -> dict[str, np.ndarray]:
    """{"A": .., "B": ..}: 1 where an entry of PEFT's factor is one of ours, 0 where it is a zero outside of the blocks.
    Empty where there are no blocks."""
    joined = factors_at(site)
    if joined is None:
        return {}
    ones = [None if part.factors is None else np.ones(part.factors.b.shape) for part in site.parts]
    mask = _block_diagonal(site, ones)
    if mask.shape != joined.b.shape:
        return {}
    a, b = site.to_file(np.ones(joined.a.shape), mask)
    return {"A": a, "B": b}


def cut_factors(site: FusedSite, factors: Factors) -> dict[str, Factors]:
    """{our name: factors} of the parts of an adapter, as a file has it, on a linear that is several of ours."""
    a, b = (np.asarray(array) for array in site.from_file(factors.a, factors.b))
    pieces = site.cut(b)
    lengths: list[Any] = [None] * len(pieces)
    if factors.magnitude is not None:
        lengths = [jnp.asarray(part) for part in site.cut(np.asarray(factors.magnitude))]
    used = [np.any(piece != 0, axis=tuple(range(piece.ndim - 1))) for piece in pieces]
    counts = np.sum(used, axis=0)
    if counts.max() != 1 or factors.magnitude is not None:  # one A for all parts, not trained yet, or DoRA
        used = [np.ones_like(columns) for columns in used]
    return {
        part.name: Factors(
            jnp.asarray(a[..., columns, :]), jnp.asarray(piece[..., columns]), factors.scale, length
        )
        for part, piece, columns, length in zip(site.parts, pieces, used, lengths, strict=True)
        if columns.any()
    }


def alpha_of(factors: Any, usual: float, use_rslora: bool) -> float:
    """The alpha that gives these factors their scale; the usual one wherever it does."""
    rank = int(factors.a.shape[-2])
    if adapter_scale(rank, usual, use_rslora) == factors.scale:
        return usual
    return factors.scale * (rank**0.5 if use_rslora else rank)
