"""Reading a Hugging Face `config.json`: what a family file is built with.

Every key is known to the family, known to be harmless, or refused: a key that nobody looked at may change the maths.
A key whose value is null counts as absent.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pronghorn.errors import InputError
from pronghorn.models.config import Activation, DecoderConfig, LayerKind, RopeConfig

HfConfig = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family of checkpoints is read and written.

    Attributes:
      name: as in DecoderConfig.family.
      model_types: values of config.json's `model_type`.
      config_from_hf: the dict of a config.json -> DecoderConfig. Raises InputError naming the keys it refuses.
      config_to_hf: DecoderConfig -> a dict that transformers reads.
      tensor_names: DecoderConfig -> {single-layer name of ours: name in the checkpoint}, base weights only.
      fused_tensors: DecoderConfig -> the tensors that the file holds as one, as `tensor_names.fused_tensors` gives
        them; `tensor_names` has the names of their parts.
      stacked_tensors: DecoderConfig -> {name in `tensor_names`: the tensors of the file that it stacks on a new first
        axis, in order}: the weights of experts.
      module_tensors: as `tensor_names`, where the modules of transformers, and so adapters, have other names than the
        tensors of a file; None where they have the same.
      interleaved_tensors: DecoderConfig -> {name in the file: how it holds several tensors named in `tensor_names`}.
      unadapted: how our names of linears end that PEFT takes no adapters of in these models.
      tower: where the modules behind "model." are in a model of transformers that wraps this one as its text tower.
      left_out: the dict of a config.json -> how names of tensors begin that files have and the decoder does not, such
        as those of layers that predict further tokens. They are never read, nor written again.
    """

    name: str
    model_types: tuple[str, ...]
    config_from_hf: Callable[[HfConfig], DecoderConfig]
    config_to_hf: Callable[[DecoderConfig], dict[str, Any]]
    tensor_names: Callable[[DecoderConfig], dict[str, str]]
    fused_tensors: Callable[[DecoderConfig], dict[str, tuple[tuple[str, int], ...]]] = lambda config: {}
    stacked_tensors: Callable[[DecoderConfig], dict[str, tuple[str, ...]]] = lambda config: {}
    module_tensors: Callable[[DecoderConfig], dict[str, str]] | None = None
    interleaved_tensors: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}
    left_out: Callable[[HfConfig], tuple[str, ...]] = lambda hf: ()
    unadapted: tuple[str, ...] = ()
    tower: str = "model.language_model"

    def names_in_memory(self, config: DecoderConfig) -> dict[str, str]:
        """As `tensor_names`, with the names that the modules of transformers have."""
        return (self.module_tensors or self.tensor_names)(config)


# Keys that say nothing about the forward pass.
HARMLESS = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range",
    "is_llama_config", "label2id", "length_penalty", "max_length", "max_new_tokens", "min_length", "model_type",
    "name_or_path", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
})  # fmt: skip

# Keys that say nothing as long as they have one of these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_dropout": (0,),
    "cross_attention_hidden_size": (),
    "embd_pdrop": (0,),
    "embedding_dropout": (0,),
    "hidden_dropout": (0,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({},),
    "resid_pdrop": (0,),
    "residual_dropout": (0,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
}

# Read by `read_common` for every family.
COMMON_KEYS = frozenset({
    "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size",
})  # fmt: skip

ROPE_KEYS = frozenset({
    "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor", "low_freq_factor",
    "mscale", "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor", "rope_theta",
    "rope_type", "short_factor", "truncate", "type",
})  # fmt: skip
_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"
}  # fmt: skip
_PLAIN_ACTIVATIONS: dict[str, Activation] = _ACTIVATIONS | {"relu2": "relu2", "xielu": "xielu"}
_ACTIVATION_NAMES: dict[Activation, str] = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2", "xielu": "xielu"
}  # fmt: skip
_LAYER_TYPES: dict[str, LayerKind] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}
_LAYER_TYPE_NAMES: dict[LayerKind, str] = {kind: name for name, kind in _LAYER_TYPES.items()}


