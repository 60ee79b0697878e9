"""What is checked of every family against transformers: the checks behind `test_families.py` and docs/models.md.

The cases are in `family_cases.py`.
"""

import copy
import dataclasses
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.converters.huggingface import load_model, save_model
from pronghorn.converters.peft import load_adapter, save_adapter
from pronghorn.converters.safetensors_files import open_weights
from pronghorn.lora import LoRAConfig, merge, merge_lora, split
from pronghorn.lora_sites import select, transformers_names
from pronghorn.models import Decoder, flat_arrays
from pronghorn.models.families import family_named
from pronghorn.models.tensor_names import by_our_names
from tests.models.family_cases import CASES, VARIANTS, Case
from tests.models.reference import gradient_error, random_ids, tiny_torch_model
from tests.tolerances import MODEL_GRADIENT, MODEL_LOGITS

TOKENS, FIRST = 500, 301  # tokens of a row, and of the first of two documents packed into one
CHUNK = 20  # tokens decoded at a time, over twice as many
CHECKS = ("logits", "gradients", "decoding", "round trip", "transformers reads it", "PEFT", "NF4")
LIMITS = dict.fromkeys(CHECKS, MODEL_LOGITS) | {"gradients": MODEL_GRADIENT, "round trip": 0.0, "NF4": 1e-3}


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of one check: the worst difference seen."""

    family: str
    model_type: str
    check: str
    worst: float
    passed: bool


@functools.cache
def results(family: str) -> dict[str, Result]:
    """Every check of a family, or of a variant of one, by its name."""
    case = (CASES | VARIANTS)[family]
    # A padding token's row of the embedding would get no gradient in torch.
    plain = (
        {"num_hidden_layers": 2} if case.layers == "scanned" else {}
    )  # all layers alike: a period and one more
    torch_model = tiny_torch_model(case.model_type, pad_token_id=None, **plain, **case.overrides)
    with tempfile.TemporaryDirectory() as folder:
        worst = _worst(torch_model, case, Path(folder))
    return {
        check: Result(family, case.model_type, check, worst[check], worst[check] <= LIMITS[check])
        for check in CHECKS
    }


def _worst(torch_model: Any, case: Case, folder: Path) -> dict[str, float]:
    torch_model.save_pretrained(folder / "theirs")
    model = load_model(folder / "theirs", dtype="float32", layers=case.layers)
    ids = random_ids(TOKENS, batch=2)
    # Row 0 is one document, row 1 two.
    segments = np.ones_like(ids)
    segments[1, FIRST:] = 2
    documents = [ids[:1], ids[1:, :FIRST], ids[1:, FIRST:]]
    expected_logits, expected_gradients = _torch_results(torch_model, documents)
    logits, gradients = _our_results(model, ids, segments)
    assert np.std(expected_logits) > 0.1, "the comparison is of something"
    save_model(model, folder / "ours")
    return {
        "logits": float(np.max(np.abs(logits - expected_logits))),
        "gradients": _gradient_difference(model, gradients, expected_gradients),
        "round trip": _files_difference(folder / "theirs", folder / "ours"),
        "transformers reads it": _reread_difference(torch_model, model, folder / "ours", ids[:1, :50]),
        "PEFT": _peft_difference(torch_model, model, folder),
        **_quantized_differences(torch_model, folder, case, ids[:1, : 2 * CHUNK]),
    }


def _torch_results(torch_model: Any, documents: list[np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of every document, one after the other, and the gradient of the sum of their losses."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster, at this size
    found, total = [], torch.zeros(())
    for document in documents:
        tokens = torch.from_numpy(document).long()
        logits = torch_model(tokens).logits
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
        found.append(logits.detach().numpy()[0])
    (total / TOKENS).backward()
    torch.set_num_threads(threads)
    named = torch_model.named_parameters()
    return np.concatenate(found), {name: p.grad.numpy() for name, p in named if p.grad is not None}


def _our_results(model: Decoder, ids: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    graph, trained, frozen = split(model)
    counted = jnp.asarray(segments[:, 1:] == segments[:, :-1])

    def loss(trained, frozen):
        logits = merge(graph, trained, frozen)(jnp.asarray(ids), segment_ids=jnp.asarray(segments))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(counted, chosen, 0.0)) / TOKENS, logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained, frozen)
    named = flat_arrays(merge(graph, gradients, frozen))
    return np.asarray(logits).reshape(-1, logits.shape[-1]), named


def _by_our_names(model: Decoder, theirs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    config = model.config
    family = family_named(config.family)
    ways = family.names_in_memory, family.fused_tensors, family.interleaved_tensors
    return by_our_names(theirs, *(way(config) for way in ways))


def _gradient_difference(model: Decoder, gradients: dict[str, Any], expected: dict[str, np.ndarray]) -> float:
    """The worst of all parameters, each relative to its norm."""
    named = _by_our_names(model, expected)
    constant = ("act_fn.beta", "act_fn.eps", "e_score_correction_bias", "layer_scalar")
    assert sorted(named) == sorted(n for n in gradients if not n.endswith(constant)), (
        "every parameter is compared"
    )
    return max(gradient_error(gradients[name], gradient) for name, gradient in named.items())


def _quantized_differences(torch_model: Any, folder: Path, case: Case, ids: np.ndarray) -> dict[str, float]:
    """A folder that transformers and bitsandbytes quantised, read here, and tokens in two chunks through the cache,
    against the original with the weights that bitsandbytes makes of it: all of them in one pass.

    "NF4" is the first chunk's difference, "decoding" the second's, which sees the first in the cache.
    """
    import torch

    theirs = _quantized_by_transformers(folder / "theirs")
    theirs.save_pretrained(
        folder / "nf4"
    )  # in front of any forward pass, which repacks the weights on some CPUs
    coarse = _with_dequantized(copy.deepcopy(torch_model), theirs)
    with torch.no_grad():
        expected = coarse(torch.from_numpy(ids).long()).logits.numpy()
    model = load_model(folder / "nf4", dtype="float32", layers=case.layers)  # type: ignore[arg-type]
    graph, trained, frozen = split(model)
    step = jax.jit(lambda trained, frozen, *given: merge(graph, trained, frozen).decode(*given))
    cache, differences = model.init_cache(1, 2 * CHUNK), []
    for chunk in (slice(0, CHUNK), slice(CHUNK, 2 * CHUNK)):
        positions = np.arange(chunk.start, chunk.stop)[None]
        found, cache = step(trained, frozen, ids[:, chunk], cache, positions)
        differences.append(float(np.max(np.abs(np.asarray(found) - expected[:, chunk]))))
    return dict(zip(("NF4", "decoding"), differences, strict=True))


def _quantized_by_transformers(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=options, dtype=torch.float32, device_map="cpu"
    )


def _with_dequantized(torch_model: Any, quantized: Any) -> Any:
    """The model with what bitsandbytes makes of the other's 4-bit weights in place of its own."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    weights, count = torch_model.state_dict(), 0
    for name, parameter in quantized.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            # As rows of one block: where a row ends inside of one, bitsandbytes 0.50 dequantises wrongly on a CPU.
            if parameter.numel() * 2 >= state.blocksize:
                state.shape = torch.Size((parameter.numel() * 2 // state.blocksize, state.blocksize))
            weights[name].copy_(dequantize_4bit(parameter.data, state).reshape(weights[name].shape))
            count += 1
    assert count, "bitsandbytes quantised something"
    return torch_model


def _files_difference(theirs: Path, ours: Path) -> float:
    """0 where both folders hold the same tensors, bit for bit, else infinite."""
    one, other = open_weights(theirs), open_weights(ours)
    same = set(one) == set(other) and all(
        (one[n].shape, one[n].dtype) == (other[n].shape, other[n].dtype)
        and one[n].read().tobytes() == other[n].read().tobytes()
        for n in one
    )
    return 0.0 if same else float("inf")


def _reread_difference(torch_model: Any, model: Decoder, folder: Path, ids: np.ndarray) -> float:
    """Logits of what we wrote, config.json written by us as well, against the original, both in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    family = family_named(model.config.family)
    written = family.config_to_hf(model.config)
    assert family.config_from_hf(written) == model.config, "what we write we read alike"
    (folder / "config.json").write_text(json.dumps(written | {"pad_token_id": None}))
    reread = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokens = torch.from_numpy(ids).long()
    with torch.no_grad():
        return float((reread(tokens).logits - torch_model(tokens).logits).abs().max())


def _is_of_attention(name: str, module: Any) -> bool:
    import torch

    mixers = (".self_attn.", ".linear_attn.", ".mamba.")
    return isinstance(module, torch.nn.Linear) and any(mixer in name for mixer in mixers)


def _peft_difference(torch_model: Any, model: Decoder, folder: Path) -> float:
    """Merged weights: PEFT's own adapter as we read it, and as PEFT reads it after we have written it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    # Of a mixture PEFT would take the experts' names for all-linear, too; and it refuses all-linear where that chooses
    # linears which it adapts in no model of the family.
    sparse = model.config.experts is not None
    attention = [name for name, module in torch_model.named_modules() if _is_of_attention(name, module)]
    targets: Any = sorted({name.rpartition(".")[2] for name in attention}) if sparse else "all-linear"
    unadapted = family_named(model.config.family).unadapted
    if unadapted:
        config = LoRAConfig(targets="all-linear")
        targets = [transformers_names(model)[name] for name in select(model, config)]
    options = LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(torch_model), options)
    theirs.save_pretrained(str(folder / "peft"))
    adapted = load_adapter(model, folder / "peft")
    save_adapter(adapted, folder / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(torch_model), str(folder / "adapter"))
    expected, reread = (built.merge_and_unload().state_dict() for built in (theirs, again))
    expected, reread, base = (
        _by_our_names(model, {name: tensor.numpy() for name, tensor in state.items()})
        for state in (expected, reread, torch_model.state_dict())
    )
    merged = flat_arrays(merge_lora(adapted))
    changed = sum(not np.array_equal(expected[name], base[name]) for name in base)
    # Cohere's query and key norms are matrices as well: a row a head.
    linears = sum(
        len(array.shape) == 2
        and not any(part in name for part in ("norm", "mlp.gate.", "embed_tokens", "lm_head", *unadapted))
        for name, array in base.items()
    )
    assert changed == (len(attention) if sparse else linears), "every linear was adapted"
    return max(
        float(np.max(np.abs(found - expected[name])))
        for name in base
        for found in (np.asarray(merged[name]), reread[name])
    )


__all__ = ["CASES", "CHECKS", "LIMITS", "VARIANTS", "Result", "results"]
