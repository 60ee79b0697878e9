"""Where adapters can sit: the sites of a model, what each holds, and which of them a configuration chooses."""

import dataclasses
from typing import Any, NamedTuple

from flax import nnx

from pronghorn.errors import InputError
from pronghorn.lora_config import ALL_LINEAR, EMBEDDING, HEAD, LoRAConfig, matches
from pronghorn.models.decoder import Decoder
from pronghorn.models.expert_layers import ExpertLinear
from pronghorn.models.families import family_named
from pronghorn.models.layers import Embedding, Linear, value_or_none

MAGNITUDE = "lora_magnitude_vector"  # as in PEFT
STARTED = ("lora_start_A", "lora_start_B")


class Factors(NamedTuple):
    """One module's adapter: fp32 A and B, s, DoRA's m `[out]` or None. Their shapes are in `pronghorn.lora`.

    `start` is (A0, B0) of a start that is part of the base already, so that s (B A - B0 A0) is what is added to it; as
    `Site.factors` gives them, they are in A and B, which then have twice the rank.
    """

    a: Any
    b: Any
    scale: Any
    magnitude: Any = None
    start: tuple[Any, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Site:
    """A place where an adapter can sit.

    Attributes:
      name: canonical, `layers.3.self_attn.q_proj`, `lm_head` or `embed_tokens`.
      module: the module that holds the weight; several sites share one where layers are stacked.
      index: position in the stack, or None.
      layer: index of the layer, or None for head and embedding.
      new_rows, first_new: of the head and the embedding, the variable of the trained rows of new tokens, or None, and
        the first row they stand in for.
    """

    name: str
    module: Linear | Embedding
    index: int | None = None
    layer: int | None = None
    new_rows: Any = None
    first_new: int = 0

    @property
    def adapted(self) -> bool:
        """Whether the module has an adapter. Looks at no array, so it works on shapes too."""
        return getattr(self.module, factor_names(self.module)[0]) is not None

    @property
    def factors(self) -> Factors | None:
        """The adapter at this site, or None; a slice, and so a copy, where layers are stacked."""
        if not self.adapted:
            return None
        a, b = self.module.adapter()
        magnitude = value_or_none(getattr(self.module, MAGNITUDE, None))
        if self.index is not None:
            a, b = a[self.index], b[self.index]
            magnitude = None if magnitude is None else magnitude[self.index]
        return Factors(a, b, self.module.lora_scale, magnitude)

    @property
    def shape(self) -> tuple[int, int]:
        """(fan out, fan in) of the adapter: the weight's shape, an embedding's transposed."""
        rows, columns = self.module.weight.get_value().shape[-2:]
        return (columns, rows) if isinstance(self.module, Embedding) else (rows, columns)

    @property
    def experts(self) -> tuple[int, ...]:
        """(experts,) where the weight, and so A and B, are stacks of one for each; else ()."""
        if not isinstance(self.module, ExpertLinear):
            return ()
        return (self.module.weight.get_value().shape[-3],)


def factor_names(module: Linear | Embedding) -> tuple[str, str]:
    """The attributes that hold A and B; an embedding's have names of their own, as in PEFT."""
    if isinstance(module, Embedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A", "lora_B"


def attribute_names(module: Linear | Embedding) -> tuple[str, ...]:
    """Every attribute that an adapter may have set."""
    rest = () if isinstance(module, Embedding) else (MAGNITUDE, *STARTED)
    return (*factor_names(module), "lora_new_rows", *rest)


def sites(model: Decoder) -> dict[str, Site]:
    """Every place of the model where an adapter can sit, by name; in a tied model the head is one as well."""
    embedding, first = model.embed_tokens, model.embed_tokens.first_new
    found = [Site(EMBEDDING, embedding, new_rows=embedding.lora_new_rows, first_new=first)]
    by_layer: dict[int, list[Site]] = {}
    for segment in model.segments:
        for position, layer in enumerate(segment.layers):
            linears = [
                (path, module) for path, module in nnx.iter_modules(layer) if isinstance(module, Linear)
            ]
            for repeat in range(segment.repeats):
                number = segment.start + repeat * len(segment.layers) + position
                for path, module in linears:
                    name = ".".join(("layers", str(number), *map(str, path)))
                    index = repeat if segment.stacked else None
                    by_layer.setdefault(number, []).append(Site(name, module, index, number))
    for number in sorted(by_layer):
        found.extend(by_layer[number])
    if model.extras is not None:
        outside = nnx.iter_modules(model.extras)
        found += [Site(".".join(map(str, p)), linear) for p, linear in outside if isinstance(linear, Linear)]
    head = tied_head(model) if model.lm_head is None else model.lm_head
    rows = (embedding if model.config.tie_word_embeddings else head).lora_new_rows
    found.append(Site(HEAD, head, new_rows=rows, first_new=first))
    return {site.name: site for site in found}


def tied_head(model: Decoder) -> Linear:
    """A head of its own around the embedding's very weight: what an adapter on a tied head is attached to."""
    vocab, hidden = model.embed_tokens.weight.get_value().shape
    head = nnx.eval_shape(
        lambda: Linear(hidden, vocab, axes=("vocab", "hidden"), dtype=model.dtype, rngs=nnx.Rngs(0))
    )
    head.weight = model.embed_tokens.weight
    return head


def select(model: Decoder, config: LoRAConfig) -> list[str]:
    """Names of the sites that `config` chooses, in model order.

    Raises:
      InputError: a target or a layer that the model lacks, listing what exists.
    """
    found = sites(model)
    if config.layers is not None:
        wrong = [layer for layer in config.layers if not 0 <= layer < model.config.num_layers]
        if wrong:
            raise InputError(
                f"lora.layers has {wrong[0]}, and the model has layers 0 to {model.config.num_layers - 1}."
            )
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    chosen: set[str] = set()
    for target in targets:
        matched = {name for name, site in found.items() if matches(site.name, site.layer, target)}
        if not matched:  # a name that only transformers has: c_fc, or qkv_proj for several of ours
            theirs = transformers_names(model)
            matched = {name for name, site in found.items() if matches(theirs[name], site.layer, target)}
        if not matched:
            endings = sorted({".".join(name.split(".")[-2:]) for name in found if "." in name})
            raise InputError(
                f"lora.targets: {target!r} matches no module; there are {', '.join([*endings, HEAD, EMBEDDING])}, "
                f'whole names such as {next(name for name in found if "." in name)}, and "{ALL_LINEAR}".'
            )
        chosen |= _adapted_by_peft(model, matched, target)
    layers = None if config.layers is None else set(config.layers)
    names = [
        name
        for name, site in found.items()
        if name in chosen
        and (layers is None or site.layer is None or site.layer in layers)
        and not any(matches(name, site.layer, target) for target in config.exclude)
    ]
    if not names:
        raise InputError("lora.targets, lora.layers and lora.exclude choose nothing; widen one of them.")
    for option, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for target in pattern or {}:
            if not any(matches(name, found[name].layer, target) for name in names):
                raise InputError(f"lora.{option}: {target!r} matches none of the adapted modules.")
    return names


def _adapted_by_peft(model: Decoder, matched: set[str], target: str) -> set[str]:
    """What a target matches, of "all-linear" without the linears that PEFT takes no adapters of.

    Raises:
      InputError: another target chooses one of these.
    """
    unadapted = family_named(model.config.family).unadapted
    refused = {name for name in matched if unadapted and name.endswith(unadapted)}
    if refused and target != ALL_LINEAR:
        raise InputError(
            f"lora.targets: {target!r} chooses {min(refused)}, which PEFT adapts in no model of this family, so that "
            f'nothing could read the adapter; choose others, or "{ALL_LINEAR}", which leaves it out.'
        )
    return matched - refused


def transformers_names(model: Decoder) -> dict[str, str]:
    """{our name of a site: the module's path in transformers without its "model."}; parts of one linear share it."""
    family = family_named(model.config.family)
    tensors = family.names_in_memory(model.config)
    for fused, parts in family.fused_tensors(model.config).items():
        pieces = {piece for piece, _ in parts}
        tensors = {ours: fused if theirs in pieces else theirs for ours, theirs in tensors.items()}
    return {
        name: tensors.get(f"{name}.weight", "lm_head.weight").removesuffix(".weight").removeprefix("model.")
        for name in sites(model)
    }
