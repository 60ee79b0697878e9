"""What is checked of every family against transformers: the checks behind `test_families.py` and docs/models.md.

Each case is a tiny random model of transformers with the real structure: at least one period of the layer pattern and
one layer more, an odd vocabulary, fewer key/value heads than query heads. All in fp32.
"""

import copy
import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.converters.huggingface import load_model, save_model
from pronghorn.converters.peft import load_adapter, save_adapter
from pronghorn.converters.safetensors_files import open_weights
from pronghorn.lora import merge, merge_lora, split
from pronghorn.models import Decoder, flat_arrays, rope
from pronghorn.models.families import family_named
from tests.models.reference import forward, gradient_error, random_ids, tiny_torch_model
from tests.tolerances import MODEL_GRADIENT, MODEL_LOGITS

TOKENS, FIRST = 500, 301  # tokens of a row, and of the first of two documents packed into one
CHUNK = 20  # tokens decoded at a time, over twice as many
CHECKS = ("logits", "gradients", "decoding", "round trip", "transformers reads it", "PEFT")
LIMITS = dict.fromkeys(CHECKS, MODEL_LOGITS) | {"gradients": MODEL_GRADIENT, "round trip": 0.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to build: overrides of the sizes in `reference.py`, and how our layers are laid out."""

    model_type: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    layers: str = "unrolled"


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of one check: the worst difference seen."""

    family: str
    model_type: str
    check: str
    worst: float
    passed: bool


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(6)],
    "long_factor": [1.0 + 0.7 * i for i in range(6)],
}
# Their files hold several linears as one, which PEFT adapts as one: not exchanged yet.
WITHOUT_PEFT = ("phi3", "glm", "glm4")
# family name -> case. Windows of 17 tokens cut in every check.
CASES = {
    "llama": Case("llama", {"mlp_bias": True}, "scanned"),
    "mistral": Case("mistral", {"sliding_window": 17, "head_dim": 10}, "scanned"),
    "ministral": Case(
        "ministral",
        {
            "head_dim": 10,
            "sliding_window": 17,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "num_hidden_layers": 4,
        },
    ),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}, "scanned"),
    "qwen3": Case("qwen3", {"head_dim": 12}, "scanned"),
    "gemma": Case("gemma", {"head_dim": 12}, "scanned"),
    "gemma2": Case(
        "gemma2",
        {
            "head_dim": 12,
            "sliding_window": 17,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            "head_dim": 12,
            "sliding_window": 17,
            "query_pre_attn_scalar": 20,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": Case(
        "phi3",
        {
            "hidden_size": 96,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 150,
            "rope_scaling": LONGROPE,
        },
        "scanned",
    ),
    "smollm3": Case("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}),
    "olmo2": Case("olmo2", {}, "scanned"),
    "olmo3": Case(
        "olmo3",
        {
            "num_hidden_layers": 5,
            "sliding_window": 17,
            "rope_parameters": {
                "full_attention": YARN | {"rope_theta": 500000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            },
        },
    ),
    "granite": Case(
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
            "attention_bias": True,
        },
        "scanned",
    ),
    "cohere": Case("cohere", {"use_qk_norm": True, "logit_scale": 0.25, "attention_bias": True}, "scanned"),
    "cohere2": Case("cohere2", {"num_hidden_layers": 5, "sliding_window": 17, "logit_scale": 0.25}),
    "starcoder2": Case("starcoder2", {"sliding_window": 17}, "scanned"),
    "seed_oss": Case("seed_oss", {"head_dim": 10}, "scanned"),
    "apertus": Case("apertus", {}, "scanned"),
    "ernie4_5": Case("ernie4_5", {"head_dim": 12, "use_bias": True}, "scanned"),
    "exaone4": Case("exaone4", {"num_hidden_layers": 5, "sliding_window": 17}),
    "nemotron": Case("nemotron", {"mlp_bias": True}, "scanned"),
    "stablelm": Case("stablelm", {"hidden_size": 96, "use_qkv_bias": True}, "scanned"),
    "hunyuan": Case(
        "hunyuan_v1_dense",
        {
            "head_dim": 10,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1e4},
        },
        "scanned",
    ),
    "helium": Case("helium", {"head_dim": 8}, "scanned"),
    "arcee": Case("arcee", {"rope_parameters": YARN | {"rope_theta": 1e4}}, "scanned"),
    "glm": Case("glm", {"head_dim": 12}, "scanned"),
    "glm4": Case("glm4", {"head_dim": 12}, "scanned"),
}


