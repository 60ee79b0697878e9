"""The parts of an FP8 linear layer on one GPU, at the shapes of a Llama-3.1-8B layer: products, casts, transposes.

For each shape: the bf16 product, the FP8 product of codes (cuBLAS, with fewer bits in its sums, and with all of them),
and what stands around it: the cast with and without its maximum, the transpose of the weight by XLA and by our kernel.

    python benchmarks/fp8.py                  # about a minute
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp

from pronghorn.pallas_kernels.fp8_product import fp8_times, fp8_times_transposed
from pronghorn.pallas_kernels.fp8_quantize import fp8_quantize, round_to_fp8
from pronghorn.pallas_kernels.fp8_transpose import fp8_transpose

# (out, in) of q and o; k and v; gate and up; down.
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def rows(tokens: int) -> list[dict[str, Any]]:
    """One row a measurement: milliseconds and TFLOP/s or TB/s."""
    found = []

    def add(what: str, shape: tuple[int, int], function: Callable, arguments: tuple, **work: float) -> None:
        compiled = jax.jit(function, compiler_options=OPTIONS).lower(*arguments).compile()
        milliseconds = common.milliseconds(compiled, *arguments, repeats=20)
        row = {"what": what, "out": shape[0], "in": shape[1], "tokens": tokens, "milliseconds": milliseconds}
        if "flops" in work:
            row["tflops"] = work["flops"] / milliseconds / 1e9
            row["fp8_calls"] = compiled.as_text().count('"__cublas$lt$matmul$f8"')
        else:
            row["tbps"] = work["bytes"] / milliseconds / 1e9
        found.append(row)
        rate = f"{row['tflops']:7.0f} TFLOP/s" if "flops" in work else f"{row['tbps']:7.2f} TB/s"
        print(f"{what:38} {shape[0]:6} x {shape[1]:6} {milliseconds:8.4f} ms {rate}", flush=True)

    for shape in SHAPES:
        outputs, inputs = shape
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (tokens, inputs), jnp.bfloat16)
        dy = jax.random.normal(keys[1], (tokens, outputs), jnp.bfloat16)
        weight = 0.02 * jax.random.normal(keys[2], shape, jnp.bfloat16)
        codes, scale = jax.jit(round_to_fp8)(weight)
        xq, _ = jax.jit(round_to_fp8)(x)
        flops = 2.0 * tokens * outputs * inputs

        def product(a: jax.Array, b: jax.Array, precision: Any = None) -> jax.Array:
            dims = (((1,), (1,)), ((), ()))
            return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.bfloat16)

        full_sums = functools.partial(product, precision=jax.lax.Precision.HIGHEST)
        add("bf16 product", shape, product, (x, weight), flops=flops)
        add("fp8 product of codes", shape, product, (xq, codes), flops=flops)
        add(
            "fp8 product of codes, full sums",
            shape,
            full_sums,
            (xq, codes),
            flops=flops,
        )
        largest = jnp.float32(6)
        bounded = functools.partial(fp8_times_transposed, largest=largest)
        add("Y, one scale for x, with the cast", shape, bounded, (x, codes, scale), flops=flops)
        add(
            "Y, a scale a row of x, with the cast",
            shape,
            fp8_times_transposed,
            (x, codes, scale),
            flops=flops,
        )
        add("dX, with these and the transpose", shape, fp8_times, (dy, codes, scale), flops=flops)
        moved = 2 * codes.nbytes
        add("transpose of the weight, kernel", shape, fp8_transpose, (codes,), bytes=moved)
        add("transpose of the weight, XLA", shape, jnp.transpose, (codes,), bytes=moved)
    for width in sorted({side for shape in SHAPES for side in shape}):
        x = jax.random.normal(jax.random.key(0), (tokens, width), jnp.bfloat16)
        largest = jnp.float32(6)
        cast = (tokens, width)
        of_rows = functools.partial(fp8_quantize, scales="row")
        add("cast with scales a row", cast, of_rows, (x,), bytes=1.5 * x.nbytes)
        add("maximum and cast", cast, round_to_fp8, (x,), bytes=2.5 * x.nbytes)
        add(
            "cast alone", cast, lambda x, m: round_to_fp8(x, "e4m3", m)[0], (x, largest), bytes=1.5 * x.nbytes
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser, "fp8")
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    common.write(options.out, {**common.environment(options.commit), "rows": rows(options.tokens)})


if __name__ == "__main__":
    main()
