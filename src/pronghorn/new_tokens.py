"""New tokens: a longer vocabulary, of which an adapter trains the new rows of embedding and head and nothing else.

A new token takes the first id that the tokenizer has free. Models often have more rows than their tokenizer has tokens,
and then no row is added. The rows start at the mean of the tokenizer's own (fp32), so a new token is at first as likely
as an average one, and no more (Hewitt 2021, "Initializing new word embeddings for pretrained language models",
https://nlp.stanford.edu/~johnhew/vocab-expansion.html).

Trained rows take the place of the weight's: `Embedding.lora_new_rows`, and in an untied model the head's as well. PEFT
calls them `trainable_token_indices` and stores them the same way. A tied model stays tied.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pronghorn.errors import InputError
from pronghorn.fingerprint import base_hash
from pronghorn.lora import NewTokens, attach_new_rows, shallow_copy
from pronghorn.models.decoder import Decoder
from pronghorn.models.layers import Embedding, Linear

MAX_TOKENS = 1024  # each costs a product of the hidden size for every token of a batch


def add_tokens(model: Decoder, tokenizer: Any, tokens: Sequence[str]) -> tuple[Decoder, Any]:
    """A model with rows for new tokens, and a tokenizer that knows them; both given ones stay as they are.

    With an adapter, now or later, the rows are trained with it and saved with it. A model without one has all its
    weights trained anyway.

    Example:
      >>> model, tokenizer = ph.load(folder)
      >>> model, tokenizer = ph.add_tokens(ph.add_lora(model), tokenizer, ["<tool>", "</tool>"])

    Args:
      model: its embedding and head in 16 or 32 bits; the layers may be quantised.
      tokenizer: a fast transformers tokenizer.
      tokens: at most 1,024 texts. One in angle or square brackets becomes a special token, which is left out when text
        is decoded without special tokens and can end a turn.

    Raises:
      InputError: a text that is a token already, or a model that cannot be given rows.
    """
    longer = extended_tokenizer(tokenizer, tokens)
    first = min(longer.convert_tokens_to_ids(list(tokens)))
    return with_tokens(model, first, len(tokens)), longer


def extended_tokenizer(tokenizer: Any, tokens: Sequence[str]) -> Any:
    """A copy of the tokenizer with the tokens at the end of its vocabulary.

    Raises:
      InputError: a token that is empty, given twice or known already.
    """
    from transformers import AddedToken

    if not 0 < len(tokens) <= MAX_TOKENS:
        raise InputError(
            f"new_tokens: {len(tokens)} tokens; give 1 to {MAX_TOKENS}, or train a tokenizer of your own."
        )
    known = tokenizer.get_vocab()
    for token in tokens:
        if not isinstance(token, str) or not token.strip():
            raise InputError(f"new_tokens: {token!r} is no token; give text such as <tool>.")
        if token in known:
            raise InputError(f"new_tokens: {token!r} is a token of the tokenizer already; leave it out.")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if list(tokens).count(token) > 1)
        raise InputError(f"new_tokens: {twice!r} is given twice; leave one out.")
    first = max(known.values()) + 1
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([AddedToken(t, special=_is_marker(t), normalized=False) for t in tokens])
    ids = longer.convert_tokens_to_ids(list(tokens))
    if sorted(ids) != list(range(first, first + len(tokens))):
        raise InputError(
            "new_tokens: the tokenizer does not number them one after the other at its end; use its own tokens."
        )
    return longer


def with_tokens(model: Decoder, first: int, count: int) -> Decoder:
    """A new model whose rows `first .. first + count - 1` are new; it shares every other array.

    Args:
      model: see `add_tokens`.
      first: also how many rows in front of it the mean is taken of.
      count: how many.

    Raises:
      InputError: the model has new tokens already, or its embedding or head is quantised.
    """
    if model.new_tokens is not None:
        raise InputError(
            "new_tokens: the model was given new tokens already; give all of them at once, or merge it first."
        )
    if model.config.extras is not None and model.config.extras.input_width:
        raise InputError(
            f"new_tokens: every layer of {model.config.family} has a table of its own with a row a token, to which no "
            "rows can be added; use tokens that the tokenizer has."
        )
    modules: list[Embedding | Linear] = [model.embed_tokens]
    if not model.config.tie_word_embeddings and model.lm_head is not None:
        modules.append(model.lm_head)
    if any(hasattr(module.weight.get_value(), "dequantize") for module in modules):
        raise InputError(
            "new_tokens: the model's embedding or head is quantised, and rows cannot be added to it; quantise only the "
            'layers, as quantization="nf4" does.'
        )
    if any(getattr(module, name, None) is not None for module in modules for name in _VOCAB_FACTORS):
        raise InputError(
            "new_tokens: the model has an adapter on its embedding or head, which has the old vocabulary's size; add "
            "the tokens before the adapter."
        )
    tokens = NewTokens(first, count, base_hash(model))
    model = shallow_copy(model)
    modules = [model.embed_tokens]
    if model.lm_head is not None:  # a tied model has one where an adapter is on it, and that was refused
        modules.append(model.lm_head)
    vocab = max(model.config.vocab_size, first + count)
    for module in modules:
        for name in ("weight", "bias"):
            variable = getattr(module, name, None)
            if variable is not None:
                value = _with_rows(variable.get_value(), first, count, vocab)
                setattr(module, name, nnx.Param(value, logical_axes=variable.get_metadata()["logical_axes"]))
    model.config = dataclasses.replace(model.config, vocab_size=vocab)
    model.new_tokens = tokens
    if model.adapter is not None:
        attach_new_rows(model)
    return model


_VOCAB_FACTORS = ("lora_A", "lora_embedding_A")


def _with_rows(value: Any, first: int, count: int, vocab: int) -> Any:
    """`[vocab, ...]` whose rows from `first` on are the mean of those before it, in the dtype of `value`."""
    shape = (vocab, *value.shape[1:])
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, value.dtype)
    mean = jnp.mean(value[:first], axis=0, dtype=jnp.float32).astype(value.dtype)
    new = jnp.broadcast_to(mean, (count, *value.shape[1:]))
    padding = jnp.broadcast_to(mean, (max(0, first - value.shape[0]), *value.shape[1:]))
    return jnp.concatenate([value[:first], padding, new, value[first + count :]])


def _is_marker(token: str) -> bool:
    return (token[0], token[-1]) in (("<", ">"), ("[", "]"))