def checks_of(family: str) -> list[str]:
    """The checks that a family is put through."""
    return [check for check in CHECKS if check != "PEFT" or family not in WITHOUT_PEFT]


@functools.cache
def results(family: str) -> dict[str, Result]:
    """Every check of a family, by its name."""
    case = CASES[family]
    # A padding token's row of the embedding would get no gradient in torch.
    plain = (
        {"num_hidden_layers": 2} if case.layers == "scanned" else {}
    )  # all layers alike: a period and one more
    torch_model = tiny_torch_model(case.model_type, pad_token_id=None, **plain, **case.overrides)
    with tempfile.TemporaryDirectory() as folder:
        worst = _worst(torch_model, case, Path(folder))
    return {
        check: Result(family, case.model_type, check, worst[check], worst[check] <= LIMITS[check])
        for check in checks_of(family)
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
    adapters = (
        {} if model.config.family in WITHOUT_PEFT else {"PEFT": _peft_difference(torch_model, model, folder)}
    )
    return adapters | {
        "logits": float(np.max(np.abs(logits - expected_logits))),
        "gradients": _gradient_difference(model, gradients, expected_gradients),
        "decoding": _decoding_difference(model, ids[:1, : 2 * CHUNK], logits[: 2 * CHUNK]),
        "round trip": _files_difference(folder / "theirs", folder / "ours"),
        "transformers reads it": _reread_difference(torch_model, model, folder / "ours", ids[:1, :50]),
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


def _gradient_difference(model: Decoder, gradients: dict[str, Any], expected: dict[str, np.ndarray]) -> float:
    """The worst of all parameters, each relative to its norm."""
    family = family_named(model.config.family)
    rows: dict[str, np.ndarray] = {}
    for name, parts in family.fused_tensors(model.config).items():
        whole = expected.pop(name)
        cuts = np.cumsum([count for _, count in parts])[:-1]
        rows |= dict(zip([part for part, _ in parts], np.split(whole, cuts), strict=True))
    expected = expected | rows
    names = family.tensor_names(model.config)
    names = {
        ours: theirs for ours, theirs in names.items() if not theirs.endswith(("act_fn.beta", "act_fn.eps"))
    }
    assert sorted(names.values()) == sorted(expected), "every parameter is compared"
    return max(gradient_error(gradients[ours], expected[theirs]) for ours, theirs in names.items())


def _decoding_difference(model: Decoder, ids: np.ndarray, expected: np.ndarray) -> float:
    """Two chunks through the cache, against the start of one full pass: what follows changes nothing."""
    if rope.depends_on_length(model.config.rope):  # but the frequencies
        expected = forward(model, ids)[0]
    graph, trained, frozen = split(model)
    step = jax.jit(lambda trained, frozen, *given: merge(graph, trained, frozen).decode(*given))
    cache, logits = model.init_cache(1, 2 * CHUNK), []
    for start in (0, CHUNK):
        positions = np.arange(start, start + CHUNK)[None]
        piece, cache = step(trained, frozen, ids[:, start : start + CHUNK], cache, positions)
        logits.append(piece)
    return float(np.max(np.abs(np.concatenate(logits, axis=1)[0] - expected)))


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


def _peft_difference(torch_model: Any, model: Decoder, folder: Path) -> float:
    """Merged weights: PEFT's own adapter as we read it, and as PEFT reads it after we have written it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    options = LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(torch_model), options)
    theirs.save_pretrained(str(folder / "peft"))
    adapted = load_adapter(model, folder / "peft")
    save_adapter(adapted, folder / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(torch_model), str(folder / "adapter"))
    expected, reread = (built.merge_and_unload().state_dict() for built in (theirs, again))
    merged, base = flat_arrays(merge_lora(adapted)), torch_model.state_dict()
    worst, changed = 0.0, 0
    for ours, name in family_named(model.config.family).tensor_names(model.config).items():
        changed += not bool((expected[name] == base[name]).all())
        for found in (np.asarray(merged[ours]), reread[name].numpy()):
            worst = max(worst, float(np.max(np.abs(found - expected[name].numpy()))))
    linears = 4 + (3 if model.config.gated_mlp else 2)
    assert changed == linears * model.config.num_layers, "every linear was adapted"
    return worst


__all__ = ["CASES", "CHECKS", "LIMITS", "Result", "checks_of", "results"]
