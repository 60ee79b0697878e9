"""Names of a checkpoint's tensors, from the configuration.

Most families differ from Llama in a few module names; some store q, k and v (or gate and up) as one tensor, rows after
rows; gpt-oss has the experts' gate and up element by element. Those are cut when a checkpoint is read and put together
when it is written: every bit stays.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pronghorn.models.config import DecoderConfig
from pronghorn.models.layers import LAYER_NORMS


def llama_tensor_names(config: DecoderConfig, modules: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our name -> the checkpoint's, which says "model." in front of all but the head.

    Args:
      modules: modules of a layer whose names differ, ours -> theirs ("mlp.up_proj" -> "mlp.c_fc"); of a mixture of
        experts also whole names ("mlp.gate.e_score_correction_bias").
    """
    biased = {f"self_attn.{p}_proj": config.qkv_bias for p in "qkv"} | {
        "self_attn.o_proj": config.output_bias
    }
    if config.latent is not None:
        biased = _latent_names(config)
    biased |= {f"mlp.{p}_proj": config.mlp_bias for p in ("gate", "up", "down")}
    if not config.gated_mlp:
        del biased["mlp.gate_proj"]
    biased |= dict.fromkeys(LAYER_NORMS[config.block], config.norm_bias)
    if config.qk_norm:
        biased |= {f"self_attn.{p}_norm": False for p in "qk"}
    layer: dict[str, str] = {}
    for module, has_bias in biased.items():
        theirs = (modules or {}).get(module, module)
        layer |= {f"{module}.{leaf}": f"{theirs}.{leaf}" for leaf in ("weight", *["bias"] * has_bias)}
    if config.attention_sinks:
        layer["self_attn.sinks"] = "self_attn.sinks"
    if config.activation == "xielu":
        layer |= {name: name for name in (f"mlp.act_fn.{p}" for p in ("alpha_p", "alpha_n", "beta", "eps"))}
    sparse = {ours: theirs for ours, theirs in layer.items() if not ours.startswith("mlp.")}
    sparse |= _sparse_names(config, modules or {})
    names = {"embed_tokens.weight": "model.embed_tokens.weight"}
    for index in range(config.num_layers):
        prefix = f"layers.{index}."
        own = sparse if config.is_sparse(index) else layer
        names |= {f"{prefix}{ours}": f"model.{prefix}{theirs}" for ours, theirs in own.items()}
    names |= {f"norm.{leaf}": f"model.norm.{leaf}" for leaf in ("weight", *["bias"] * config.norm_bias)}
    return names if config.tie_word_embeddings else names | {"lm_head.weight": "lm_head.weight"}


