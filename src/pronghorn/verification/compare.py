"""A user's own model here and in transformers (with PEFT for an adapter): layers, logits, KL, gradients, in fp32.

Both sides read the same folder, run the same tokens in fp32 and take the gradient of the same next-token loss (there
in fp64 from the fp32 logits on).
A departure is reported at the first layer where it shows, since everything after it departs too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.converters.text_towers import tower_name
from pronghorn.errors import InputError
from pronghorn.lora import merge, split
from pronghorn.models.families import family_named
from pronghorn.models.parameters import named_parameters
from pronghorn.models.tensor_names import by_our_names
from pronghorn.training import losses
from pronghorn.versions import installed_versions

# fp32 against fp32, other orders of summation: the limits of the test suite, as shares of the reference's norm.
LAYER_LIMIT = 1e-4
LOGITS_LIMIT = 1e-4
KL_LIMIT = 1e-6
LOSS_LIMIT = 1e-4
GRADIENT_LIMIT = 1e-4
# A gradient that is zero in exact arithmetic (a key's bias, say) is noise over noise: norms below this share of the
# largest one are measured against that share.
GRADIENT_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class Difference:
    """‖ours − theirs‖ / ‖theirs‖ (of the worst token, for a layer) and max|ours − theirs| of one named tensor."""

    name: str
    relative: float
    max_abs: float


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify_model` measured.

    Attributes:
      layers: embedding, each decoder layer's output, and the final norm, in order.
      logits_max_abs, logits_relative: over all positions; relative to the largest logit in magnitude.
      kl_mean, kl_max: KL(transformers ‖ pronghorn) per token, nats, computed in fp64.
      gradients: one entry a parameter (of the adapter, when one is given); empty when not asked for.
      first_departure: the first layer, "logits", "KL", "loss" or gradient over its limit; None when all agree.
    """

    model: str
    adapter: str | None
    tokens: int
    layers: tuple[Difference, ...]
    logits_max_abs: float
    logits_relative: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    loss: float
    loss_theirs: float
    gradients: tuple[Difference, ...]
    first_departure: str | None
    passed: bool
    limits: dict[str, float]
    versions: dict[str, str]

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda d: d.relative)
        lines = [
            f"{self.model}"
            + (f" with {self.adapter}" if self.adapter else "")
            + f", {self.tokens} tokens, fp32",
            f"  layers     {len(self.layers)} compared, worst {worst.name}: {worst.relative:.2e} "
            f"(limit {LAYER_LIMIT:.0e})",
            f"  logits     largest difference {self.logits_max_abs:.2e}, relative {self.logits_relative:.2e} "
            f"(limit {LOGITS_LIMIT:.0e}), top-1 agreement {self.top1_agreement:.2%}",
            f"  KL         mean {self.kl_mean:.2e}, largest {self.kl_max:.2e} nats a token (limit {KL_LIMIT:.0e})",
            f"  loss       {self.loss:.6f} here, {self.loss_theirs:.6f} there",
        ]
        if self.gradients:
            worst = max(self.gradients, key=lambda d: d.relative)
            lines.append(
                f"  gradients  {len(self.gradients)} compared, worst {worst.name}: {worst.relative:.2e} "
                f"(limit {GRADIENT_LIMIT:.0e})"
            )
        lines.append("passed" if self.passed else f"FAILED, first at {self.first_departure}")
        return "\n".join(lines)


def verify_model(
    path: str, *, adapter: str | None = None, tokens: int = 500, gradients: bool = True, seed: int = 0
) -> VerifyReport:
    """Compare the model in `path` (a folder or cached hub name) here and in transformers.

    Args:
      adapter: a PEFT folder; it is loaded by PEFT there and by pronghorn here, and only its gradients are compared.
      tokens: prompt length; the text is public-domain prose, or random ids when the folder has no tokenizer.

    Raises:
      InputError: torch or transformers is missing, or the model cannot be read.
    """
    _require_torch()
    from pronghorn.converters.huggingface import load_model, load_tokenizer, resolve_model_path
    from pronghorn.converters.peft import load_adapter

    folder = str(resolve_model_path(path))
    if tokens < 2:
        raise InputError(f"--tokens {tokens}: at least two are needed for a next-token loss.")
    model = load_model(folder, dtype="float32")
    if adapter is not None:
        model = load_adapter(model, adapter)
    input_ids = _prompt(load_tokenizer(folder), model.config.vocab_size, tokens, seed)
    canonical = functools.partial(_canonical, model)
    theirs = _run_transformers(folder, adapter, input_ids, canonical if gradients else None)
    ours = _run_pronghorn(model, input_ids, gradients, names=set(theirs["gradients"]))
    return _report(path, adapter, tokens, ours, theirs, gradients)


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError(
            "verify needs PyTorch and PEFT to compare with; pip install 'pronghorn[verify]'."
        ) from None


