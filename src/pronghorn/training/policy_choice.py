"""Which memory policy a step gets: by counting from fast to small, and the first whose compiled program fits.

For a token and layer, with what `models/memory_policies.py` says about bytes and recomputation, R the rate of products
and V that of the bus between device and host, each way:

    forward    t = FLOPs / R
    extra      recomputed FLOPs / R + max(0, moved / V - t) + max(0, moved / V - 2 t - recomputed / R)

since a transfer costs only what the device waits for it. This orders the policies. What is taken is decided by the
compiled program's memory, and a policy is not even compiled if the arrays it keeps are larger than the device.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from pronghorn.errors import InputError
from pronghorn.models.config import DecoderConfig
from pronghorn.models.memory_policies import POLICIES
from pronghorn.pallas_kernels import launch
from pronghorn.training.flops import device_peak_flops

# Share of the peak that products reach, and of the pool that one program may take: the allocator has gaps.
_REACHED, _USABLE = 0.7, 0.97
# Bytes/s each way between device and pinned host memory: about 80 % of what NVLink-C2C and PCIe 5, 4 and 3 move, since
# a layer's residuals are not all there when it begins. The longest name that a device's starts with.
_BUS = {
    "NVIDIA GH200": 200e9,
    "NVIDIA H": 40e9,
    "NVIDIA B": 40e9,
    "NVIDIA GeForce RTX 50": 40e9,
    "NVIDIA A": 20e9,
    "NVIDIA L": 20e9,
    "NVIDIA GeForce RTX": 20e9,
    "NVIDIA V": 10e9,
    "Tesla": 10e9,
}
_UNKNOWN_BUS, _UNKNOWN_PEAK = 20e9, 100e12

Compiled = TypeVar("Compiled")


@dataclasses.dataclass(frozen=True)
class PolicyCost:
    """What a memory policy costs in one step.

    Attributes:
      policy: its name.
      kept_device_bytes, kept_host_bytes: residuals that wait for the backward pass there.
      recomputed_flops: on top of the model's own.
      relative_time: estimated, of the fastest policy's.
      peak_device_bytes, pinned_host_bytes: of the compiled program, or None where it was not compiled.
    """

    policy: str
    kept_device_bytes: int
    kept_host_bytes: int
    recomputed_flops: float
    relative_time: float
    peak_device_bytes: int | None = None
    pinned_host_bytes: int | None = None


def estimate_policies(
    config: DecoderConfig, *, micro_batches: int, rows: int, length: int, itemsize: int, device_kind: str
) -> list[PolicyCost]:
    """Every policy, fastest first; of equally fast ones the order is that of `POLICIES`.

    Args:
      micro_batches, rows, length: of a step; the residuals of one micro-batch exist at a time.
      itemsize: bytes of an activation.
      device_kind: as the device calls itself.
    """
    d, f = config.hidden_size, _feed_forward_width(config)
    into_mlp = (2 if config.gated_mlp else 1) * f
    layers = [config.of_layer(index) for index in range(config.num_layers)]
    heads = _AttentionCounts(*(_mean(column) for column in zip(*map(_attention_counts, layers), strict=True)))
    output, wide, down = config.num_heads * _mean([c.value_dim for c in layers]) * d, d * into_mlp, f * d
    attention = config.num_heads * _mean([c.head_dim + c.value_dim for c in layers]) * (length + 1.0)
    altup = None if config.extras is None else config.extras.altup
    stream = d * (1 if altup is None else altup.streams)
    attended, projections = stream + d + heads.output, heads.projections + heads.again
    # Of a token and layer: (elements kept, FLOPs computed again).
    counts = {
        "keep": (attended + heads.inputs + into_mlp, 2.0 * heads.again),
        "attention": (attended, 2.0 * (projections + wide)),
        "layer_inputs": (stream, 2.0 * (projections + output + wide) + attention),
        "offload_projections": (attended + heads.inputs, 2.0 * (heads.again + wide)),
        "offload_attention": (attended, 2.0 * (projections + wide)),
        "offload": (stream, 2.0 * (projections + output + wide) + attention),
    }
    rate = _REACHED * (device_peak_flops(device_kind) or _UNKNOWN_PEAK)
    names = [name for name in _BUS if device_kind.startswith(name)]
    bus = _BUS[max(names, key=len)] if names else _UNKNOWN_BUS
    forward = (2.0 * (projections + output + wide + down) + attention) / rate
    head = 3 * 2.0 * d * config.vocab_size / rate / config.num_layers
    tokens = rows * length * config.num_layers
    found = []
    for policy, (elements, recomputed) in counts.items():
        moved = elements * itemsize / bus if POLICIES[policy].offloaded else 0.0
        again = recomputed / rate
        extra = again + max(0.0, moved - forward) + max(0.0, moved - 2 * forward - again)
        kept = elements * itemsize * tokens
        offloaded = POLICIES[policy].offloaded
        found.append(
            PolicyCost(
                policy=policy,
                kept_device_bytes=0 if offloaded else kept,
                kept_host_bytes=kept if offloaded else 0,
                recomputed_flops=recomputed * tokens * micro_batches,
                relative_time=1.0 + extra / (3 * forward + head),
            )
        )
    return sorted(found, key=lambda cost: cost.relative_time)


class _AttentionCounts(NamedTuple):
    """Of a token and layer.

    Attributes:
      inputs, output: elements kept of what attention is computed from, and of what it puts out.
      projections: elements of the weights in front of it.
      again: those that every policy multiplies by again in the backward pass: of heads out of latent vectors.
    """

    inputs: int
    output: int
    projections: int
    again: int


def _attention_counts(config: DecoderConfig) -> _AttentionCounts:
    d, queries, latent = config.hidden_size, config.num_heads * config.head_dim, config.latent
    if latent is None:
        reads = config.extras is not None and config.extras.key_values == "read"  # what another layer keeps
        keys = 0 if reads else config.num_kv_heads * config.head_dim
        return _AttentionCounts(queries + 2 * keys, queries, d * (queries + 2 * keys), 0)
    first = (latent.query_rank or queries) + latent.rank + latent.position_dim
    expanded = (
        latent.rank * config.num_heads * (latent.content_dim + latent.value_dim) + latent.query_rank * queries
    )
    widest = max(config.head_dim, latent.value_dim)  # as it is computed, and again as it is cut
    cut = config.num_heads * latent.value_dim if latent.value_dim < widest else 0
    return _AttentionCounts(first, config.num_heads * widest + cut, d * first, expanded)


def _mean(counts: Sequence[int]) -> int:
    return sum(counts) // len(counts)


def _feed_forward_width(config: DecoderConfig) -> int:
    """Elements between the products of a feed-forward network, on average over the layers."""
    experts = config.experts
    if experts is None:
        return _mean([config.of_layer(index).intermediate_size for index in range(config.num_layers)])
    dense = sum(not config.is_sparse(index) for index in range(config.num_layers))
    sparse = experts.experts_per_token * experts.width + experts.shared_width
    return (dense * config.intermediate_size + (config.num_layers - dense) * sparse) // config.num_layers


def first_that_fits(
    costs: Sequence[PolicyCost],
    compile_policy: Callable[[str], Compiled],
    memory_of: Callable[[Compiled], tuple[int, int]],
    *,
    resident_bytes: int,
    limit: int | None,
    host_limit: int | None = None,
) -> tuple[Compiled, list[PolicyCost]]:
    """The compiled step of the fastest policy that fits, and `costs` with what was learnt.

    Args:
      costs: fastest first.
      compile_policy: compiles the step with this policy; ValueError, NotImplementedError or JAX's runtime error where
        the device cannot do it (there may be no pinned host memory).
      memory_of: (peak device bytes, pinned host bytes) of what that returns.
      resident_bytes: weights and state, which every policy needs.
      limit: bytes of the device; None takes the first policy.
      host_limit: bytes of pinned host memory; None is no limit.

    Raises:
      InputError: nothing fits.
    """
    known = list(costs)
    smallest: int | None = None
    for place, cost in enumerate(costs):
        if limit is not None and resident_bytes + cost.kept_device_bytes > _USABLE * limit:
            continue
        if host_limit is not None and cost.kept_host_bytes > host_limit:
            continue
        try:
            compiled = compile_policy(cost.policy)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            # A ValueError about anything else than kinds of memory is a fault of ours.
            if not POLICIES[cost.policy].offloaded or (
                isinstance(error, ValueError) and "memory" not in str(error)
            ):
                raise
            continue
        peak, pinned = memory_of(compiled)
        known[place] = dataclasses.replace(cost, peak_device_bytes=peak, pinned_host_bytes=pinned)
        if limit is None or peak <= _USABLE * limit:
            return compiled, known
        smallest = peak if smallest is None else min(smallest, peak)
    need = resident_bytes if smallest is None else smallest
    raise InputError(
        f"train.memory_policy: no policy fits, the smallest step needs {need / 2**30:.2f} GiB and the device has "
        f"{(limit or 0) / 2**30:.2f} GiB; take a smaller train.batch_size or data.max_length, or set "
        "train.mlp_tile_tokens=4096."
    )


def device_kind() -> str:
    """Of the default device, or of the one that is compiled for."""
    wanted = launch.target()
    return jax.devices()[0].device_kind if wanted is None else wanted.device_kind


def device_limit() -> int | None:
    """Bytes that the default device lets this process have; None where it does not say (a CPU)."""
    wanted = launch.target()
    if wanted is not None:
        return wanted.memory_bytes
    statistics: Any = jax.local_devices()[0].memory_stats()
    limit = (statistics or {}).get("bytes_limit")
    return int(limit) if limit else None


def pinned_limit() -> int:
    """Bytes of pinned host memory that XLA gives a process, or, where that is less, most of what the machine has."""
    given = os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "")
    pool = (int(given) if given.isdigit() else 64) << 30
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(pool, int(0.9 * machine))


def cost_lines(costs: Sequence[PolicyCost], chosen: str) -> list[str]:
    """A table: estimated time of each policy, and its memory, with a "~" where it was not compiled.

    The device memory of a policy that was not compiled is the chosen one's, plus what it keeps there on top.
    """
    of_chosen = next(cost for cost in costs if cost.policy == chosen)
    lines = ["  policy                time  device GiB  pinned host GiB"]
    for cost in costs:
        peak, pinned, mark = cost.peak_device_bytes, cost.pinned_host_bytes, " "
        if peak is None:
            extra = cost.kept_device_bytes - of_chosen.kept_device_bytes
            peak, pinned, mark = (of_chosen.peak_device_bytes or 0) + extra, cost.kept_host_bytes, "~"
        star = "*" if cost.policy == chosen else " "
        lines.append(
            f"{star} {cost.policy:<20}{cost.relative_time:>5.2f}x {mark}{peak / 2**30:>9.2f} "
            f"{mark}{(pinned or 0) / 2**30:>14.2f}"
        )
    return lines