@dataclasses.dataclass(frozen=True)
class InterleavedTensor:
    """How a tensor of a file holds several of ours: along its last axis in turn, an element each, or one by one.

    Attributes:
      parts: names in `tensor_names`: element j of the last axis belongs to part j mod len(parts).
      transposed: the file has `[.., in, out]` where ours is `[.., out, in]`.
      marked: the module of transformers says that it is transposed (`is_transposed`). PEFT takes what does not say so
        for `[experts, out, in]`.
      in_turn: otherwise the parts lie along that axis one after the other.
      by_rows: the parts lie along the last axis but one instead, one after the other; not with `transposed`.
        Transformers has such an array as it has experts that a file holds one by one.
    """

    parts: tuple[str, ...]
    transposed: bool
    in_turn: bool = True
    marked: bool = False
    by_rows: bool = False

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of the file of this shape can have these parts."""
        of_matrices = self.transposed or self.by_rows
        return len(shape) == 2 + of_matrices and shape[-2 if self.by_rows else -1] % len(self.parts) == 0

    def part_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of each part, given the file's."""
        if self.by_rows:
            return (*shape[:-2], shape[-2] // len(self.parts), shape[-1])
        *leading, last = shape
        last //= len(self.parts)
        return (*leading[:-1], last, leading[-1]) if self.transposed else (*leading, last)

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the file's, given that of each part."""
        if self.by_rows:
            return (*shape[:-2], shape[-2] * len(self.parts), shape[-1])
        *leading, inner, last = shape
        inner, last = (last, inner) if self.transposed else (inner, last)
        return (*leading, inner, last * len(self.parts))

    def cut(self, array: Any, place: int) -> Any:
        """One part of the file's array; a view."""
        if self.by_rows:
            return np.split(array, len(self.parts), axis=-2)[place]
        part = array[..., self._columns(array.shape[-1], place)]
        return np.swapaxes(part, -1, -2) if self.transposed else part

    def join(self, arrays: Sequence[Any]) -> np.ndarray:
        """The file's array of all its parts."""
        if self.by_rows:
            return np.concatenate(arrays, axis=-2)
        array = np.empty(self.file_shape(arrays[0].shape), arrays[0].dtype)
        for place, part in enumerate(arrays):
            columns = self._columns(array.shape[-1], place)
            array[..., columns] = np.swapaxes(part, -1, -2) if self.transposed else part
        return array

    def _columns(self, last: int, place: int) -> slice:
        size = last // len(self.parts)
        return (
            slice(place, None, len(self.parts)) if self.in_turn else slice(place * size, (place + 1) * size)
        )


def _latent_names(config: DecoderConfig) -> dict[str, bool]:
    """{module of latent attention: whether it has a bias}."""
    assert config.latent is not None
    names = {"q_proj": False}
    if config.latent.query_rank:
        names = {"q_a_proj": config.qkv_bias, "q_a_layernorm": False, "q_b_proj": False}
    names |= {"kv_a_proj_with_mqa": config.qkv_bias, "kv_a_layernorm": False, "kv_b_proj": False}
    return {f"self_attn.{name}": bias for name, bias in (names | {"o_proj": config.output_bias}).items()}


# Of families whose files say "shared_experts": one network for all of them.
SHARED_EXPERTS = {
    f"mlp.shared_expert.{p}_proj": f"mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down")
}
_EXPERT_LINEARS = tuple(f"mlp.experts.{p}_proj.weight" for p in ("gate", "up", "down"))


def _sparse_names(config: DecoderConfig, modules: Mapping[str, str]) -> dict[str, str]:
    """The names of a mixture of experts within a layer, ours -> the checkpoint's."""
    experts = config.experts
    if experts is None:
        return {}
    ours = [
        "mlp.gate.weight",
        *["mlp.gate.bias"] * experts.router_bias,
        *["mlp.gate.e_score_correction_bias"] * experts.correction_bias,
        *_EXPERT_LINEARS,
    ]
    if experts.bias:
        ours += [name.replace(".weight", ".bias") for name in _EXPERT_LINEARS]
    if experts.shared_width:
        ours += [f"mlp.shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")]
    ours += ["mlp.shared_expert_gate.weight"] * experts.shared_gate
    names = {}
    for name in ours:
        module, _, leaf = name.rpartition(".")
        names[name] = modules.get(name, f"{modules.get(module, module)}.{leaf}")
    return names


def expert_tensors(
    config: DecoderConfig, pattern: Mapping[str, str] | None = None
) -> dict[str, tuple[str, ...]]:
    """{name in `tensor_names`: one tensor an expert in the file} of checkpoints that hold experts one by one.

    Args:
      pattern: names within a layer that differ, "mlp.experts.up_proj" -> "block_sparse_moe.experts.{}.w3".
    """
    if config.experts is None:
        return {}
    found = {}
    for index in range(config.num_layers):
        if config.is_sparse(index):
            for name in _EXPERT_LINEARS:
                module, _, leaf = name.rpartition(".")
                usual = module.replace("experts.", "experts.{}.")
                theirs = f"model.layers.{index}.{(pattern or {}).get(module, usual)}.{leaf}"
                count = range(config.experts.num_experts)
                found[f"model.layers.{index}.{name}"] = tuple(theirs.format(i) for i in count)
    return found


_KEY_VALUE = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")
_ALTUP = (
    "altup.correct_output_scale",
    *(
        f"altup.{p}.weight"
        for p in ("correction_coefs", "prediction_coefs", "modality_router", "router_norm")
    ),
    *(f"laurel.{p}.weight" for p in ("linear_left", "linear_right", "post_laurel_norm")),
)
_INPUT = ("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm")
_INPUTS = ("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")


