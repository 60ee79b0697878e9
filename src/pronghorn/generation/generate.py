"""Text from a model: one compiled prefill, and one compiled loop for all tokens that follow.

Prompts are padded on the right to a bucket, and so are the number of rows and the number of new tokens; inside, the
real lengths are arrays. So a program is compiled once a bucket (powers of two), not once a prompt. The prefill goes
through the prompts in pieces, since the model returns logits for every position of a call and only the last of each
row is wanted: a piece keeps them below `_LOGIT_BYTES`.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pronghorn.data.chat_template import template_for
from pronghorn.errors import InputError, RunError
from pronghorn.generation.sampling import Mode, Sampling, SamplingArrays, choose, row_keys, step_keys
from pronghorn.models import rope
from pronghorn.models.decoder import Decoder
from pronghorn.pallas_kernels.launch import cdiv, next_power_of_2

Prompt = str | Sequence[Mapping[str, Any]]

_SMALLEST_BUCKET = 32  # prompt tokens, and new tokens
_LOGIT_BYTES = 256 * 2**20
_PIECE = 256  # positions of one piece of the prefill, at most


def generate(
    model: Decoder,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_token_ids: Iterable[int] | None = None,
) -> str:
    """The model's answer to one prompt.

    Args:
      model: with or without adapters.
      tokenizer: a transformers tokenizer.
      prompt: text, which is continued as it is, or chat messages `[{"role": .., "content": ..}, ..]`, which are put
        through the tokenizer's template.
      max_new_tokens: the answer ends here if no stop token comes first.
      temperature, top_p, top_k, seed: see `Sampling`.
      stop_token_ids: tokens that end the answer; None takes those of the tokenizer and the generation config.

    Returns:
      The answer without special tokens.

    Raises:
      InputError: an empty or too long prompt, an option out of range, messages without a chat template.
      RunError: the model gives NaN.
    """
    return generate_batch(
        model,
        tokenizer,
        [prompt],
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_p, top_k, seed),
        stop_token_ids=stop_token_ids,
    )[0]


def generate_batch(
    model: Decoder,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop_token_ids: Iterable[int] | None = None,
) -> list[str]:
    """`generate` for several prompts at once, of any lengths. See there."""
    template = None
    token_ids = []
    for prompt in prompts:
        if isinstance(prompt, str):
            token_ids.append(tokenizer(prompt)["input_ids"])
        else:
            template = template or template_for(tokenizer)
            text = template.render(list(prompt), add_generation_prompt=True)
            # the template writes the bos token itself
            token_ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    stops = default_stop_tokens(model, tokenizer) if stop_token_ids is None else list(stop_token_ids)
    answers = generate_tokens(
        model, token_ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_token_ids=stops
    )
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def sampler(
    tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 64
) -> Callable[[Decoder], list[str]]:
    """A function from a model to its answers without chance, for a `Trainer` to call while it trains.

    Args:
      tokenizer: of the model.
      prompts: user messages where the tokenizer has a chat template, else texts to continue.
      max_new_tokens: at most so many an answer.
    """
    asked: list[Prompt] = list(prompts)
    if tokenizer.chat_template:
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return lambda model: generate_batch(model, tokenizer, asked, max_new_tokens=max_new_tokens)


def generate_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop_token_ids: Iterable[int] = (),
) -> list[list[int]]:
    """New tokens for each prompt.

    Args:
      model: with or without adapters.
      prompts: token ids, one list a row; lengths may differ.
      max_new_tokens: at most so many a row.
      sampling: None takes the likeliest token.
      stop_token_ids: a row ends with the first of these, which is its last token.

    Returns:
      One list a prompt.

    Raises:
      InputError: an empty prompt, an id outside of the vocabulary, or more tokens than the model's context.
      RunError: the model gives NaN.
    """
    sampling = sampling or Sampling()
    _check(model, prompts, max_new_tokens)
    stops = sorted(set(stop_token_ids))
    # where frequencies follow from the length of a call, rows of one call would change each other
    together = 1 if rope.depends_on_length(model.config.rope) else max(1, len(prompts))
    answers: list[list[int]] = []
    for first in range(0, len(prompts), together):
        part = prompts[first : first + together]
        answers += _generate_rows(model, part, first, max_new_tokens, sampling, stops)
    return answers


def _generate_rows(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    first_row: int,
    max_new_tokens: int,
    sampling: Sampling,
    stops: list[int],
) -> list[list[int]]:
    rows = next_power_of_2(len(prompts))
    lengths = np.zeros(rows, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    padded = np.zeros((rows, _bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(padded, prompts, strict=False):
        row[: len(prompt)] = prompt
    new_tokens = _bucket(max_new_tokens)
    # a handful of sizes, so that another number of stop tokens is not another program
    padded_stops = np.full(next_power_of_2(max(4, len(stops))), -1, np.int32)
    padded_stops[: len(stops)] = stops
    graph, state = nnx.split(model)
    first, cache = _prefill(
        graph,
        state,
        padded,
        lengths,
        cache_length=padded.shape[1] + new_tokens,
        piece=_piece(model, *padded.shape),
    )
    tokens, counts, finite, _ = _decode(
        graph,
        state,
        first,
        cache,
        lengths,
        np.int32(max_new_tokens),
        padded_stops,
        row_keys(sampling.seed, first_row, rows),
        sampling.arrays(),
        new_tokens=new_tokens,
        mode=sampling.mode,
    )
    if not bool(finite):
        raise RunError(
            "the model gives logits that are not finite, so no text can be generated; check its weights, and use "
            "bfloat16 or float32 if this is float16."
        )
    found, ends = np.asarray(tokens), np.asarray(counts)
    return [found[row, : ends[row]].tolist() for row in range(len(prompts))]


def default_stop_tokens(model: Decoder, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: of the tokenizer, of generation_config.json beside the weights, of config.json.

    Instruct models often name the end of a turn only in the generation config.
    """
    found: set[int] = set()
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    if model.source is not None:
        texts = [model.source.hf_config]
        file = Path(model.source.path) / "generation_config.json"
        if file.is_file():
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
        for text in texts:
            found |= _eos_of(text)
    return sorted(found)


