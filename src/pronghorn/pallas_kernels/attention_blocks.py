"""Block sizes of the three flash attention kernels: measured ones where a file has them, else a rule.

`tuning/<device kind>.json` may hold {"flash_attention": {"bfloat16/128": {"forward": [block_q, block_k, num_warps,
num_stages], "dkdv": [...], "dq": [...]}}}, keyed by dtype and head dim (padded to a power of two). The rule starts
from what was measured on an H100 with head dim 128 and shrinks until the tiles fit the device's shared memory.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp

from pronghorn.pallas_kernels.launch import next_power_of_2, on_gpu

# Shared memory one block may ask for, KiB, by compute capability (CUDA C++ programming guide, "Technical
# specifications per compute capability"); some is left to the compiler's own scratch.
_SHARED_KIB = {
    "8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99,
    "9.0": 227, "10.0": 227, "10.3": 227, "11.0": 227, "12.0": 99, "12.1": 99,
}  # fmt: skip
_SCRATCH_KIB = 4
TUNING = Path(__file__).parent / "tuning"


@dataclasses.dataclass(frozen=True)
class KernelBlocks:
    """One kernel's tile and launch: powers of two, blocks of at least 16 rows (a Triton product's least size)."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class AttentionBlocks:
    """Blocks of the forward kernel, of the kernel for dk and dv, and of the kernel for dq."""

    forward: KernelBlocks
    dkdv: KernelBlocks
    dq: KernelBlocks

    def clipped(self, seq_len: int) -> "AttentionBlocks":
        """The same with no block longer than the sequence (rounded up to a power of two)."""
        longest = max(16, next_power_of_2(seq_len))

        def clip(blocks: KernelBlocks) -> KernelBlocks:
            return dataclasses.replace(
                blocks, block_q=min(blocks.block_q, longest), block_k=min(blocks.block_k, longest)
            )

        return AttentionBlocks(clip(self.forward), clip(self.dkdv), clip(self.dq))


def attention_blocks(head_dim: int, dtype: jax.typing.DTypeLike, seq_len: int) -> AttentionBlocks:
    """The blocks for one call on the default device: tuned, or by rule."""
    padded = max(16, next_power_of_2(head_dim))
    name = jnp.dtype(dtype).name
    kind, capability = device_kind_and_capability()
    blocks = _tuned(kind, f"{name}/{padded}") or _rule(padded, jnp.dtype(dtype).itemsize, capability)
    return blocks.clipped(seq_len)


def multiprocessors() -> int:
    """How many blocks run at once on the default GPU (an H100's 132 where the device does not say)."""
    return int(getattr(jax.local_devices()[0], "core_count", None) or 132) if on_gpu() else 132


def device_kind_and_capability() -> tuple[str, str]:
    """The default device's name and compute capability; an H100's where a kernel is lowered without a GPU."""
    if not on_gpu():
        return "NVIDIA H100 80GB HBM3", "9.0"
    device = jax.local_devices()[0]
    return device.device_kind, str(getattr(device, "compute_capability", "9.0"))


@functools.cache
def _tuned(device_kind: str, key: str, folder: Path = TUNING) -> AttentionBlocks | None:
    file = folder / (re.sub(r"[^a-z0-9]+", "_", device_kind.lower()) + ".json")
    if not file.exists():
        return None
    entry = json.loads(file.read_text()).get("flash_attention", {}).get(key)
    return entry and AttentionBlocks(*(KernelBlocks(*entry[kernel]) for kernel in ("forward", "dkdv", "dq")))


def _rule(padded: int, itemsize: int, capability: str) -> AttentionBlocks:
    if itemsize == 4:
        # Three tf32 products hold both halves of every operand: small tiles, or registers spill.
        rows, streamed = (64, 32) if padded <= 64 else (32, 32) if padded <= 128 else (16, 16)
        queries, keys = KernelBlocks(rows, streamed, 4, 2), KernelBlocks(streamed, rows, 4, 2)
        blocks = AttentionBlocks(forward=queries, dkdv=keys, dq=queries)
    elif padded <= 128:
        blocks = AttentionBlocks(
            KernelBlocks(128, 64, 4, 2), KernelBlocks(64, 128, 8, 3), KernelBlocks(128, 64, 8, 3)
        )
    else:  # the fp32 accumulators of 256 columns need eight warps' registers
        blocks = AttentionBlocks(
            KernelBlocks(128, 64, 8, 2), KernelBlocks(32, 64, 8, 2), KernelBlocks(64, 32, 8, 2)
        )
    limit = (_SHARED_KIB.get(capability, 99) - _SCRATCH_KIB) * 1024
    # Measured on compiled kernels: two-byte tiles take their size, the halves of fp32 tiles half as much again.
    row = padded * (itemsize if itemsize == 2 else 6)
    return AttentionBlocks(
        _fit(blocks.forward, "block_q", "block_k", row, limit, resident=1),
        _fit(blocks.dkdv, "block_k", "block_q", row, limit, resident=2),
        _fit(blocks.dq, "block_q", "block_k", row, limit, resident=2),
    )


def _fit(blocks: KernelBlocks, kept: str, streamed: str, row: int, limit: int, resident: int) -> KernelBlocks:
    """Shrink until `resident` kept tiles and `num_stages` copies of two streamed tiles fit in `limit` bytes."""

    def size(b: KernelBlocks) -> int:
        return row * (resident * getattr(b, kept) + 2 * b.num_stages * getattr(b, streamed))

    while size(blocks) > limit:
        if blocks.num_stages > 2:
            blocks = dataclasses.replace(blocks, num_stages=blocks.num_stages - 1)
        elif getattr(blocks, streamed) > 32:
            blocks = dataclasses.replace(blocks, **{streamed: getattr(blocks, streamed) // 2})
        elif getattr(blocks, kept) > 32:
            blocks = dataclasses.replace(blocks, **{kept: getattr(blocks, kept) // 2})
        elif blocks.num_stages > 1:
            blocks = dataclasses.replace(blocks, num_stages=1)
        elif getattr(blocks, streamed) > 16:
            blocks = dataclasses.replace(blocks, **{streamed: 16})
        elif getattr(blocks, kept) > 16:
            blocks = dataclasses.replace(blocks, **{kept: 16})
        else:
            break
    return blocks
