"""What a machine has, and whether every kernel is right on it: forward and gradients against the oracle."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.pallas_kernels import (
    LinearWeights,
    apply_rope,
    clamped_swiglu,
    convolved_heads,
    cross_entropy,
    flash_attention,
    gated_activation,
    gated_delta_rule,
    gated_mlp,
    grouped_linear,
    layer_norm,
    linear_cross_entropy,
    lora_linear,
    norm_linears,
    residual_linear,
    rms_norm,
    state_space,
    weighted_gated_activation,
)
from pronghorn.pallas_kernels.stacked_grouped_linear import stacked_grouped_linears
from pronghorn.pallas_kernels.state_space import state_space_reference
from pronghorn.quantization import QuantizationConfig, quantize
from pronghorn.versions import installed_versions

# Largest |fast − oracle| over the largest |oracle|, both in the dtype that a GPU trains in.
LIMIT = {"float32": 2e-5, "bfloat16": 1.6e-2}


def examine(print_line: Callable[[str], None] = print) -> dict[str, Any]:
    """Print and return devices, versions, memory and one check per kernel; `passed` is False when one departs."""
    devices = jax.devices()
    dtype = jnp.bfloat16 if devices[0].platform == "gpu" else jnp.float32
    versions = installed_versions()
    for name, value in versions.items():
        print_line(f"{name:<18}{value}")
    memory = devices[0].memory_stats() or {}
    print_line(f"{'devices':<18}{len(devices)} x {devices[0].device_kind} ({devices[0].platform})")
    if "bytes_limit" in memory:
        print_line(f"{'memory':<18}{memory['bytes_limit'] / 2**30:.1f} GiB for arrays")
    if devices[0].platform == "cpu":
        print_line(
            "no GPU is used: kernels run in interpret mode here; pip install 'pronghorn[cuda]' on an NVIDIA GPU"
        )
    checks = {}
    for name, (function, arguments, implementation) in _cases(dtype).items():
        start = time.perf_counter()
        error = _largest_error(function, arguments, implementation)
        passed = error <= LIMIT[str(jnp.dtype(dtype))]
        checks[name] = {"error": error, "passed": passed, "seconds": time.perf_counter() - start}
        print_line(f"{name:<22}{'ok' if passed else 'WRONG':<7}error {error:.1e} ({jnp.dtype(dtype)})")
    return {
        "versions": versions,
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "dtype": str(jnp.dtype(dtype)),
        "kernels": checks,
        "passed": all(check["passed"] for check in checks.values()),
    }


def _cases(dtype) -> dict[str, tuple[Callable[..., Any], list[jax.Array], str]]:
    """name -> (op(implementation, *arrays), arrays, implementation to check against "xla")."""
    seeds = itertools.count()

    def normal(*shape, dtype=dtype):
        return jax.random.normal(jax.random.key(next(seeds)), shape, jnp.float32).astype(dtype)

    def linear(inputs, outputs, rank=8):
        """Weight, A and B."""
        weight = normal(outputs, inputs, dtype=jnp.float32) * inputs**-0.5
        a = normal(rank, inputs, dtype=jnp.float32) * inputs**-0.5
        return [weight.astype(dtype), a, normal(outputs, rank, dtype=jnp.float32)]

    batch, length, heads, kv_heads, dim, width, ffn, vocab = 1, 67, 4, 2, 32, 96, 80, 515
    q, k, v = (
        normal(batch, length, heads, dim),
        normal(batch, length, kv_heads, dim),
        normal(batch, length, kv_heads, dim),
    )
    # Keys of length one, decays below one, and rates between zero and one.
    keys_of_one = normal(batch, length, kv_heads, dim, dtype=jnp.float32)
    keys_of_one = keys_of_one / jnp.linalg.norm(keys_of_one, axis=-1, keepdims=True)
    decays = normal(batch, length, heads, dtype=jnp.float32)
    delta = [
        normal(batch, length, kv_heads, dim),
        keys_of_one.astype(dtype),
        normal(batch, length, heads, dim),
        -jax.nn.softplus(decays),
        jax.nn.sigmoid(decays),
    ]
    segments = jnp.where(jnp.arange(length) < 23, 1, 2)[None]
    angle = jnp.arange(length)[None, :, None] * 10000.0 ** (-jnp.arange(dim // 2) / (dim // 2))
    cos, sin = jnp.cos(angle).astype(jnp.float32), jnp.sin(angle).astype(jnp.float32)
    labels = jax.random.randint(jax.random.key(next(seeds)), (length,), 0, vocab).at[::7].set(-100)
    sizes = jnp.asarray([40, 0, 25], jnp.int32)  # of groups, and two rows of none
    return {
        "rms_norm": (
            lambda i, x, w: rms_norm(x, w, eps=1e-6, implementation=i),
            [normal(length, width), normal(width)],
            "pallas",
        ),
        "layer_norm": (
            lambda i, x, w, b: layer_norm(x, w, b, eps=1e-5, implementation=i),
            [normal(length, width), normal(width), normal(width)],
            "pallas",
        ),
        "rope": (lambda i, q, k: apply_rope(q, k, cos, sin, implementation=i), [q, k], "pallas"),
        "gated_activation": (
            lambda i, g, u: gated_activation(g, u, activation="silu", implementation=i),
            [normal(length, width), normal(length, width)],
            "pallas",
        ),
        "weighted_gated_activation": (
            lambda i, g, u, w: weighted_gated_activation(g, u, w, implementation=i),
            [normal(length, width), normal(length, width), normal(length, 1, dtype=jnp.float32)],
            "pallas",
        ),
        "clamped_swiglu": (
            # No number of 16 bits is 1.1: at the limit itself the oracle has another gradient.
            lambda i, g, u: clamped_swiglu(g, u, limit=1.1, implementation=i),
            [normal(length, width), normal(length, width)],
            "pallas",
        ),
        "flash_attention": (
            lambda i, q, k, v: flash_attention(q, k, v, segment_ids=segments, implementation=i),
            [q, k, v],
            "pallas",
        ),
        "convolved_heads": (
            lambda i, x, w: convolved_heads(
                x, w, key_heads=kv_heads, dim=dim, eps=1e-6, segment_ids=segments, implementation=i
            ),
            [
                normal(batch, length, (2 * kv_heads + heads) * dim),
                normal((2 * kv_heads + heads) * dim, 4) * 0.5,
            ],
            "pallas",
        ),
        "gated_delta_rule": (
            lambda i, *a: gated_delta_rule(*a, segment_ids=segments, implementation=i),
            delta,
            "pallas",
        ),
        "state_space": (
            lambda i, *a: (state_space_reference if i == "xla" else state_space)(*a, segment_ids=segments),
            [
                normal(batch, length, heads, dim),
                jax.nn.softplus(decays),
                -jnp.linspace(0.1, 1.0, heads),
                normal(batch, length, kv_heads, dim),
                normal(batch, length, kv_heads, dim),
                jnp.linspace(0.5, 1.5, heads),
            ],
            "chunks",
        ),
        "grouped_linear": (
            lambda i, x, w, a, b: grouped_linear(x, w, sizes, a, b, scale=2.0, implementation=i),
            [
                normal(length, width),
                *(jnp.stack(same) for same in zip(*(linear(width, ffn) for _ in range(3)), strict=True)),
            ],
            "pallas",
        ),
        "cross_entropy": (
            lambda i, z: cross_entropy(z, labels, implementation=i),
            [normal(length, vocab, dtype=jnp.float32)],
            "pallas",
        ),
        "linear_cross_entropy": (
            lambda i, h, w: linear_cross_entropy(h, w, labels, implementation=i),
            [normal(length, width), normal(vocab, width) * 0.1],
            "pallas",
        ),
        "lora_linear": (
            lambda i, x, w, a, b: lora_linear(x, w, a, b, scale=2.0, implementation=i),
            [normal(length, width), *linear(width, ffn)],
            "pallas",
        ),
        "norm_linears": (
            lambda i, x, g, *w: norm_linears(
                x,
                g,
                [LinearWeights(*w[:3]), LinearWeights(*w[3:])],
                scales=(2.0, 0.5),
                eps=1e-6,
                implementation=i,
            ),
            [normal(length, width), normal(width), *linear(width, ffn), *linear(width, 48)],
            "pallas",
        ),
        "gated_mlp": (
            lambda i, x, g, *w: gated_mlp(
                x,
                g,
                *(LinearWeights(*w[n : n + 3]) for n in (0, 3, 6)),
                scales=(2.0, 0.5, 1.0),
                eps=1e-6,
                implementation=i,
            ),
            [
                normal(length, width),
                normal(width),
                *linear(width, ffn),
                *linear(width, ffn),
                *linear(ffn, width),
            ],
            "pallas",
        ),
        "residual_linear": (
            lambda i, r, x, *w: residual_linear(r, x, LinearWeights(*w), scale=2.0, implementation=i),
            [normal(length, width), normal(length, ffn), *linear(ffn, width)],
            "pallas",
        ),
        "stacked_grouped": _stacked_grouped_case(
            normal(length, width),
            [
                [jnp.stack(same) for same in zip(*(linear(width, ffn) for _ in range(3)), strict=True)]
                for _ in range(2)
            ],
            sizes,
        ),
    }


def _stacked_grouped_case(x, layers, sizes):
    """Gate and up of 4-bit experts, whose weights are no arguments: they have no gradient."""
    first, second = (quantize(weight, QuantizationConfig("nf4")) for weight, *_ in layers)

    def op(implementation, x, a, b, more_a, more_b):
        linears = (LinearWeights(first, a, b), LinearWeights(second, more_a, more_b))
        return stacked_grouped_linears(x, linears, sizes, scales=(2.0, 0.5), implementation=implementation)

    return op, [x, *(factor for _, *factors in layers for factor in factors)], "pallas"


def _largest_error(function: Callable[..., Any], arguments: list[jax.Array], implementation: str) -> float:
    """max over outputs and gradients of max|fast − oracle| / max|oracle|."""

    def outputs_and_gradients(implementation):
        def run(*arguments):
            out, pull = jax.vjp(lambda *a: function(implementation, *a), *arguments)
            cotangent = jax.tree.map(
                lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), out
            )
            return out, pull(cotangent)

        # Interpreted kernels run once here and take long to compile: spare the compiler its passes.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        with jax.default_matmul_precision("highest"):
            return jax.tree.leaves(jax.jit(run, compiler_options=quick)(*arguments))

    errors = []
    for fast, oracle in zip(outputs_and_gradients(implementation), outputs_and_gradients("xla"), strict=True):
        fast, oracle = np.asarray(fast, np.float64), np.asarray(oracle, np.float64)
        errors.append(np.abs(fast - oracle).max() / max(np.abs(oracle).max(), 1e-30))
    worst = float(max(errors))
    return worst if worst == worst else float("inf")
