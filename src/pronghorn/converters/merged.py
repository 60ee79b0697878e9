"""Merge an adapter into its base, write the result, and prove it before it gets its name.

The merged weights W + s B A are computed in fp32, one weight at a time, on their way to the disk; there is never a
second model in memory for that. Then the folder is loaded again and both models read the same 500 tokens:

  KL_t = sum_v p_t(v) (log p_t(v) - log q_t(v))        p the live model with its adapter, q the reloaded one

in fp32 for every token t. Above the limit of the dtype the folder is moved aside and the run fails: a merge that lost
the adapter looks like a good model until somebody compares.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.converters.carried_files import load_tokenizer, write_manifest, written_by_us
from pronghorn.converters.huggingface import load_model, write_model
from pronghorn.converters.safetensors_files import DEFAULT_SHARD_BYTES
from pronghorn.errors import InputError, RunError
from pronghorn.files import new_folder, write_json
from pronghorn.fingerprint import base_hash, same_base
from pronghorn.lora import attach, merge, remove_lora, split
from pronghorn.lora_sites import sites
from pronghorn.models.decoder import Decoder
from pronghorn.models.parameters import named_parameters
from pronghorn.new_tokens import with_tokens
from pronghorn.quantization import FP8Array, QuantizationConfig, is_quantized, read_quantization
from pronghorn.quantization.fp8 import unrounded

CHECK_NAME = "merge_check.json"
TOKENS = 500
# The KL of a faithful merge, in nats: (mean where the adapter does little, mean at most, largest of any token).
# A 16-bit merge rounds every weight once more than the live model, which keeps its adapter in fp32, and so every
# activation: SmolLM2-135M in bf16 has a mean of 8e-4. In between, a merge may lose a quarter of the adapter's effect.
KL_LIMITS = {"float32": (1e-6, 1e-6, 1e-4), "float16": (1e-4, 1e-3, 5e-2), "bfloat16": (4e-3, 2e-2, 1.0)}
_KL_ROWS = 50  # tokens whose logits are in memory at a time

FIXTURE = """\
The river Severn rises on the slopes of Plynlimon and runs for 354 kilometres to the sea. In 1779 \
the first iron bridge in the world was built across it: five arched ribs, cast in open sand moulds, \
carry the road. Nobody knows how the pieces, some of them over five tonnes, were lifted; there are \
no drawings of the scaffold.

def mean(values: list[float]) -> float:
    \"\"\"The arithmetic mean; raises ValueError for an empty list.\"\"\"
    if not values:
        raise ValueError("mean of nothing")
    return sum(values) / len(values)

Question: A train leaves at 14:35 and arrives at 17:20. How long is the journey? Answer: 2 hours and \
45 minutes, that is 165 minutes. Die Katze sitzt auf der Fensterbank und schaut hinaus. La pluie \
tombe depuis ce matin. 12 + 30 = 42. {"name": "value", "list": [1, 2.5, null, true]}. Water boils at \
100 degrees Celsius at sea level and at about 93 degrees at 2000 metres, since the pressure of the \
air is lower there. E = mc^2; a^2 + b^2 = c^2; the sum of the first n odd numbers is n^2.