def _eos_of(text: str) -> set[int]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return set()
    ids = value.get("eos_token_id") if isinstance(value, dict) else None
    return {i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int and 0 <= i < 2**31}


def _bucket(count: int) -> int:
    return max(_SMALLEST_BUCKET, next_power_of_2(count))


def _piece(model: Decoder, rows: int, prompt_bucket: int) -> int:
    """Positions of one prefill call, a power of two that divides the bucket."""
    if rope.depends_on_length(model.config.rope):
        return prompt_bucket  # frequencies follow from the whole prompt's length
    allowed = max(1, _LOGIT_BYTES // (4 * rows * model.config.vocab_size))
    return min(_PIECE, prompt_bucket, 1 << (allowed.bit_length() - 1))


def _check(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {number} is empty; give at least one token.")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise InputError(
                f"prompt {number} has a token outside of the model's vocabulary of {vocab}; "
                "use the tokenizer that belongs to the model."
            )
        if len(prompt) + max_new_tokens > context:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, which with max_new_tokens={max_new_tokens} exceeds the "
                f"model's context of {context}; shorten either."
            )


@functools.partial(jax.jit, static_argnames=("graph", "cache_length", "piece"))
def _prefill(
    graph: Any, state: Any, input_ids: jax.Array, lengths: jax.Array, *, cache_length: int, piece: int
) -> tuple[jax.Array, Any]:
    """Logits after each row's last prompt token, fp32 `[batch, vocab]`, and the filled cache."""
    model = nnx.merge(graph, state)
    rows = input_ids.shape[0]

    def body(index: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        last, cache = carry
        ids = jax.lax.dynamic_slice_in_dim(input_ids, index * piece, piece, axis=1)
        at = index * piece + jnp.arange(piece, dtype=jnp.int32)[None]
        logits, cache = model.decode(ids, cache, jnp.where(at < lengths[:, None], at, -1))
        ends = lengths - 1 - index * piece
        here = jnp.take_along_axis(logits, jnp.clip(ends, 0, piece - 1)[:, None, None], axis=1)[:, 0]
        return jnp.where(((ends >= 0) & (ends < piece))[:, None], here, last), cache

    empty = jnp.zeros((rows, model.config.vocab_size), jnp.float32)
    pieces = cdiv(jnp.max(lengths), piece)  # pieces of padding alone are not computed
    return jax.lax.fori_loop(0, pieces, body, (empty, model.init_cache(rows, cache_length)))


class _Loop(NamedTuple):
    step: jax.Array  # tokens chosen so far
    token: jax.Array  # [batch], the newest
    cache: Any
    tokens: jax.Array  # [batch, new_tokens]
    counts: jax.Array  # [batch], tokens of each row, its stop token included
    done: jax.Array  # [batch]
    finite: jax.Array


@functools.partial(jax.jit, static_argnames=("graph", "new_tokens", "mode"), donate_argnames=("cache",))
def _decode(
    graph: Any,
    state: Any,
    logits: jax.Array,
    cache: Any,
    lengths: jax.Array,
    limit: jax.Array,
    stops: jax.Array,
    keys: jax.Array,
    settings: SamplingArrays,
    *,
    new_tokens: int,
    mode: Mode,
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """The loop: tokens `[batch, new_tokens]`, how many of them each row has, and whether all logits were finite.

    The cache is given back only so that the one that came in can be written in place.
    """
    model = nnx.merge(graph, state)

    def accept(logits: jax.Array, loop: _Loop) -> _Loop:
        token = choose(logits, step_keys(keys, loop.step), settings, mode)
        # only rows that still run may stop the whole: a row of padding has no meaning
        finite = jnp.all(jnp.isfinite(jnp.max(logits, axis=-1)) | loop.done)
        return _Loop(
            loop.step + 1,
            token,
            loop.cache,
            loop.tokens.at[:, loop.step].set(token),
            loop.counts + ~loop.done,
            loop.done | jnp.any(token[:, None] == stops, axis=1),
            loop.finite & finite,
        )

    def running(loop: _Loop) -> jax.Array:
        return (loop.step < limit) & ~jnp.all(loop.done) & loop.finite

    def body(loop: _Loop) -> _Loop:
        positions = jnp.where(loop.done, -1, lengths + loop.step - 1)
        logits, cache = model.decode(loop.token[:, None], loop.cache, positions[:, None])
        return accept(logits[:, 0], loop._replace(cache=cache))

    rows = lengths.shape[0]
    start = _Loop(
        jnp.int32(0),
        jnp.zeros(rows, jnp.int32),
        cache,
        jnp.zeros((rows, new_tokens), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        lengths == 0,  # rows that fill up the batch
        jnp.bool_(True),
    )
    loop = jax.lax.while_loop(running, body, accept(logits, start))
    return loop.tokens, loop.counts, loop.finite, loop.cache