def _prompt(tokenizer: Any, vocab_size: int, tokens: int, seed: int) -> np.ndarray:
    """[1, tokens] int32."""
    if tokenizer is None:
        return np.random.default_rng(seed).integers(0, vocab_size, (1, tokens), dtype=np.int32)
    from pronghorn.data.general_text import general_text

    ids = tokenizer(general_text(), add_special_tokens=True)["input_ids"]
    return np.asarray((ids * (tokens // len(ids) + 1))[:tokens], np.int32)[None]


# Compiled once for models of one structure, and the same programs for the next model of it.
@functools.partial(jax.jit, static_argnums=0)
def _forward(graph: Any, trainable: Any, frozen: Any, ids: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Outputs of embedding, layers and final norm, and the logits."""
    model = merge(graph, trainable, frozen)
    hidden, layers = model.hidden_states(ids, return_layers=True)
    return [*layers, hidden], model.logits(hidden)


@functools.partial(jax.jit, static_argnums=0)
def _loss(graph: Any, trainable: Any, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
    return losses.next_token(graph)(trainable, frozen, batch)[0]


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradient(graph: Any, trainable: Any, frozen: Any, batch: dict[str, jax.Array]) -> Any:
    return jax.value_and_grad(losses.next_token(graph), has_aux=True)(trainable, frozen, batch)


def _run_pronghorn(model: Any, input_ids: np.ndarray, gradients: bool, names: set[str]) -> dict[str, Any]:
    ids = jnp.asarray(input_ids)
    graph, trainable, frozen = split(model)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "segment_ids": jnp.ones_like(ids),
        "positions": jnp.arange(ids.shape[1], dtype=jnp.int32)[None],
    }
    with jax.default_matmul_precision("highest"):
        layers, logits = _forward(graph, trainable, frozen, ids)
        result: dict[str, Any] = {"layers": [np.asarray(x) for x in layers], "logits": np.asarray(logits)[0]}
        if not gradients:
            return result | {"loss": float(_loss(graph, trainable, frozen, batch)), "gradients": {}}
        (loss, _), grads = _loss_and_gradient(graph, trainable, frozen, batch)
    gradient = merge(graph, grads, frozen)
    found = {name: np.asarray(p.get()) for name, p in named_parameters(gradient).items() if name in names}
    if model.adapter is not None:
        from pronghorn.converters.peft_sites import FusedSite, fused_gradients, peft_sites

        moved = peft_sites(gradient, joined_experts=True)  # as they are in transformers
        for name, site in peft_sites(model, joined_experts=True).items():
            if isinstance(site, FusedSite):
                letters = fused_gradients(site, moved[name])  # type: ignore[arg-type]  # the same model's
                found |= {f"{name}.lora_{letter}": value for letter, value in letters.items()}
    return result | {"loss": float(loss), "gradients": found}


def _run_transformers(
    folder: str,
    adapter: str | None,
    input_ids: np.ndarray,
    canonical: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None,
) -> dict[str, Any]:
    """Gradients are taken where there is a function that gives them our names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from pronghorn.models.families import WRAPPERS

    kind = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).model_type
    reader: Any = AutoModelForImageTextToText if kind in WRAPPERS else AutoModelForCausalLM
    reference = reader.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
    # Llama 4's wrapper holds the text model with its head, which is run by itself: on text alone the wrapper of
    # transformers 5.17 asks for outputs of images.
    inner = None if hasattr(reference, "model") else reference.language_model
    trunk = inner.model if inner is not None else getattr(reference.model, "language_model", reference.model)
    if adapter is not None:
        from peft import PeftModel

        reference = PeftModel.from_pretrained(reference, adapter, is_trainable=True).eval()
    seen: list[np.ndarray] = []

    def record(output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach().numpy().copy())

    # What the first layer is given: some families scale the embedding inside of its module, some outside.
    hooks = [
        trunk.layers[0].register_forward_pre_hook(
            lambda _module, given, named: record(given[0] if given else named["hidden_states"]),
            with_kwargs=True,
        )
    ]
    # Its name differs: LFM 2 says embedding_norm, Nemotron-H norm_f, and Gemma 4 has another norm behind.
    norms = {name: m for name, m in trunk.named_children() if name.endswith(("norm", "norm_f"))}
    final_norm = norms.get("norm", next(reversed(norms.values())))
    hooks += [
        m.register_forward_hook(lambda _m, _given, output: record(output))
        for m in (*trunk.layers, final_norm)
    ]
    ids = torch.from_numpy(input_ids.astype(np.int64))
    with torch.set_grad_enabled(canonical is not None):
        logits = (inner or reference)(input_ids=ids, use_cache=False).logits[0]
        # In fp64: PyTorch's fp32 cross entropy on a CPU sums a large vocabulary with an error that all rows share. With
        # 49,152 words it moved the loss by 7e-6 and one gradient by 8e-4, ten times what two models differ by.
        loss = torch.nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:])
    for hook in hooks:
        hook.remove()
    found: dict[str, np.ndarray] = {}
    if canonical is not None:
        loss.backward()
        named = reference.named_parameters()
        found = {name: parameter.grad.numpy() for name, parameter in named if parameter.grad is not None}
        found = canonical(found)
    return {
        "layers": seen,
        "logits": logits.detach().numpy(),
        "loss": float(loss.detach()),
        "gradients": found,
    }


def _canonical(model: Any, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients of transformers, or of PEFT's factors where the model has an adapter, by our names."""
    if model.adapter is None:
        family = family_named(model.config.family)
        config = model.config
        return by_our_names(
            {tower_name(name): gradient for name, gradient in gradients.items()},
            family.names_in_memory(config),
            family.fused_tensors(config),
            family.interleaved_tensors(config),
        )
    from pronghorn.converters.peft_sites import (
        FusedSite,
        factors_at,
        module_names,
        parameter_paths,
        peft_sites,
        trained_entries,
    )

    places, modules = peft_sites(model, joined_experts=True), module_names(model, joined_experts=True)
    adapted = {name for name, site in places.items() if factors_at(site) is not None}
    paths = modules | parameter_paths(places, modules, adapted)
    ours = {path: name for name, path in paths.items()}
    found = {}
    for name, gradient in gradients.items():
        # base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight
        name = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
        module, _, factor = name.rpartition(".")
        if factor.startswith("lora_"):
            place = places[ours[module]]
            if isinstance(place, FusedSite):
                gradient = gradient * trained_entries(place).get(factor.removeprefix("lora_"), 1.0)
            found[f"{place.name}.{factor}"] = gradient
    return found


def _layer_difference(name: str, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Of `[1, tokens, d]`; `relative` is that of the worst token, since the first one of a text often has activations
    thousands of times as large as all others, in whose norm a fault would drown."""
    if ours.shape != theirs.shape:
        return Difference(name, float("inf"), float("inf"))
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    share = np.linalg.norm(ours - theirs, axis=-1) / np.maximum(np.linalg.norm(theirs, axis=-1), 1e-30)
    worst = float(share.max())
    return Difference(
        name, worst if worst == worst else float("inf"), float(np.abs(ours - theirs).max(initial=0))
    )


def _difference(name: str, ours: np.ndarray, theirs: np.ndarray, floor: float = 0.0) -> Difference:
    if ours.shape != theirs.shape:
        return Difference(name, float("inf"), float("inf"))
    delta = ours.astype(np.float64) - theirs.astype(np.float64)
    scale = max(float(np.linalg.norm(theirs.astype(np.float64))), floor)
    norm = float(np.linalg.norm(delta))
    relative = norm / scale if scale > 0 else (0.0 if norm == 0 else float("inf"))
    # NaN would compare as "not over the limit": it is the worst difference there is.
    return Difference(
        name, relative if relative == relative else float("inf"), float(np.abs(delta).max(initial=0))
    )


def _report(
    path: str, adapter: str | None, tokens: int, ours: dict[str, Any], theirs: dict[str, Any], gradients: bool
) -> VerifyReport:
    count = len(theirs["layers"]) - 2
    names = ["embed_tokens", *(f"layers.{i}" for i in range(count)), "norm"]
    layers = tuple(
        _layer_difference(n, o, t) for n, o, t in zip(names, ours["layers"], theirs["layers"], strict=True)
    )
    logits = _difference("logits", ours["logits"], theirs["logits"])
    scale = float(np.abs(theirs["logits"]).max())
    logits_relative = logits.max_abs / max(scale, 1e-30)
    kl = _kl(theirs["logits"], ours["logits"])
    top1 = float(np.mean(ours["logits"].argmax(-1) == theirs["logits"].argmax(-1)))
    largest = max((float(np.linalg.norm(g)) for g in theirs["gradients"].values()), default=0.0)
    compared = tuple(
        _difference(name, ours["gradients"].get(name, np.zeros(0)), gradient, GRADIENT_FLOOR * largest)
        for name, gradient in theirs["gradients"].items()
    )
    if gradients and not compared:
        raise InputError(
            f"{path}: transformers gave no gradient to compare; check that the adapter trains something."
        )
    departures = [
        *(d.name for d in layers if d.relative > LAYER_LIMIT),
        *(["logits"] if not logits_relative <= LOGITS_LIMIT else []),
        *(["KL"] if not kl.mean() <= KL_LIMIT else []),
        *(["loss"] if not abs(ours["loss"] - theirs["loss"]) <= LOSS_LIMIT * abs(theirs["loss"]) else []),
        *(f"gradient of {d.name}" for d in compared if d.relative > GRADIENT_LIMIT),
    ]
    return VerifyReport(
        model=path,
        adapter=adapter,
        tokens=tokens,
        layers=layers,
        logits_max_abs=logits.max_abs,
        logits_relative=logits_relative,
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1_agreement=top1,
        loss=ours["loss"],
        loss_theirs=theirs["loss"],
        gradients=compared,
        first_departure=departures[0] if departures else None,
        passed=not departures,
        limits={
            "layer": LAYER_LIMIT,
            "logits": LOGITS_LIMIT,
            "kl": KL_LIMIT,
            "loss": LOSS_LIMIT,
            "gradient": GRADIENT_LIMIT,
        },
        versions=installed_versions(),
    )


def _kl(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) ‖ softmax(other)) per row, nats, in fp64; [tokens]."""
    p, q = (_log_softmax(x.astype(np.float64)) for x in (reference, other))
    return np.sum(np.exp(p) * (p - q), axis=-1)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