def refuse_unknown(
    hf: HfConfig,
    known: frozenset[str],
    *,
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
    own_code: frozenset[str] = frozenset(),
) -> None:
    """InputError if the config has remote code, or a key that nobody knows to be harmless.

    Args:
      known: keys that the family reads.
      neutral: keys of the family that say nothing as long as they have one of these values.
      own_code: what `auto_map` may name: code that came with the family before transformers had it, which computes
        what the family does. It is not run either.
    """
    neutral = NEUTRAL | dict(neutral or {})
    auto_map = hf.get("auto_map")
    named = set(auto_map.values()) if isinstance(auto_map, Mapping) else {None}
    if auto_map and not named <= own_code:
        raise InputError(
            "config.json has auto_map, which asks for code from the model folder, and none is ever run; use a "
            "checkpoint of a supported model_type, or remove the key if the weights are one."
        )
    unknown = []
    for key, value in hf.items():
        if value is None or key in HARMLESS or key in known or key == "auto_map":
            continue
        if key not in neutral or value not in neutral[key]:
            unknown.append(f"{key}={_short(value)}")
    if unknown:
        raise InputError(
            f"config.json (model_type {hf.get('model_type')!r}) has {', '.join(sorted(unknown))}, which pronghorn does "
            "not know and which may change the result; remove what is only a note, or use another checkpoint."
        )


def unusual_keys(hf: HfConfig) -> list[str]:
    """The keys that a plain decoder does not have, of a configuration that no family reads."""
    usual = HARMLESS | COMMON_KEYS | set(NEUTRAL)
    usual |= {"attention_bias", "auto_map", "layer_types", "mlp_bias", "sliding_window", "use_sliding_window"}
    return [key for key, value in hf.items() if value is not None and key not in usual]


