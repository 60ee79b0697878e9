"""`Decoder`: the one decoder that serves every family, by configuration.

Layers live in segments (`models/segments.py`), unrolled or scanned. Nothing above the decoder sees the difference;
`models/parameters.py` names single layers in both.
"""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from pronghorn.errors import InputError
from pronghorn.models import cache as kv_cache
from pronghorn.models import rope
from pronghorn.models.balance import Balanced, balance_loss, refuse_balance
from pronghorn.models.config import DecoderConfig
from pronghorn.models.extras import ModelExtras, first_carried, last_stream
from pronghorn.models.layers import Embedding, Linear, hidden_norm, value_or_none
from pronghorn.models.memory_policies import MEMORY_POLICIES
from pronghorn.models.segments import Segment, decode_segment, plan_segments, run_segment, stream_of

LayerLayout = Literal["unrolled", "scanned"]

# Layers fold the same key with their index.
_NOISE_STREAM, _EXTRAS_STREAM = 2**31 - 1, 2**31 - 3


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model came from, so that it can be saved as it was.

    Attributes:
      path: the folder or hub name.
      hf_config: text of the original config.json, or of the one that a text tower would have.
      dtype: of the checkpoint's weights, such as "bfloat16".
      wrapped: the model is the text tower of what lies in the folder.
    """

    path: str
    hf_config: str
    dtype: str
    wrapped: bool = False


def embedding_noise(
    key: jax.Array, alpha: float, shape: tuple[int, ...], segment_ids: jax.Array | None
) -> jax.Array:
    """NEFTune's noise, fp32 `[batch, seq, d]`; a document's does not depend on what else is packed into its row."""
    _, seq, width = shape
    lengths: Any = seq
    if segment_ids is not None:
        # Where the token's segment starts and where the next one does, counted from both ends.
        lengths = segment_positions(segment_ids) + segment_positions(segment_ids[:, ::-1])[:, ::-1] + 1
    limit = alpha / jnp.sqrt(jnp.asarray(lengths, jnp.float32) * width)
    uniform = jax.random.uniform(jax.random.fold_in(key, _NOISE_STREAM), shape, jnp.float32, -1.0, 1.0)
    return uniform * (limit[..., None] if segment_ids is not None else limit)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions that restart at 0 wherever the id changes, int32 `[batch, seq]`."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def chunk_ids(config: DecoderConfig, positions: jax.Array, segment_ids: jax.Array | None) -> jax.Array | None:
    """What chunked layers see as segments, int32 `[batch, seq]`: the id changes with the chunk of `positions` and with
    the segment. None where no layer is chunked."""
    if config.attention_chunk is None:
        return None
    chunks = positions // config.attention_chunk
    changes = chunks[:, 1:] != chunks[:, :-1]
    if segment_ids is not None:
        changes |= segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.cumsum(jnp.pad(changes, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
      config: the architecture.
      dtype: of weights and activations. Norms and softmax are computed in fp32, logits come in fp32.
      layers: "unrolled" (faster steps) or "scanned" (faster compiles).
      rngs: weights are drawn from N(0, 0.02²), norms start at one, biases at zero.

    Attributes:
      embed_tokens, segments, norm, lm_head: parameters; lm_head is None where the embedding is the head.
      extras: parameters beyond these, or None (`models/extras.py`).
      config, dtype: as given.
      source: `Source` or None, static. adapter: `AdapterInfo` or None, static. new_tokens: `NewTokens` or None, static.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: Any = jnp.bfloat16,
        layers: LayerLayout = "unrolled",
        rngs: nnx.Rngs | None = None,
    ):
        if layers not in get_args(LayerLayout):
            raise InputError(
                f"layers={layers!r} is not known; use one of {', '.join(get_args(LayerLayout))}."
            )
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.source: Source | None = nnx.static(None)
        self.adapter: Any = nnx.static(None)
        self.new_tokens: Any = nnx.static(None)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=self.dtype, rngs=rngs)
        scanned = layers == "scanned"
        plan = plan_segments(config.layer_structure) if scanned else ((0, config.num_layers, 1),)
        self.segments = nnx.List([
            Segment(config, *cut, stacked=scanned, dtype=self.dtype, rngs=rngs) for cut in plan
        ])  # fmt: skip
        self.norm = hidden_norm(config, dtype=self.dtype)
        self.extras = nnx.data(
            None if config.extras is None else ModelExtras(config, dtype=self.dtype, rngs=rngs)
        )
        self.lm_head = nnx.data(
            None
            if config.tie_word_embeddings
            else Linear(
                config.hidden_size, config.vocab_size, axes=("vocab", "hidden"), dtype=self.dtype, rngs=rngs
            )
        )

    @classmethod
    def abstract(
        cls, config: DecoderConfig, *, dtype: Any = jnp.bfloat16, layers: LayerLayout = "unrolled"
    ) -> "Decoder":
        """The same module with `jax.ShapeDtypeStruct` leaves: nothing is allocated. Fill it with `assign`."""
        return nnx.eval_shape(lambda: cls(config, dtype=dtype, layers=layers))

    def __call__(
        self, input_ids: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Logits of the next token, fp32 `[batch, seq, vocab]`; arguments as in `hidden_states`."""
        return self.logits(self.hidden_states(input_ids, positions, segment_ids))

    def hidden_states(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        memory_policy: str = "keep",
        mlp_tile_tokens: int | None = None,
        dropout_key: jax.Array | None = None,
        neftune_alpha: float = 0.0,
        return_layers: bool = False,
        balance_over: jax.Array | None = None,
    ) -> Any:
        """Hidden states after the final norm, `[batch, seq, d]` in the model's dtype.

        Args:
          input_ids: int `[batch, seq]`.
          positions: int `[batch, seq]`; default 0, 1, .. , from 0 again where a segment starts.
          segment_ids: int `[batch, seq]`; a token sees its own run of equal ids only. None: each row is one.
          memory_policy: what is kept for the backward pass, and where; see `models/memory_policies.py`.
          mlp_tile_tokens: compute feed-forward networks so many tokens at a time, and again in the backward pass; None
            takes all at once.
          dropout_key: for LoRA dropout and NEFTune's noise; None has neither.
          neftune_alpha: with a key, embeddings get noise uniform in ± alpha / sqrt(L d), L the tokens of a segment (of
            a row, without segment ids).
          return_layers: also return the embedding output and each layer's output, a list of num_layers + 1.
          balance_over: bool `[batch, seq]`, tokens over which the load-balancing loss of the experts is returned as
            well, an fp32 scalar (`models/balance.py`); not with return_layers.

        Raises:
          InputError: for an unknown memory_policy; for balance_over where there are no experts that it is known for.
        """
        if memory_policy not in MEMORY_POLICIES:
            raise InputError(
                f"memory_policy={memory_policy!r} is not known; use one of {', '.join(MEMORY_POLICIES)}."
            )
        chunks = segment_ids  # where a row is no longer than a chunk
        is_usual, length = positions is None, input_ids.shape[1]
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), input_ids.shape)
            if segment_ids is not None:
                positions = segment_positions(segment_ids)
        if not is_usual or length > (self.config.attention_chunk or length):
            chunks = chunk_ids(self.config, positions, segment_ids)
        angles = rope.layer_angles(self.config, positions)
        noise = None
        if neftune_alpha and dropout_key is not None:
            noise = embedding_noise(
                dropout_key, neftune_alpha, (*input_ids.shape, self.config.hidden_size), segment_ids
            )
        x = self.embed(input_ids, noise)
        carried, layer_inputs = self._first(input_ids, x, dropout_key)
        counted = None
        if balance_over is not None:
            refuse_balance(self.config)
            counted, carried = balance_over.astype(jnp.float32), Balanced.start(carried, self.config)
        outputs = [stream_of(carried)]
        for segment in self.segments:
            carried, segment_outputs = run_segment(
                segment,
                carried,
                layer_inputs,
                (angles, (segment_ids, chunks), rope.query_scale(self.config, positions), counted),
                dropout_key,
                config=self.config,
                memory_policy=memory_policy,
                mlp_tile_tokens=mlp_tile_tokens,
                return_layers=return_layers,
            )
            outputs.extend(segment_outputs)
        if isinstance(carried, Balanced):
            assert counted is not None
            return self.norm(carried.stream), balance_loss(carried, counted, self.config)
        x = self._last(carried, dropout_key)
        return (x, outputs) if return_layers else x

    def _first(
        self, input_ids: jax.Array, x: jax.Array, dropout_key: jax.Array | None = None, empty: Any = None
    ) -> tuple[Any, jax.Array | None]:
        """What the first layer is handed, and the inputs that layers have of their own."""
        if self.extras is None:
            return x, None
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, _EXTRAS_STREAM)
        inputs = self.extras.layer_inputs(input_ids, x, config=self.config, dropout_key=key)
        return first_carried(self.config, self.extras, x, dropout_key=key, empty=empty), inputs

    def _last(self, carried: Any, dropout_key: jax.Array | None = None) -> jax.Array:
        """Hidden states after the final norm, of what the last layer gives."""
        if self.extras is None:
            return self.norm(carried)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, _EXTRAS_STREAM + 1)
        return self.norm(last_stream(self.config, self.extras, carried, key))

    def embed(self, input_ids: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """What the first layer reads, `[batch, seq, d]`; noise is added in front of the family's scale."""
        x, scale = self.embed_tokens(input_ids), self.config.embedding_scale
        if noise is not None:
            x += noise.astype(x.dtype)
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    def head(self) -> tuple[Any, jax.Array | None, jax.Array | None, jax.Array | None, float]:
        """(weight `[vocab, d]`, bias, lora_A, lora_B, lora_scale) of the head, as linear_cross_entropy takes them.

        A tied head is the embedding's weight alone: an adapter of the embedding changes the lookup only, as in PEFT.
        Trained rows of new tokens are an adapter of theirs: A is what they have beyond the weight's, B chooses them.
        """
        owner = self.embed_tokens if self.lm_head is None else self.lm_head
        weight, bias = owner.weight.get_value(), value_or_none(getattr(owner, "bias", None))
        if owner.lora_new_rows is not None:
            rows, first = owner.lora_new_rows.get_value(), self.embed_tokens.first_new
            old = jax.lax.slice_in_dim(weight, first, first + rows.shape[0]).astype(rows.dtype)
            place = jnp.arange(weight.shape[0])[:, None] - first
            chosen = (place == jnp.arange(rows.shape[0])).astype(rows.dtype)
            return weight, bias, rows - jax.lax.stop_gradient(old), chosen, 1.0
        if self.lm_head is None:
            return weight, None, None, None, 1.0
        head = self.lm_head
        return weight, bias, *head.adapter(), head.lora_scale

    def logits(self, hidden: jax.Array) -> jax.Array:
        """fp32 `[..., vocab]` from hidden states `[..., d]`: never rounded to the model's dtype."""
        weight, bias, lora_a, lora_b, scale = self.head()
        weight = weight.dequantize() if hasattr(weight, "dequantize") else weight
        logits = _product(hidden, weight)
        if lora_a is not None and lora_b is not None:
            low = _product(hidden, lora_a.astype(hidden.dtype)).astype(hidden.dtype)
            logits = logits + scale * _product(low, lora_b.astype(hidden.dtype))
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def init_cache(self, batch: int, max_length: int) -> Any:
        """An empty cache of keys and values for `batch` rows of up to `max_length` tokens, a pytree."""
        return tuple(
            tuple(
                kv_cache.empty_cache(
                    self.config.of_layer(segment.start + position),
                    batch,
                    max_length,
                    dtype=self.dtype,
                    leading=(segment.repeats,) if segment.stacked else (),
                    kind=self.config.layer_kinds[segment.start + position],
                )
                for position in range(len(segment.layers))
            )
            for segment in self.segments
        )

    def decode(self, input_ids: jax.Array, cache: Any, positions: jax.Array) -> tuple[jax.Array, Any]:
        """Logits of new tokens given those in the cache: prefill and single steps alike.

        Args:
          input_ids: int `[batch, tokens]`, tokens >= 1.
          cache: from `init_cache` or an earlier call.
          positions: int `[batch, tokens]`, where each token stands in its row, below max_length. -1 is padding:
            not stored, its logits mean nothing. Rows may be of different lengths.

        Returns:
          Logits fp32 `[batch, tokens, vocab]`, and the cache with the new tokens in it.
        """
        max_length = kv_cache.max_length(cache)
        if not isinstance(positions, jax.core.Tracer) and int(jnp.max(positions)) >= max_length:
            raise InputError(
                f"positions reach {int(jnp.max(positions))} and the cache was made for max_length={max_length}; "
                "make it longer with init_cache(batch, max_length)."
            )
        angles = kv_cache.rotation(self.config, positions, max_length)
        empty = functools.partial(
            kv_cache.empty_cache, batch=input_ids.shape[0], max_length=max_length, dtype=self.dtype
        )
        x, layer_inputs = self._first(input_ids, self.embed(input_ids), empty=empty)
        filled = []
        for segment, segment_cache in zip(self.segments, cache, strict=True):
            x, segment_cache = decode_segment(
                segment, x, layer_inputs, segment_cache, angles, positions, config=self.config
            )
            filled.append(segment_cache)
        return self.logits(self._last(x)), tuple(filled)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x Wᵀ with the fp32 accumulator as the result."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)