1. Preheat the oven to 180 degrees. 2. Mix 250 g of flour, 100 g of sugar and a pinch of salt. 3. \
Rub in 125 g of cold butter. 4. Rest the dough for half an hour. 5. Bake until golden. Serve with \
coffee, tea, or nothing at all.
"""
MESSAGES = (
    {"role": "user", "content": "What is 2 + 2?\nAnswer with a number: <b>é</b> 世界"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And doubled?"},
)


def save_merged(
    model: Decoder,
    tokenizer: Any,
    out_dir: str | Path,
    *,
    dtype: str | None = None,
    base: str | Path | None = None,
    quantization: str | QuantizationConfig | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `model` with its adapter merged in as a Hugging Face folder, reload it, and compare.

    A quantised base is dequantised: then the result is the very model that was trained. With `base`, the adapter is
    merged into that 16-bit model instead, of which the quantised one was a copy: what is lost is what the adapter had
    learned of the quantisation's errors. The report says which it was and gives the KL of both comparisons.

    The folder appears by one rename after the comparison; `merge_check.json` in it holds the returned numbers.

    Args:
      model: with an adapter or without.
      tokenizer: a transformers tokenizer, saved with the model; None takes the files of the model's source folder.
      out_dir: must not exist, or be empty, or hold nothing but what an earlier save wrote (which is then replaced).
      dtype: of the merged weights; None keeps each weight's own.
      base: the 16-bit model to merge into, a folder or hub name; None takes the model's own weights.
      quantization: write the merged model as bitsandbytes does, after it was proved in 16 bits: "nf4", "fp4", "int8" or
        a recipe.
      max_shard_bytes: largest file of weights.
      overwrite: replace `out_dir` whatever it holds.

    Returns:
      `kl_mean`, `kl_max` (nats; live model against reloaded model), `kl_mean_limit`, `kl_max_limit`, `adapter_kl_mean`
      (live model against its base: what there was to lose), `top1_agreement`, `tokens`, `dtype`, `untied`, `base`
      ("own", "dequantised" or the folder given). With `base`, the live model of these is the adapter on that base; on
      an FP8 base, the one that does not round activations, as none does in 16 bits. `live_kl_mean` and `live_kl_max`
      are then against `model` itself. With `quantization`, `quantized_kl_mean` and `quantized_kl_max` are the distance
      of what was written from `model`, which is what that kind costs.

    Raises:
      InputError: the folder is taken, or the dtype cannot hold the weights.
      RunError: the reloaded model departs from the live one, or its chat template does; the message says where the
        folder was moved.
    """
    out_dir = Path(out_dir)
    trained, quantization = model, read_quantization(quantization)
    with new_folder(out_dir, replace=overwrite or written_by_us(out_dir)) as folder:
        kind = "dequantised" if _is_quantized(model) else "own"
        if base is not None:
            model, kind = rebase(model, base), str(base)
        write_model(folder, model, tokenizer_from=tokenizer, dtype=dtype, max_shard_bytes=max_shard_bytes)
        stacked = any(segment.stacked for segment in model.segments)
        reloaded = load_model(folder, layers="scanned" if stacked else "unrolled")
        report = compare_models(_unrounded(model), reloaded, fixture_ids(model, tokenizer))
        report["base"] = kind
        if base is not None or _is_quantized(model, FP8Array):
            live = compare_models(trained, reloaded, fixture_ids(model, tokenizer))
            report |= {"live_kl_mean": live["kl_mean"], "live_kl_max": live["kl_max"]}
        report["untied"] = reloaded.config.tie_word_embeddings != model.config.tie_word_embeddings
        fault = _fault(report) or _template_fault(tokenizer, folder)
        if quantization is not None and not fault:
            small = _written_quantized(folder, tokenizer, quantization, max_shard_bytes)
            found = compare_models(trained, small, fixture_ids(model, tokenizer))
            report |= {
                "quantization": quantization.kind,
                "quantized_kl_mean": found["kl_mean"],
                "quantized_kl_max": found["kl_max"],
            }
        write_json(folder / CHECK_NAME, report)
        write_manifest(folder, "merged")
        if fault:
            aside = _move_aside(folder, out_dir)
            raise RunError(f"{out_dir}: {fault}; nothing was published, and the rejected folder is {aside}.")
    return report


def _written_quantized(
    folder: Path, tokenizer: Any, quantization: QuantizationConfig, max_shard_bytes: int
) -> Decoder:
    """Replace the 16-bit model in `folder` by its quantised copy; returns that, read back."""
    inner = folder / "quantized"
    model = load_model(folder, quantization=quantization)
    inner.mkdir()
    write_model(inner, model, tokenizer_from=tokenizer, max_shard_bytes=max_shard_bytes, keep_quantized=True)
    for file in [path for path in folder.iterdir() if path.is_file()]:
        file.unlink()
    for file in list(inner.iterdir()):
        file.rename(folder / file.name)
    inner.rmdir()
    return load_model(folder)


