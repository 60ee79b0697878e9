"""Block sizes of the three flash attention kernels: measured ones where a file has them, else a rule.

Measured ones are looked up in `tuned` by the width of the data type and the head dim (padded to a power of two). The
rule starts from what was fastest on an H100 and shrinks until the tiles fit the device's shared memory.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pronghorn.pallas_kernels import tuned
from pronghorn.pallas_kernels.launch import next_power_of_2
from pronghorn.pallas_kernels.tuned import device_kind_and_capability

# Shared memory one block may ask for, KiB, by compute capability (CUDA C++ programming guide, "Technical
# specifications per compute capability"); some is left to the compiler's own scratch.
_SHARED_KIB = {
    "8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99,
    "9.0": 227, "10.0": 227, "10.3": 227, "11.0": 227, "12.0": 99, "12.1": 99,
}  # fmt: skip
_SCRATCH_KIB = 4


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


# The fastest on an H100 by `pronghorn tune` (jax 0.11.2), 16 bit, by padded head dim.
_MEASURED = {
    64: AttentionBlocks(KernelBlocks(64, 64, 4, 3), KernelBlocks(32, 128, 4, 3), KernelBlocks(64, 64, 4, 3)),
    128: AttentionBlocks(
        KernelBlocks(128, 64, 4, 2), KernelBlocks(64, 64, 4, 2), KernelBlocks(128, 64, 8, 4)
    ),
    256: AttentionBlocks(
        KernelBlocks(128, 64, 8, 2), KernelBlocks(64, 64, 8, 2), KernelBlocks(128, 64, 8, 1)
    ),
}

# Of the largest heads (Gemma 4's full layers), not timed yet: the most that leaves no register spilled on an H100, by
# the compiler's account.
_BY_REGISTERS = {
    512: AttentionBlocks(KernelBlocks(64, 32, 8, 2), KernelBlocks(32, 32, 8, 2), KernelBlocks(32, 32, 8, 2)),
}

# The names under which `tuned` knows the kernels: what it holds is [block_q, block_k, num_warps, num_stages].
TUNED = {
    "forward": "flash_attention_forward",
    "dkdv": "flash_attention_dkdv",
    "dq": "flash_attention_dq",
}


def attention_blocks(head_dim: int, dtype: jax.typing.DTypeLike, seq_len: int) -> AttentionBlocks:
    """The blocks for one call on the default device: tuned, or by rule."""
    padded = max(16, next_power_of_2(head_dim))
    by_rule = _rule(padded, jnp.dtype(dtype).itemsize, device_kind_and_capability()[1])
    chosen = {}
    for kernel, op in TUNED.items():
        measured = tuned.choice(op, dtype, padded, at_least=True)
        chosen[kernel] = KernelBlocks(*measured) if measured else getattr(by_rule, kernel)
    return AttentionBlocks(**chosen).clipped(seq_len)


def _rule(padded: int, itemsize: int, capability: str) -> AttentionBlocks:
    if itemsize == 4:
        # Three tf32 products hold both halves of every operand: small tiles, or registers spill.
        rows, streamed = (64, 32) if padded <= 64 else (32, 32) if padded <= 128 else (16, 16)
        queries, keys = KernelBlocks(rows, streamed, 4, 2), KernelBlocks(streamed, rows, 4, 2)
        blocks = AttentionBlocks(forward=queries, dkdv=keys, dq=queries)
    else:
        known = _MEASURED | _BY_REGISTERS
        blocks = known[next(size for size in sorted(known) if padded <= size)]
    limit = (_SHARED_KIB.get(capability, 99) - _SCRATCH_KIB) * 1024
    return AttentionBlocks(
        **{kernel: _fit(kernel, getattr(blocks, kernel), padded, itemsize, limit) for kernel in TUNED}
    )


def shared_memory_limit() -> int:
    """Bytes that one program may have on the default device."""
    return _SHARED_KIB.get(device_kind_and_capability()[1], 99) * 1024


def over_shared_memory(needed: int) -> str | None:
    """Why tiles of so many bytes cannot be launched, or None."""
    limit = shared_memory_limit()
    if needed <= limit:
        return None
    return f"its tiles take {needed >> 10} KiB of shared memory, and a program gets {limit >> 10}"


def shared_memory_bytes(kernel: str, b: KernelBlocks, head_dim: int, dtype: jax.typing.DTypeLike) -> int:
    """What a program's tiles take: those it keeps, and `num_stages` copies of those it streams.

    Measured on compiled kernels: two-byte tiles take their size, the halves of fp32 tiles half as much again.
    """
    itemsize = jnp.dtype(dtype).itemsize
    row = max(16, next_power_of_2(head_dim)) * (itemsize if itemsize == 2 else 6)
    kept, streamed = (b.block_k, b.block_q) if kernel == "dkdv" else (b.block_q, b.block_k)
    return row * ((1 if kernel == "forward" else 2) * kept + 2 * b.num_stages * streamed)


def smallest_fits(head_dim: int, dtype: jax.typing.DTypeLike, capability: str) -> bool:
    """Whether a device of this compute capability has the shared memory for the smallest blocks of every kernel."""
    limit = _SHARED_KIB.get(capability, 99) * 1024
    smallest = KernelBlocks(16, 16, 4, 1)
    return all(shared_memory_bytes(kernel, smallest, head_dim, dtype) <= limit for kernel in TUNED)


def _fit(kernel: str, blocks: KernelBlocks, padded: int, itemsize: int, limit: int) -> KernelBlocks:
    """Shrink until the tiles fit in `limit` bytes."""
    kept, streamed = ("block_k", "block_q") if kernel == "dkdv" else ("block_q", "block_k")
    dtype = jnp.float32 if itemsize == 4 else jnp.bfloat16
    while shared_memory_bytes(kernel, blocks, padded, dtype) > limit:
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
