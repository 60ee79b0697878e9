"""How much device memory quantising while loading leaves unused, by the rules of jax's allocator; no GPU is needed.

jax's allocator (best fit with coalescing) takes the smallest free piece that a request fits into, and cuts it only if
it is twice as large, or 128 MiB larger: the rest is in use and nobody's. The loads of `assign` are played through it:
a 16-bit copy of a weight arrives, its codes and scales are made beside it, with what quantising needs meanwhile as it
is compiled for an H100, and the copy goes. Measured peaks lie above their plans by as much (8B in NF4: 474 MB by this
script and on an H100; six layers of Qwen 3 30B-A3B 235 and 235; both in the order of layers).

    JAX_PLATFORMS=cpu python benchmarks/allocation.py
"""

import argparse
import functools
import math
from typing import Any

import common
import jax
import jax.numpy as jnp
import random_weights
import shapes

from pronghorn.models.parameters import named_parameters, reading_order
from pronghorn.quantization import QuantizationConfig, is_quantized, quantize
from pronghorn.target_device import compiling_for

ALIGNMENT = 256
LEAST_REST = 128 << 20
MODELS = ("llama-3.1-8b", "qwen3-30b-a3b-6-layers")


class Allocator:
    """One pool of device memory. Pieces are [size, bytes asked for or None], by address."""

    def __init__(self, size: int):
        self.pieces: dict[int, list[Any]] = {0: [size, None]}

    def allocate(self, size: int) -> int:
        """The address of at least `size` bytes."""
        wanted = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
        found = min(
            (piece[0], address)
            for address, piece in self.pieces.items()
            if piece[1] is None and piece[0] >= wanted
        )
        room, address = found
        if room >= 2 * wanted or room - wanted >= LEAST_REST:
            self.pieces[address] = [wanted, wanted]
            self.pieces[address + wanted] = [room - wanted, None]
        else:
            self.pieces[address] = [room, wanted]
        return address

    def free(self, address: int) -> None:
        """Give back, and join with free neighbours."""
        self.pieces[address][1] = None
        joined: dict[int, list[Any]] = {}
        last = None
        for place in sorted(self.pieces):
            piece = self.pieces[place]
            if last is not None and piece[1] is None and joined[last][1] is None:
                joined[last][0] += piece[0]
            else:
                joined[place] = piece
                last = place
        self.pieces = joined

    @property
    def unused(self) -> int:
        """Bytes that are given away and were not asked for."""
        return sum(size - asked for size, asked in self.pieces.values() if asked is not None)


def sizes_of(tree: Any) -> list[int]:
    """Bytes of each leaf."""
    return [math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)]


def unused_after_loading(model: str, kind: str, order: str, device: Any) -> int:
    """Bytes unused once every weight is there; `order` is "layers" or "assign"."""
    config, how = shapes.MODELS[model], QuantizationConfig(kind)  # type: ignore[arg-type]
    decoder = random_weights.abstract_model(config, kind, dtype=jnp.bfloat16, layers="unrolled")
    parameters = named_parameters(decoder)
    shape_of = {name: parameter.shape for name, parameter in parameters.items()}
    leaves = {name: parameter.variable.get_value() for name, parameter in parameters.items()}
    forms = {name: leaf for name, leaf in leaves.items() if is_quantized(leaf)}
    sharding = jax.sharding.SingleDeviceSharding(device)

    @functools.cache
    def needed(shape: tuple[int, ...]) -> int:
        weight = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        compiled = jax.jit(lambda w: quantize(w, how)).lower(weight).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    pool = Allocator(80 << 30)
    for name in list(shape_of) if order == "layers" else reading_order(decoder):
        copy = pool.allocate(2 * math.prod(shape_of[name]))
        if name not in forms:
            continue
        for size in sizes_of(forms[name]):
            pool.allocate(size)
        if needed(shape_of[name]):
            pool.free(pool.allocate(needed(shape_of[name])))
        pool.free(copy)
    return pool.unused


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser, "allocation")
    options = parser.parse_args()
    rows = []
    with compiling_for("h100") as target:
        for model in MODELS:
            for kind in ("nf4", "fp8"):
                for order in ("layers", "assign"):
                    unused = unused_after_loading(model, kind, order, target.device)
                    rows.append({"model": model, "weights": kind, "order": order, "unused_bytes": unused})
                    print(
                        f"{model} {kind}, in the order of {order}: {unused / 1e6:.1f} MB unused", flush=True
                    )
        record = common.environment(options.commit) | {"device": target.device_kind, "rows": rows}
    common.write(options.out, record)


if __name__ == "__main__":
    main()
