"""The argument shapes that the tests and the benchmarks share: one list an op.

`SMALL_*` are odd on purpose (no power of two, blocks that do not divide, a single row) and cheap enough for interpret
mode on a CPU. `LARGE_*` are one layer of a real model over 4,096 tokens, for a GPU; `EDGE_ROWS` are row counts that
fit no block there. A model's numbers are those of its config.json.
"""

from typing import NamedTuple

import numpy as np


class ModelShape(NamedTuple):
    """What the shapes of one dense decoder follow from."""

    name: str
    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int


LLAMA_3_1_8B = ModelShape("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256)
LLAMA_3_2_1B = ModelShape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128256)
SMOLLM2_135M = ModelShape("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152)
MODELS = (LLAMA_3_1_8B, LLAMA_3_2_1B, SMOLLM2_135M)
TOKENS = 4096
RANK = 16
EDGE_ROWS = (1, 3, 577)


class RowShape(NamedTuple):
    """rms_norm and layer_norm: x [rows, width]. gated_activation: gate and up [rows, width]."""

    name: str
    rows: int
    width: int


SMALL_RMS_NORM = (
    RowShape("one row", 1, 5),
    RowShape("odd", 21, 37),
    RowShape("many blocks", 67, 640),  # 16 rows a block forward, 8 backward
    RowShape("head", 130, 16),
)
LARGE_RMS_NORM = (
    *(RowShape(model.name, TOKENS, model.hidden) for model in MODELS),
    RowShape("Gemma-3-27B", TOKENS, 5376),
    RowShape("Qwen3 query heads", TOKENS * 32, 128),
)

LARGE_LAYER_NORM = (
    RowShape("StarCoder2-3B", TOKENS, 3072),
    RowShape("Command-R", TOKENS, 8192),
    RowShape("StableLM-2-1.6B", TOKENS, 2048),
)

SMALL_GATED_ACTIVATION = (
    RowShape("one row", 1, 3),
    RowShape("odd", 13, 37),
    RowShape("columns in blocks", 19, 768),  # 256 columns a block, 16 rows
    RowShape("padded columns", 3, 2050),
)
LARGE_GATED_ACTIVATION = tuple(RowShape(model.name, TOKENS, model.ffn) for model in MODELS)


class RopeShape(NamedTuple):
    """apply_rope: q [batch, seq, num_heads, head_dim], k [.., num_kv_heads, ..], cos, sin [batch, seq, rotated/2]."""

    name: str
    batch: int
    seq: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotated: int


SMALL_ROPE = (
    RopeShape("one token", 1, 1, 1, 1, 2, 2),
    RopeShape("grouped heads", 2, 7, 6, 2, 16, 16),
    RopeShape("odd half", 1, 19, 3, 3, 10, 10),
    RopeShape("partial", 2, 5, 3, 1, 20, 12),
)
LARGE_ROPE = (
    *(RopeShape(m.name, 1, TOKENS, m.num_heads, m.num_kv_heads, m.head_dim, m.head_dim) for m in MODELS),
    RopeShape("Phi-3-mini", 1, TOKENS, 32, 32, 96, 96),
    RopeShape("Phi-2", 1, TOKENS, 32, 32, 80, 32),
)


class LinearShape(NamedTuple):
    """lora_linear: x [rows, inputs], weight [outputs, inputs], A [rank, inputs], B [outputs, rank]."""

    name: str
    rows: int
    inputs: int
    outputs: int
    rank: int


SMALL_LORA_LINEAR = (
    LinearShape("one row", 1, 3, 2, 1),
    LinearShape("odd", 13, 37, 11, 3),
    LinearShape("wide", 6, 7, 65, 5),
)
LARGE_LORA_LINEAR = tuple(
    LinearShape(f"{model.name} {name}", TOKENS, inputs, outputs, RANK)
    for model in MODELS
    for name, inputs, outputs in (
        ("q_proj", model.hidden, model.num_heads * model.head_dim),
        ("k_proj", model.hidden, model.num_kv_heads * model.head_dim),
        ("up_proj", model.hidden, model.ffn),
        ("down_proj", model.ffn, model.hidden),
    )
)


class AttentionShape(NamedTuple):
    """flash_attention: q [batch, seq, num_heads, head_dim], k and v [batch, seq, num_kv_heads, head_dim]."""

    name: str
    batch: int
    seq: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


SMALL_FLASH_ATTENTION = (
    AttentionShape("one token", 1, 1, 1, 1, 16),
    AttentionShape("grouped heads", 2, 37, 4, 2, 32),
    AttentionShape("odd head", 1, 70, 3, 1, 24),
)
LARGE_FLASH_ATTENTION = tuple(
    AttentionShape(m.name, 1, TOKENS, m.num_heads, m.num_kv_heads, m.head_dim) for m in MODELS
)


class HeadShape(NamedTuple):
    """cross_entropy: logits [rows, vocab]. linear_cross_entropy: hidden [rows, hidden], weight [vocab, hidden]."""

    name: str
    rows: int
    hidden: int
    vocab: int


SMALL_CROSS_ENTROPY = (
    HeadShape("one row", 1, 3, 2),
    HeadShape("odd", 13, 7, 37),
    HeadShape("several blocks", 5, 6, 1031),
)
LARGE_CROSS_ENTROPY = tuple(HeadShape(m.name, TOKENS, m.hidden, m.vocab) for m in MODELS)


# What the tuner and the kernel benchmarks measure: large enough to fill any one GPU. Attention by head dim, with a
# model that has it; rows of the widths that follow.
TUNED_FLASH_ATTENTION = (
    AttentionShape("Llama-3.1-8B", 2, 4096, 32, 8, 128),
    AttentionShape("Llama-3.2-1B", 2, 4096, 32, 8, 64),
    AttentionShape("Gemma-2-9B", 2, 4096, 16, 8, 256),
)
TUNED_RMS_NORM = (
    RowShape("Llama-3.1-8B", 32768, 4096),
    RowShape("Qwen3-0.6B", 32768, 1024),
    RowShape("Qwen3 query heads", 32 * 8192, 128),
)
TUNED_GATED_ACTIVATION = (RowShape("Llama-3.1-8B", 8192, 14336), RowShape("Qwen3-0.6B", 8192, 3072))


class LowrankShape(NamedTuple):
    """lowrank_gated_forward and _backward: gate and up [rows, width], their rank together, and the rank of down."""

    name: str
    rows: int
    width: int
    rank: int
    down_rank: int


TUNED_LOWRANK = (LowrankShape("Llama-3.1-8B", TOKENS, 14336, 2 * RANK, RANK),)
TUNED_ROPE = (
    RopeShape("Llama-3.1-8B", 2, 4096, 32, 8, 128, 128),
    RopeShape("Llama-3.2-1B", 2, 4096, 32, 8, 64, 64),
)
TUNED_CROSS_ENTROPY = (HeadShape("Llama-3.1-8B", 1024, 4096, 128256),)


class WeightShape(NamedTuple):
    """nf4_dequantize: a weight [outputs, inputs]."""

    name: str
    outputs: int
    inputs: int


TUNED_NF4 = (WeightShape("Llama-3.1-8B up_proj", 14336, 4096),)


class GroupedShape(NamedTuple):
    """grouped_linear: x [rows, inputs] in groups of `sizes`, weight [groups, outputs, inputs]; rank of the adapter."""

    name: str
    sizes: tuple[int, ...]
    rows: int
    inputs: int
    outputs: int
    rank: int


SMALL_GROUPED = (
    GroupedShape("one row", (1,), 1, 3, 2, 1),
    GroupedShape("one-row and empty groups", (0, 1, 5, 0, 1), 7, 21, 11, 3),
    GroupedShape("all rows in one group", (0, 19, 0), 19, 16, 37, 2),
    GroupedShape("several blocks, rows left over", (17, 0, 35, 1), 61, 40, 70, 5),
)
LARGE_GROUPED = (
    GroupedShape(
        "Qwen3-30B-A3B gate_proj, 8 experts", (0, 1, 700, 129, 1024, 64, 2000, 100), 4096, 2048, 768, RANK
    ),
    GroupedShape("odd", (1, 0, 577, 3), 600, 1023, 577, 5),
)


class RoutedShape(NamedTuple):
    """grouped_linear as a router leaves it: `rows` in unequal shares for `groups` matrices [outputs, inputs]."""

    name: str
    rows: int
    groups: int
    inputs: int
    outputs: int

    @property
    def sizes(self) -> np.ndarray:
        """int32 [groups]: the rows of each group."""
        shares = np.random.default_rng(0).dirichlet(np.full(self.groups, 4.0))
        return np.diff(np.rint(np.cumsum(shares) * self.rows).astype(np.int32), prepend=0).astype(np.int32)


TUNED_GROUPED = (
    RoutedShape("Mixtral 8x7B w1", 8192, 8, 4096, 14336),
    RoutedShape("Qwen3-30B-A3B gate_proj", 32768, 128, 2048, 768),
)