def rebase(model: Decoder, base: str | Path) -> Decoder:
    """The adapter of `model` on the model of another folder: the 16-bit one that a quantised base was made from.

    Raises:
      InputError: `model` has no adapter, or the folder holds another model.
    """
    info = model.adapter
    if info is None:
        raise InputError(f"{base}: there is no adapter to merge into it.")
    if info.init == "loftq":
        raise InputError(
            f"{base}: an adapter that started by LoftQ holds what the quantised base lost, and the 16-bit one has that "
            "already; leave the base out."
        )
    stacked = any(segment.stacked for segment in model.segments)
    other = load_model(base, dtype=model.dtype.name, layers="scanned" if stacked else "unrolled")
    if _is_quantized(other):
        raise InputError(f"{base}: is quantised; give the 16-bit model, or leave the base out.")
    if not same_base(base_hash(model), base_hash(other)):
        raise InputError(f"{base}: is not the model that the quantised base was made from.")
    factors = {name: site.factors for name, site in sites(model).items()}
    rows = {
        name: site.new_rows.get_value() for name, site in sites(model).items() if site.new_rows is not None
    }
    if model.new_tokens is not None:
        other = with_tokens(other, model.new_tokens.first, model.new_tokens.count)
    return attach(other, {name: f for name, f in factors.items() if f is not None}, info, rows)


def _is_quantized(model: Decoder, kind: type = object) -> bool:
    values = (p.variable.get_value() for p in named_parameters(model).values())
    return any(is_quantized(value) and isinstance(value, kind) for value in values)


def _unrounded(model: Decoder) -> Decoder:
    """The model with products of its FP8 weights as they are in 16 bits."""
    graph, trainable, frozen = split(model)
    is_fp8 = lambda value: isinstance(value, FP8Array)  # noqa: E731
    return merge(graph, trainable, jax.tree.map(unrounded, frozen, is_leaf=is_fp8))


def fixture_ids(model: Decoder, tokenizer: Any, tokens: int = TOKENS) -> np.ndarray:
    """int32 `[1, tokens]`: a fixed text (prose, code, numbers, languages), repeated to length; without a tokenizer,
    ids drawn with a fixed seed. Ids that the model lacks are left out."""
    vocab = model.config.vocab_size
    tokens = min(tokens, model.config.max_position_embeddings)
    if tokenizer is not None:
        ids = np.asarray(tokenizer(FIXTURE, add_special_tokens=True)["input_ids"], np.int64).reshape(-1)
        ids = ids[(ids >= 0) & (ids < vocab)]
        if np.unique(ids).size > 16:
            return np.resize(ids, (1, tokens)).astype(np.int32)
    return np.random.default_rng(0).integers(0, vocab, (1, tokens)).astype(np.int32)


def compare_models(live: Decoder, other: Decoder, input_ids: np.ndarray) -> dict[str, Any]:
    """KL per token of `other` against `live`, with the limits of the coarser dtype of the two.

    Args:
      live: the reference, with an adapter or without.
      other: the model to judge.
      input_ids: int32 `[1, tokens]`.

    Returns:
      what `save_merged` returns, `untied` aside.
    """
    ids = jnp.asarray(input_ids)
    p, q = split(live), split(other)
    p_hidden = _hidden_states(*p, ids)
    kl, agreement = _kl(p, p_hidden, q, _hidden_states(*q, ids))
    effect = 0.0
    if live.adapter is not None:
        graph, adapter, frozen = p
        base = (graph, jax.tree_util.tree_map_with_path(_without_effect, adapter), frozen)
        if live.adapter.use_dora or live.adapter.init not in ("kaiming", "gaussian"):
            base = split(remove_lora(live))  # with zeros for factors there would be no such model
        effect = float(np.mean(_kl(p, p_hidden, base, _hidden_states(*base, ids))[0]))
    dtype = max(live.dtype.name, other.dtype.name, key=lambda name: KL_LIMITS[name])
    floor, ceiling, max_limit = KL_LIMITS[dtype]
    return {
        "kl_mean": float(np.mean(kl)),
        "kl_max": float(np.max(kl)),
        "kl_mean_limit": min(ceiling, max(floor, effect / 4)),
        "kl_max_limit": max_limit,
        "adapter_kl_mean": effect,
        "top1_agreement": agreement,
        "tokens": int(input_ids.size),
        "dtype": dtype,
    }