def read_common(
    hf: HfConfig,
    *,
    family: str,
    known: frozenset[str] = frozenset(),
    default_kv_heads: int | None = None,
    eps_key: str = "rms_norm_eps",
    activation_key: str = "hidden_act",
    partial_rotary: float | None = None,
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
    own_code: frozenset[str] = frozenset(),
    **specific: Any,
) -> DecoderConfig:
    """A DecoderConfig from the keys that every Llama-like family shares.

    Args:
      hf: the config.json.
      family: name for DecoderConfig.family.
      known: keys that the caller reads.
      default_kv_heads: where num_key_value_heads is absent; None for as many as heads.
      eps_key, activation_key: the family's names for these.
      partial_rotary: the default of partial_rotary_factor; None for families that rotate whole heads.
      neutral, own_code: as in `refuse_unknown`.
      specific: fields of DecoderConfig that the family sets, in place of what is read here.

    Raises:
      InputError: a key is unknown, missing, or has a value that cannot be.
    """
    known |= {eps_key, activation_key} | (set() if partial_rotary is None else {"partial_rotary_factor"})
    refuse_unknown(hf, COMMON_KEYS | known, neutral=neutral, own_code=own_code)
    hidden_size, num_heads = positive(hf, "hidden_size"), positive(hf, "num_attention_heads")
    # A null means "as many as heads"; an absent key means the family's default.
    kv_default = num_heads if "num_key_value_heads" in hf or default_kv_heads is None else default_kv_heads
    head_dim = specific.pop("head_dim", None) or positive(hf, "head_dim", hidden_size // num_heads)
    rope = specific.pop("rope", None) or read_rope(hf, head_dim=head_dim, partial_rotary=partial_rotary)
    activations = _ACTIVATIONS if specific.get("gated_mlp", True) else _PLAIN_ACTIVATIONS
    fields: dict[str, Any] = {
        "vocab_size": positive(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": positive(hf, "intermediate_size"),
        "num_layers": positive(hf, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": positive(hf, "num_key_value_heads", kv_default),
        "head_dim": head_dim,
        "max_position_embeddings": positive(hf, "max_position_embeddings"),
        "rms_norm_eps": number(hf, eps_key, 1e-6),
        "activation": choice(hf, activation_key, activations, "silu"),
        "tie_word_embeddings": flag(hf, "tie_word_embeddings"),
        "rope": rope,
    }
    if partial_rotary is None and rope.partial_rotary_factor != 1 and rope.kind != "proportional":
        raise InputError(
            f"config.json: partial_rotary_factor has to be 1 for model_type {hf.get('model_type')!r}."
        )
    try:
        return DecoderConfig(family=family, **(fields | specific))
    except ValueError as error:
        raise InputError(f"config.json describes no possible model: {error}.") from error


def write_common(
    config: DecoderConfig,
    model_type: str,
    architecture: str,
    *,
    eps_key: str = "rms_norm_eps",
    activation_key: str = "hidden_act",
) -> dict[str, Any]:
    """The keys that `read_common` reads, with rope as `rope_theta` and `rope_scaling`, which every reader knows."""
    rope = config.rope
    hf: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        activation_key: _ACTIVATION_NAMES[config.activation],
        "max_position_embeddings": config.max_position_embeddings,
        eps_key: config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": rope.base,
        "rope_scaling": None,
    }
    if rope.partial_rotary_factor != 1:
        hf["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.kind != "default":
        hf["rope_scaling"] = write_rope(rope)
    return hf


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The keys of a rope_scaling, without rope_theta."""
    defaults = RopeConfig()
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind not in ("default", "proportional") or rope.factor != 1:
        scaling["factor"] = rope.factor
    for field in dataclasses.fields(rope):
        value = getattr(rope, field.name)
        if field.name in ROPE_KEYS - {"factor"} and value != getattr(defaults, field.name):
            scaling[field.name] = list(value) if isinstance(value, tuple) else value
    return scaling


def read_rope(hf: HfConfig, *, head_dim: int, partial_rotary: float | None = None) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta` (before).

    Raises:
      InputError: an unknown kind or key, one dict a layer type, or a key that the kind needs and lacks.
    """
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    scaling = hf.get(name) or {}
    if not isinstance(scaling, Mapping):
        raise InputError(f"config.json: {name} has to be an object, and is {_short(scaling)}.")
    # `finetuned` was a note of yarn's first checkpoints.
    unknown = [
        f"{name}.{key}"
        for key, v in scaling.items()
        if key not in ROPE_KEYS | {"finetuned"} and v is not None
    ]
    if unknown:
        raise InputError(f"config.json has {', '.join(sorted(unknown))}, which pronghorn does not know.")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _ROPE_KINDS:
        raise InputError(f"config.json: {name} is of type {kind!r}; supported are {', '.join(_ROPE_KINDS)}.")
    missing = [f"{name}.{key}" for key in _ROPE_NEEDS.get(kind, ()) if scaling.get(key) is None]
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)}, which rope of type {kind!r} needs.")
    base = number(scaling, "rope_theta", number(hf, "rope_theta", 10000.0))
    # A key at the top is refused before, in a family that rotates whole heads.
    partial = 1.0 if partial_rotary is None else number(hf, "partial_rotary_factor", partial_rotary)
    partial = number(scaling, "partial_rotary_factor", partial)
    fields: dict[str, Any] = {"base": base, "kind": kind, "partial_rotary_factor": partial}
    if kind == "proportional":
        fields["factor"] = number(scaling, "factor", 1.0)
    if kind in ("default", "proportional"):
        return RopeConfig(**fields)
    context = positive(hf, "max_position_embeddings")
    if kind in ("llama3", "yarn", "longrope"):
        # As in transformers: the key beside rope's dict comes first (Phi-3).
        original = positive(scaling, "original_max_position_embeddings", context)
        original = positive(hf, "original_max_position_embeddings", original)
    else:
        original = context  # what dynamic compares with, whatever the dict says
    fields["original_max_position_embeddings"] = original
    fields["factor"] = number(scaling, "factor", context / original)
    for key in ("low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "attention_factor"):
        if scaling.get(key) is not None:
            fields[key] = number(scaling, key)
    for key in ("beta_fast", "beta_slow"):
        if scaling.get(key):  # transformers takes 0 as absent
            fields[key] = number(scaling, key)
    if scaling.get("truncate") is not None:
        fields["truncate"] = flag(scaling, "truncate")
    pairs = int(head_dim * partial) // 2
    for key in ("short_factor", "long_factor"):
        factors = scaling.get(key)
        if factors is None:
            continue
        if not isinstance(factors, list | tuple) or len(factors) != pairs:
            raise InputError(
                f"config.json: {name}.{key} has to be a list of {pairs} numbers, one a rotated pair."
            )
        fields[key] = tuple(float(f) for f in factors)
    return RopeConfig(**fields)


def read_layer_ropes(hf: HfConfig, *, head_dim: int, local_base: float) -> tuple[RopeConfig, RopeConfig]:
    """(rope of full layers, rope of sliding ones): one dict each in `rope_parameters` (transformers 5), or the keys of
    the model for the first and no scaling, with `local_base`, for the second."""
    nested = hf.get("rope_parameters")
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(nested, Mapping) or not set(kinds) & set(nested):
        return read_rope(hf, head_dim=head_dim), RopeConfig(base=local_base)
    unknown = sorted(set(nested) - set(kinds))
    if unknown:
        raise InputError(f"config.json has rope_parameters.{unknown[0]}, which pronghorn does not know.")
    base = {kinds[0]: number(hf, "rope_theta", 10000.0), kinds[1]: local_base}
    full, sliding = (
        read_rope(
            {
                "max_position_embeddings": hf.get("max_position_embeddings"),
                "rope_theta": base[kind],
                "rope_parameters": nested.get(kind),
            },
            head_dim=head_dim,
        )
        for kind in kinds
    )
    return full, sliding


def write_layer_ropes(config: DecoderConfig) -> dict[str, Any]:
    """`rope_parameters` with one dict for each kind of layer."""
    return {
        name: write_rope(rope) | {"rope_theta": rope.base}
        for name, rope in (("full_attention", config.rope), ("sliding_attention", config.local_rope))
        if rope is not None
    }


def read_layer_types(hf: HfConfig, default: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
    """`layer_types` as kinds, or the default where it is absent."""
    types = hf.get("layer_types")
    if types is None:
        return default
    unknown = sorted({str(t) for t in types if t not in _LAYER_TYPES})
    if unknown:
        raise InputError(
            f"config.json: layer_types has {', '.join(unknown)}; supported are {', '.join(_LAYER_TYPES)}."
        )
    if len(types) != len(default):
        raise InputError(f"config.json: layer_types has {len(types)} entries for {len(default)} layers.")
    return tuple(_LAYER_TYPES[t] for t in types)


def write_layer_types(config: DecoderConfig) -> list[str]:
    """Layer kinds as `layer_types`."""
    return [_LAYER_TYPE_NAMES[kind] for kind in config.layer_kinds]


def derived_head_dim(hf: HfConfig) -> int:
    """hidden_size / num_attention_heads, for families that read no other head_dim.

    Raises:
      InputError: head_dim says something else.
    """
    head_dim = positive(hf, "hidden_size") // positive(hf, "num_attention_heads")
    if positive(hf, "head_dim", head_dim) != head_dim:
        raise InputError(
            f"config.json: head_dim is {hf['head_dim']}, and model_type {hf.get('model_type')!r} computes with "
            f"hidden_size / num_attention_heads = {head_dim}."
        )
    return head_dim


# Beyond these a file is damaged or hostile: the layers are listed one by one before anything is read.
_LARGEST = {"num_hidden_layers": 10_000, "vocab_size": 2**27}


def positive(hf: HfConfig, key: str, default: int | None = None) -> int:
    """A whole number over 0; absent or null gives the default, and without one an InputError."""
    value = hf.get(key)
    value = default if value is None else value
    if value is None:
        raise InputError(f"config.json lacks {key}; the file is incomplete.")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 1 <= value <= _LARGEST.get(key, 2**53) or value != int(value):
        limit = f" up to {_LARGEST[key]}" if key in _LARGEST else ""
        raise InputError(
            f"config.json: {key} has to be a whole number over 0{limit}, and is {_short(value)}."
        )
    return int(value)


def whole(hf: HfConfig, key: str, default: int | None = None) -> int:
    """A whole number from 0; absent or null gives the default, and without one an InputError."""
    value = hf.get(key)
    value = default if value is None else value
    is_zero = isinstance(value, int | float) and not isinstance(value, bool) and value == 0
    return 0 if is_zero else positive(hf, key, default)


def number(hf: HfConfig, key: str, default: float | None = None) -> float:
    """A finite number; absent or null gives the default."""
    value = hf.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise InputError(f"config.json: {key} has to be a number, and is {_short(value)}.")
    return float(value)


def flag(hf: HfConfig, key: str, default: bool = False) -> bool:
    """True or false; absent or null gives the default."""
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise InputError(f"config.json: {key} has to be true or false, and is {_short(value)}.")
    return value


def choice(hf: HfConfig, key: str, choices: Mapping[str, Any], default: str) -> Any:
    """The meaning of one of the names in `choices`."""
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"config.json: {key} is {_short(value)}; supported are {', '.join(choices)}.")
    return choices[value]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
