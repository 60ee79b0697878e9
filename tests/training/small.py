"""Tiny decoders and batches of odd shapes for the tests of training."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pronghorn.data import DetectedFormat, TokenizationStats, TokenizedDataset
from pronghorn.lora import LoRAConfig, add_lora
from pronghorn.models import Decoder, DecoderConfig
from pronghorn.training import TrainConfig, losses
from pronghorn.training.optimizers import make_optimizer
from pronghorn.training.schedules import make_schedule
from pronghorn.training.step import compute_dtypes, init_state, make_train_step

VOCAB = 61


def small_config(**changes) -> DecoderConfig:
    fields = {
        "family": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return DecoderConfig(**fields | changes)


def small_model(
    *, rank=3, dtype=jnp.float32, layers="unrolled", targets=("q_proj", "down_proj"), dropout=0.0, **changes
):
    """A random decoder with small adapters; `rank=None` leaves it without."""
    model = Decoder(small_config(**changes), dtype=dtype, layers=layers, rngs=nnx.Rngs(1))
    if rank is None:
        return model
    return add_lora(model, LoRAConfig(rank=rank, alpha=2 * rank, targets=targets, dropout=dropout))


def random_batch(
    micro: int, rows: int, length: int, *, seed: int = 0, trained: float = 0.7
) -> dict[str, np.ndarray]:
    """Packed rows of two documents and padding at the end; the number of trained tokens differs from row to row."""
    random = np.random.default_rng(seed)
    shape = (micro, rows, length)
    ids = random.integers(0, VOCAB, shape).astype(np.int32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for index in np.ndindex(micro, rows):
        first, end = int(random.integers(2, length - 3)), int(random.integers(length - 3, length + 1))
        segment_ids[index][:first], segment_ids[index][first:end] = 1, 2
        positions[index][:first], positions[index][first:end] = np.arange(first), np.arange(end - first)
    labels = np.where((segment_ids > 0) & (random.random(shape) < trained), ids, losses.IGNORED).astype(
        np.int32
    )
    return {"input_ids": ids, "labels": labels, "segment_ids": segment_ids, "positions": positions}


# LLVM's optimisations take most of a tiny program's compile time and none of its meaning.
QUICK_COMPILE = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def make_step(graph, trainable, config=None, *, optimizer=None, total_steps=20, **options):
    """(jitted step, start state) for a split model."""
    config = config or TrainConfig(max_steps=total_steps)
    dtypes = compute_dtypes(trainable)
    optimizer = optimizer or make_optimizer(config, total_steps)
    step = make_train_step(
        graph, optimizer, config, schedule=make_schedule(config, total_steps), dtypes=dtypes, **options
    )
    state = init_state(trainable, optimizer, seed=config.seed, master_weights=config.master_weights)
    return jax.jit(step, compiler_options=QUICK_COMPILE), state


def tokenized(documents, *, untrained: int = 1) -> TokenizedDataset:
    """A dataset of token lists; the first `untrained` tokens of each are not in the loss."""
    lengths = np.array([len(document) for document in documents])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate(documents).astype(np.int32)
    trained = np.concatenate([np.arange(length) >= untrained for length in lengths])
    stats = TokenizationStats(
        rows=len(documents),
        documents=len(documents),
        real_tokens=len(tokens),
        trained_tokens=int(trained.sum()),
        truncated=0,
        dropped=0,
        empty=0,
        untrained=0,
        duplicates=0,
        length_percentiles={100: int(lengths.max())},
    )
    origins = tuple(f"made.jsonl:{number}" for number in range(1, len(documents) + 1))
    return TokenizedDataset(
        tokens, trained, offsets, origins, stats, DetectedFormat("text", "made by a test")
    )


def random_documents(count: int, *, seed: int = 0) -> list[list[int]]:
    """Token lists of 3 to 9 tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, random.integers(3, 10)).tolist() for _ in range(count)]


def same_leaves(one, other) -> bool:
    """Whether two trees hold bit-identical arrays."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