def _without_effect(path: Any, leaf: jax.Array) -> jax.Array:
    """Zero, but for the rows of new tokens: without these there would be no such token at all."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return leaf if "lora_new_rows" in name else jnp.zeros_like(leaf)


@functools.partial(jax.jit, static_argnums=0)
def _hidden_states(graph: Any, trainable: Any, frozen: Any, input_ids: jax.Array) -> jax.Array:
    """`[tokens, d]` after the final norm."""
    return merge(graph, trainable, frozen).hidden_states(input_ids)[0]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _kl_block(
    p_graph: Any, p_state: Any, p_hidden: jax.Array, q_graph: Any, q_state: Any, q_hidden: jax.Array
) -> tuple[jax.Array, jax.Array]:
    p = jax.nn.log_softmax(merge(p_graph, *p_state).logits(p_hidden))
    q = jax.nn.log_softmax(merge(q_graph, *q_state).logits(q_hidden))
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1), jnp.argmax(p, -1) == jnp.argmax(q, -1)


def _kl(
    p: tuple[Any, Any, Any], p_hidden: jax.Array, q: tuple[Any, Any, Any], q_hidden: jax.Array
) -> tuple[np.ndarray, float]:
    """(KL of each token, share of tokens where both prefer the same next one), a block of logits at a time."""
    blocks = [
        _kl_block(p[0], p[1:], p_hidden[i : i + _KL_ROWS], q[0], q[1:], q_hidden[i : i + _KL_ROWS])
        for i in range(0, p_hidden.shape[0], _KL_ROWS)
    ]
    kl, agreement = (np.concatenate([np.asarray(block[i]) for block in blocks]) for i in range(2))
    return kl, float(np.mean(agreement))


def _fault(report: dict[str, Any]) -> str | None:
    """What is wrong with the numbers; a NaN is above every limit."""
    fine = report["kl_mean"] <= report["kl_mean_limit"] and report["kl_max"] <= report["kl_max_limit"]
    if fine:
        return None
    return (
        f"the merged model departs from the live one: KL mean {report['kl_mean']:.2e}, largest {report['kl_max']:.2e}, "
        f"and {report['dtype']} allows {report['kl_mean_limit']:.1e} and {report['kl_max_limit']:.1e}"
    )


def _template_fault(tokenizer: Any, folder: Path) -> str | None:
    """Compare what two tokenizers render from the same messages, byte for byte."""
    if tokenizer is None:
        return None
    saved = load_tokenizer(folder)
    if saved is None:
        return "the tokenizer was not saved with the model"
    before, after = _rendered(tokenizer), _rendered(saved)
    if before != after:
        return "the saved chat template renders other text than the tokenizer given"
    if tokenizer.special_tokens_map != saved.special_tokens_map:
        return "the saved special tokens are not those of the tokenizer given"
    return None


def _rendered(tokenizer: Any) -> list[bytes | str]:
    """The fixture conversation through the chat template (or the refusal of a template that cannot take it)."""
    if not tokenizer.chat_template:
        return []
    texts: list[bytes | str] = []
    for prompt in (False, True):
        try:
            text = tokenizer.apply_chat_template(list(MESSAGES), tokenize=False, add_generation_prompt=prompt)
            texts.append(text.encode("utf-8", "surrogatepass"))
        except Exception as error:  # a template may raise whatever it likes
            texts.append(type(error).__name__)
    return texts


def _move_aside(folder: Path, out_dir: Path) -> Path:
    aside = out_dir.with_name(f"{out_dir.name}.rejected-{os.getpid()}")
    number = 1
    while aside.exists():
        aside = out_dir.with_name(f"{out_dir.name}.rejected-{os.getpid()}-{number}")
        number += 1
    folder.rename(aside)
    return aside
