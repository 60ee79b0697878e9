"""FLOPs of a step by counting, and peak rates of devices.

A product `[m, k] x [k, n]` is 2 m k n FLOPs. For a token, with P_frozen and P_trained the weights it is multiplied by:

  forward   2 (P_frozen + P_trained)
  backward  2 P_frozen + 4 P_trained          a frozen weight needs dX only, a trained one dX and dW
  attention 2 heads (head_dim + value_dim) forward and 4 backward, for each pair of a query and a key it may see

Elementwise work and recomputation are not counted: utilisation (MFU) is of the model's arithmetic, so a memory policy
that recomputes does not raise it (Chowdhery et al. 2022, PaLM, appendix B).
"""

import dataclasses
from typing import Any, get_args

import jax
import numpy as np

from pronghorn.models.config import STATE_SPACE_KINDS, DecoderConfig, LayerKind
from pronghorn.training.optimizers import is_variable

# Dense peak of 16-bit products, FLOP/s, from the vendor's data sheets. The longest name that a device's starts with.
_PEAK_16_BIT = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 SXM": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 125e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA V100": 125e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
}


def device_peak_flops(device_kind: str) -> float | None:
    """Dense 16-bit FLOP/s of one device, or None when it is not in the table."""
    names = [name for name in _PEAK_16_BIT if device_kind.startswith(name)]
    return _PEAK_16_BIT[max(names, key=len)] if names else None


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs of training, forward and backward.

    Attributes:
      per_token: products with weights, for one token.
      per_pair: attention, for one query and one key it may see, over all full layers.
      per_window_pair: the same over all sliding layers.
      sliding_window: keys that a query of a sliding layer sees at most.
      per_chunk_pair: the same over all chunked layers. attention_chunk: positions of a chunk.
    """

    per_token: float
    per_pair: float
    per_window_pair: float
    sliding_window: int | None
    per_chunk_pair: float = 0.0
    attention_chunk: int | None = None

    def of_batch(self, positions: np.ndarray, real: np.ndarray) -> float:
        """FLOPs for the real tokens of a batch.

        Args:
          positions: int, any shape; a token at position p of its document sees p + 1 keys.
          real: bool, the same shape, false for padding.
        """
        seen = np.asarray(positions)[np.asarray(real)].astype(np.int64) + 1
        window = seen if self.sliding_window is None else np.minimum(seen, self.sliding_window)
        chunk = seen if self.attention_chunk is None else (seen - 1) % self.attention_chunk + 1
        pairs = (
            self.per_pair * seen.sum()
            + self.per_window_pair * window.sum()
            + self.per_chunk_pair * chunk.sum()
        )
        return float(self.per_token * seen.size + pairs)


def count_flops(config: DecoderConfig, trainable: Any, frozen: Any) -> FlopCount:
    """FLOPs a token and a pair, from the shapes of a split model (arrays or ShapeDtypeStructs)."""
    trained, fixed = _product_weights(trainable, config), _product_weights(frozen, config)
    if config.tie_word_embeddings and "lm_head.weight" not in trained | fixed:
        head = config.vocab_size * config.hidden_size
        (trained if "embed_tokens.weight" in _names(trainable) else fixed)["lm_head.weight"] = head
    pairs = dict.fromkeys(get_args(LayerKind), 0.0)
    for index, kind in enumerate(config.layer_kinds):
        layer = config.of_layer(index)
        pairs[kind] += 6.0 * layer.num_heads * (layer.head_dim + layer.value_dim)
    # Of a delta net's state, a token reads what its key had stored, adds to it, and reads it: 6 dk dv a head, forward.
    state = config.linear_value_heads * config.linear_key_dim * config.linear_value_dim
    recurrent = 18.0 * state * config.layer_kinds.count("linear")
    if config.state_space is not None:  # of a state space a token adds and reads
        mixer = config.state_space
        mixers = sum(kind in STATE_SPACE_KINDS for kind in config.layer_kinds)
        recurrent += 12.0 * mixer.width * mixer.state_dim * mixers
    return FlopCount(
        per_token=4.0 * sum(fixed.values()) + 6.0 * sum(trained.values()) + recurrent,
        per_pair=pairs["full"] + pairs["hybrid"],
        per_window_pair=pairs["sliding"],
        sliding_window=config.sliding_window,
        per_chunk_pair=pairs["chunked"],
        attention_chunk=config.attention_chunk,
    )


def _names(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=has_shape)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def has_shape(leaf: Any) -> bool:
    """Whether a node of a parameter tree stands for one matrix: an NNX variable or a quantised weight."""
    return is_variable(leaf) or (hasattr(leaf, "shape") and hasattr(leaf, "dequantize"))


def _product_weights(tree: Any, config: DecoderConfig) -> dict[str, int]:
    """Elements of the matrices that every token is multiplied by: all but norms, biases and looked-up tables."""
    sizes = {}
    for name, leaf in _names(tree).items():
        looked_up = "embed_tokens" in name.removeprefix("extras.").split(".")[0] and not name.endswith(
            "lora_embedding_B"
        )
        vector = any(part in name for part in ("norm", "bias", "sinks", "magnitude"))
        if not (looked_up or vector) and len(leaf.shape) >= 2:
            sizes[name] = int(np.prod(leaf.shape))
            if (
                ".mlp.experts." in name and config.experts is not None
            ):  # a token is multiplied by those it chose
                sizes[name] = sizes[name] * config.experts.experts_per_token // config.experts.num_experts
    return sizes