def extended_tensor_names(config: DecoderConfig) -> dict[str, str]:
    """`llama_tensor_names` of a decoder with extras, with what these add and without what they leave out."""
    extras, names = config.extras, llama_tensor_names(config)
    assert extras is not None
    own: list[str] = []
    for index in range(config.num_layers):
        prefix, layer = f"layers.{index}.", config.of_layer(index).extras
        assert layer is not None
        left_out = _KEY_VALUE if layer.key_values == "read" else _KEY_VALUE[1:2] * layer.keys_as_values
        for module in left_out:
            names = {ours: t for ours, t in names.items() if ours.rpartition(".")[0] != prefix + module}
        own += [f"{prefix}{name}.weight" for name in _INPUT if extras.input_width]
        own += [f"{prefix}layer_scalar"] * extras.layer_scalar
        own += [f"{prefix}{name}" for name in _ALTUP if extras.altup is not None]
    own += [f"{name}.weight" for name in _INPUTS if extras.input_width]
    for name in ("altup_projections", "altup_unembed_projections"):
        own += [f"{name}.{i}.weight" for i in range(extras.altup.streams - 1 if extras.altup else 0)]
    return names | {name: f"model.{name}" for name in own}


def shared_key_values(config: DecoderConfig) -> tuple[str, ...]:
    """How names begin of tensors that files hold for layers that read another's keys and values: nothing reads them."""
    reading = config.num_layers - (config.extras.shared_kv_layers if config.extras is not None else 0)
    layers = range(reading, config.num_layers)
    return tuple(f"model.layers.{index}.{module}." for index in layers for module in _KEY_VALUE)


def fused_tensors(config: DecoderConfig, modules: Sequence[str]) -> dict[str, tuple[tuple[str, int], ...]]:
    """{name in the file: ((name in `tensor_names`, rows), ..)} of tensors that the file stores as one.

    Args:
      modules: "self_attn.qkv_proj" and "mlp.gate_up_proj", whichever the family has.
    """
    head_dim = config.head_dim
    parts = {
        "self_attn.qkv_proj": (
            ("self_attn.q_proj", config.num_heads * head_dim),
            ("self_attn.k_proj", config.num_kv_heads * head_dim),
            ("self_attn.v_proj", config.num_kv_heads * head_dim),
        ),
        "mlp.gate_up_proj": (
            ("mlp.gate_proj", config.intermediate_size),
            ("mlp.up_proj", config.intermediate_size),
        ),
    }
    return {
        f"model.layers.{index}.{module}.weight": tuple(
            (f"model.layers.{index}.{part}.weight", rows) for part, rows in parts[module]
        )
        for index in range(config.num_layers)
        for module in modules
    }


def by_our_names(
    arrays: Mapping[str, Any],
    names: Mapping[str, str],
    fused: Mapping[str, tuple[tuple[str, int], ...]],
    interleaved: Mapping[str, InterleavedTensor] | None = None,
) -> dict[str, Any]:
    """Arrays of transformers by our names, those that are several of ours cut.

    In memory transformers has experts stacked, gate and up as one `experts.gate_up_proj`, and its own name of the
    router where the file has another.

    Args:
      arrays: by the names of transformers; those that the family does not have are left out.
      names, fused, interleaved: of the family.
    """
    arrays = dict(arrays)
    for name, layout in (interleaved or {}).items():
        if name in arrays:
            whole = arrays.pop(name)
            arrays |= {part: layout.cut(whole, place) for place, part in enumerate(layout.parts)}
    for name, parts in fused.items():
        if name in arrays:
            cuts = np.cumsum([rows for _, rows in parts])[:-1]
            arrays |= dict(zip([part for part, _ in parts], np.split(arrays.pop(name), cuts), strict=True))
    for name in [name for name in arrays if name.endswith("experts.gate_up_proj")]:
        start = name.removesuffix("gate_up_proj")
        halves = np.split(arrays.pop(name), 2, axis=1)
        arrays |= {f"{start}{p}_proj.weight": half for p, half in zip(("gate", "up"), halves, strict=True)}
        arrays[f"{start}down_proj.weight"] = arrays.pop(f"{start}down_proj")
    found = {}
    for ours, theirs in names.items():
        name = theirs if theirs in arrays else f"model.{ours}"
        if name in arrays:
            found[ours] = arrays[name]
    return found
