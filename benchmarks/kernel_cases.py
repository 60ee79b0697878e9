"""What benchmarks/kernels.py measures: one row a kernel, case, direction and implementation."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pronghorn.models.experts import order_by_expert, rows_by_expert, sum_of_choices, weighted_sum
from pronghorn.pallas_kernels import shapes
from pronghorn.pallas_kernels.attention_blocks import attention_blocks
from pronghorn.pallas_kernels.autotune_lowrank import backward_and_g, lowrank_gated_inputs
from pronghorn.pallas_kernels.convolved_heads import convolved_heads
from pronghorn.pallas_kernels.cross_entropy import cross_entropy
from pronghorn.pallas_kernels.flash_attention import flash_attention
from pronghorn.pallas_kernels.gated_activation import (
    gated_activation,
    gated_activation_backward,
)
from pronghorn.pallas_kernels.gated_delta_rule import gated_delta_rule
from pronghorn.pallas_kernels.grouped_linear import grouped_linear
from pronghorn.pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pronghorn.pallas_kernels.lowrank_gated_activation import (
    lowrank_gated_backward,
    lowrank_gated_forward,
    lowrank_gated_reference,
)
from pronghorn.pallas_kernels.nf4_dequantize import NestedScales, nf4_dequantize
from pronghorn.pallas_kernels.nf4_product import nf4_product
from pronghorn.pallas_kernels.rms_norm import rms_norm
from pronghorn.pallas_kernels.rope import apply_rope
from pronghorn.pallas_kernels.stacked_grouped_linear import stacked_grouped_linears
from pronghorn.pallas_kernels.stacked_linears import LinearWeights
from pronghorn.quantization import QuantizationConfig, quantize

BF16 = jnp.bfloat16
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
      function: of the arguments; differentiated in the first `wrt` of them where `gradient`.
      work: FLOPs or bytes that the op needs, by `unit` ("TFLOP/s" or "TB/s").
      extra: more fields for its row.
    """

    op: str
    name: str
    direction: str
    implementation: str
    function: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    work: float
    unit: str
    gradient: bool = False
    wrt: int = 0
    extra: tuple[tuple[str, Any], ...] = ()

    def row(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "case": self.name,
            "direction": self.direction,
            "implementation": self.implementation,
            "unit": self.unit,
            **dict(self.extra),
        }


def cases() -> Iterator[Case]:
    """Every case, attention first."""
    yield from attention()
    yield from rms_norms()
    yield from gated_activations()
    yield from lowrank_gated_activations()
    yield from ropes()
    yield from heads()
    yield from nf4()
    yield from convolutions()
    yield from delta_rules()
    yield from grouped_linears()
    yield from stacked_grouped_linears_of_experts()
    yield from routings()


def normal(seed: int, shape, dtype=BF16, factor: float = 1.0) -> jax.Array:
    return (factor * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)


def tokamax_has(name: str) -> bool:
    try:
        import tokamax
    except ImportError:  # not installed, or without what it imports itself
        return False
    return hasattr(tokamax, name)


# ---- attention ----


@dataclasses.dataclass(frozen=True)
class Attention:
    """A case of attention: the shape and what is switched on."""

    name: str
    shape: shapes.AttentionShape
    window: int | None = None
    softcap: float | None = None
    document: int | None = None  # mean length of the documents in a packed row

    def segment_ids(self) -> np.ndarray | None:
        if self.document is None:
            return None
        rng = np.random.default_rng(0)
        rows = []
        for _ in range(self.shape.batch):
            cuts = (
                np.sort(rng.choice(self.shape.seq - 1, self.shape.seq // self.document - 1, replace=False))
                + 1
            )
            rows.append(np.searchsorted(cuts, np.arange(self.shape.seq), side="right"))
        return np.stack(rows).astype(np.int32)

    def first_keys(self) -> np.ndarray:
        """[batch, seq]: the first key that each query sees."""
        index = np.arange(self.shape.seq)[None]
        first = np.zeros((self.shape.batch, self.shape.seq), np.int64)
        ids = self.segment_ids()
        if ids is not None:
            first = np.stack([np.searchsorted(row, row) for row in ids])
        return first if self.window is None else np.maximum(first, index - self.window + 1)

    def visible_pairs(self) -> float:
        return float((np.arange(self.shape.seq)[None] - self.first_keys() + 1).sum()) * self.shape.num_heads

    def computed_pairs(self, block_q: int, block_k: int) -> float:
        """Pairs inside the blocks that hold a visible one."""
        first = self.first_keys()
        starts = np.arange(0, self.shape.seq, block_q)
        last = np.minimum(starts + block_q, self.shape.seq) - 1
        blocks = last[None] // block_k - first[:, starts] // block_k + 1
        return float(blocks.sum()) * block_q * block_k * self.shape.num_heads


CAUSAL = {shape.head_dim: shape for shape in shapes.TUNED_FLASH_ATTENTION}
LONG = shapes.AttentionShape("Llama-3.1-8B", 1, 32768, 32, 8, 128)
ATTENTION = (
    *(Attention(f"causal D{d}", shape) for d, shape in CAUSAL.items()),
    Attention("packed, mean 512, D128", CAUSAL[128], document=512),
    Attention("window 1024, D128", CAUSAL[128], window=1024),
    Attention("window 4096 of 32768, D128", LONG, window=4096),
    Attention("softcap 50, D128", CAUSAL[128], softcap=50.0),
    Attention("softcap 50, D256", CAUSAL[256], softcap=50.0),
)


def attention() -> Iterator[Case]:
    for one in ATTENTION:
        shape = one.shape
        query = (shape.batch, shape.seq, shape.num_heads, shape.head_dim)
        key = (shape.batch, shape.seq, shape.num_kv_heads, shape.head_dim)
        ids = one.segment_ids()

        def arguments(query=query, key=key, ids=ids):
            segments = () if ids is None else (jnp.asarray(ids),)
            return normal(0, query), normal(1, key), normal(2, key), *segments

        def call(q, k, v, segments=None, *, implementation, one=one):
            return flash_attention(
                q, k, v, segment_ids=segments, sliding_window=one.window, softcap=one.softcap,
                implementation=implementation,
            )  # fmt: skip

        functions = {"pallas": functools.partial(call, implementation="pallas")}
        if ids is None and one.softcap is None:
            functions["cudnn"] = functools.partial(call, implementation="cudnn")
        if shape.seq <= 4096:
            functions["xla"] = functools.partial(call, implementation="xla")
        if tokamax_has("dot_product_attention") and ids is None and one.softcap is None:
            functions["tokamax"] = functools.partial(_tokamax_attention, window=one.window)
        blocks = attention_blocks(shape.head_dim, BF16, shape.seq)
        flops = 2 * one.visible_pairs() * shape.head_dim
        computed = {
            "forward": 2 * one.computed_pairs(blocks.forward.block_q, blocks.forward.block_k),
            "backward": 4 * one.computed_pairs(blocks.dkdv.block_q, blocks.dkdv.block_k)
            + 3 * one.computed_pairs(blocks.dq.block_q, blocks.dq.block_k),
        }
        for implementation, function in functions.items():
            for direction, products in (("forward", 2), ("backward", 5)):
                extra = ()
                if implementation == "pallas":
                    # FLOPs of whole blocks, recomputed products counted, over FLOPs that the op needs.
                    extra = (
                        (
                            "computed_over_needed",
                            computed[direction] * 2 * shape.head_dim / (products * flops),
                        ),
                    )
                yield Case(
                    "attention", one.name, direction, implementation, function, arguments, products * flops,
                    "TFLOP/s", gradient=direction == "backward", wrt=3, extra=extra,
                )  # fmt: skip


def _tokamax_attention(q, k, v, *, window):
    import tokamax

    local = None if window is None else (window - 1, 0)
    return tokamax.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)


# ---- what memory limits ----


def rms_norms() -> Iterator[Case]:
    rows, width = 32768, 4096
    size = rows * width * 2

    def arguments():
        return normal(0, (rows, width)), normal(1, (width,))

    functions = {
        i: functools.partial(rms_norm, eps=EPS, implementation=i)  # type: ignore[arg-type]
        for i in ("pallas", "xla")
    }
    if tokamax_has("layer_norm"):
        functions["tokamax"] = _tokamax_rms_norm
    name = f"[{rows}, {width}]"
    for implementation, function in functions.items():
        for direction, wrt, passes in (("forward", 0, 2), ("dx", 1, 3), ("dx, dw", 2, 3)):
            yield Case(
                "rms_norm", name, direction, implementation, function, arguments, passes * size, "TB/s",
                gradient=bool(wrt), wrt=wrt,
            )  # fmt: skip


def _tokamax_rms_norm(x, weight):
    import tokamax

    return tokamax.layer_norm(x, weight, None, subtract_mean=False, epsilon=EPS)


def gated_activations() -> Iterator[Case]:
    for shape in shapes.TUNED_GATED_ACTIVATION[:1]:
        size = shape.rows * shape.width * 2

        def arguments(shape=shape):
            return tuple(normal(i, shape[1:]) for i in range(3))

        for implementation in ("pallas", "xla"):

            def forward(dh, gate, up, implementation=implementation):
                return gated_activation(gate, up, implementation=implementation)

            def backward(dh, gate, up, implementation=implementation):
                # As an op of its own: inside a step it writes over what was saved, here that would be copied first.
                return gated_activation_backward(
                    dh, gate, up, activation="silu", with_h=False, with_kernel=implementation == "pallas",
                    in_place=False,
                )[:2]  # fmt: skip

            name = f"silu [{shape.rows}, {shape.width}]"
            for direction, function, passes in (("forward", forward, 3), ("backward", backward, 5)):
                yield Case(
                    "gated_activation",
                    name,
                    direction,
                    implementation,
                    function,
                    arguments,
                    passes * size,
                    "TB/s",
                )


def lowrank_gated_activations() -> Iterator[Case]:
    """Bytes are those of gate, up and h, or of dh, gate, up and both gradients. "G": by whom the tile says."""
    (large,) = shapes.TUNED_LOWRANK
    small = large._replace(name="Llama-3.2-1B", width=shapes.LLAMA_3_2_1B.ffn)

    def forward(dh, gate, up, factors):
        return lowrank_gated_forward(gate, up, factors._replace(g=None), activation="silu")

    def forward_alone(dh, gate, up, factors):
        bare = factors._replace(g=None, a_down=None)
        return lowrank_gated_forward(gate, up, bare, activation="silu")[0]

    def backward(*arguments):
        sums = ("da_down", "db_gate", "db_up")
        return lowrank_gated_backward(*arguments, activation="silu", wanted=sums, in_place=False)

    def oracle_forward(*arguments):
        h, t, _ = lowrank_gated_reference(*arguments, activation="silu")
        return h.astype(BF16), t.astype(BF16)

    def oracle_backward(*arguments):
        found = lowrank_gated_reference(*arguments, activation="silu")[2]
        whole = found.dgate.astype(BF16), found.dup.astype(BF16)
        return *whole, found.da_down, found.db_gate, found.db_up, found.g_both

    for shape in (large, small):

        def arguments(shape=shape):
            return lowrank_gated_inputs(shape, BF16)

        for direction, passes, function, oracle in (
            ("forward", 3, forward_alone, None),
            ("forward, T", 3, forward, oracle_forward),
            ("backward", 5, backward, None),
            ("backward, G", 5, backward_and_g, oracle_backward),
        ):
            for implementation, f in (("pallas", function), ("xla", oracle)):
                if f is not None:
                    yield Case(
                        "lowrank_gated", f"[{shape.rows}, {shape.width}], r {shape.down_rank}", direction,
                        implementation, f, arguments, passes * shape.rows * shape.width * 2, "TB/s",
                    )  # fmt: skip


def ropes() -> Iterator[Case]:
    for shape in shapes.TUNED_ROPE:
        half = shape.rotated // 2

        def arguments(shape=shape, half=half):
            angle = jnp.arange(shape.seq)[None, :, None] * 10000.0 ** (-jnp.arange(half) / half)
            q = normal(0, (shape.batch, shape.seq, shape.num_heads, shape.head_dim))
            k = normal(1, (shape.batch, shape.seq, shape.num_kv_heads, shape.head_dim))
            cos, sin = (
                jnp.broadcast_to(f(angle).astype(jnp.float32), (shape.batch, shape.seq, half))
                for f in (jnp.cos, jnp.sin)
            )
            return q, k, cos, sin

        tokens = shape.batch * shape.seq
        size = tokens * (4 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim + 8 * half)
        for implementation in ("pallas", "xla"):
            function = functools.partial(apply_rope, implementation=implementation)
            for direction in ("forward", "backward"):
                yield Case(
                    "rope", f"{tokens} tokens, {shape.num_heads}/{shape.num_kv_heads} heads, D{shape.head_dim}",
                    direction, implementation, function, arguments, size, "TB/s",
                    gradient=direction == "backward", wrt=2,
                )  # fmt: skip


def delta_rules() -> Iterator[Case]:
    """Qwen3.5-9B's layers. Work is that of the recurrence, which reads, corrects and reads a state a token and head."""
    seq, heads, value_heads, dim = 4096, 16, 32, 128
    for batch in (1, 2):

        def arguments(batch=batch):
            q, k = (normal(i, (batch, seq, heads, dim), jnp.float32) for i in range(2))
            q, k = ((x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(BF16) for x in (q, k))
            g, beta = (jax.nn.sigmoid(normal(i, (batch, seq, value_heads), jnp.float32)) for i in (3, 4))
            return q, k, normal(2, (batch, seq, value_heads, dim)), -g, beta

        work = 6.0 * batch * seq * value_heads * dim * dim
        for implementation in ("pallas", "xla"):
            function = functools.partial(gated_delta_rule, implementation=implementation)
            for direction, times in (("forward", 1), ("backward", 2)):
                yield Case(
                    "gated_delta_rule", f"{batch} x {seq} tokens, {heads}/{value_heads} heads, D{dim}", direction,
                    implementation, function, arguments, times * work, "TFLOP/s", gradient=direction == "backward",
                    wrt=5,
                )  # fmt: skip


def convolutions() -> Iterator[Case]:
    """What stands in front of Qwen3.5-9B's delta rule. Forward reads and writes its features once; backward reads them
    and the gradient, writes and reads the sums' gradient, and writes their own."""
    batch, seq, heads, value_heads, dim, width = 1, 4096, 16, 32, 128, 4
    features = (2 * heads + value_heads) * dim

    def arguments():
        return normal(0, (batch, seq, features)), normal(1, (features, width), factor=0.5)

    for implementation in ("pallas", "xla"):
        function = functools.partial(
            convolved_heads, key_heads=heads, dim=dim, eps=1e-6, implementation=implementation
        )
        for direction, passes in (("forward", 2), ("backward", 5)):
            yield Case(
                "convolved_heads", f"{batch} x {seq} tokens, {heads}/{value_heads} heads, D{dim}", direction,
                implementation, function, arguments, passes * 2 * batch * seq * features, "TB/s",
                gradient=direction == "backward", wrt=1,
            )  # fmt: skip


def grouped_linears() -> Iterator[Case]:
    """Mixtral's first product and one of a Qwen 3 30B-A3B: rows, experts, in, out. Experts get unequal shares."""
    for shape in shapes.TUNED_GROUPED:
        rows, experts, inputs, outputs = shape[1:]

        def arguments(shape=shape):
            weight = normal(1, (shape.groups, shape.outputs, shape.inputs), factor=0.02)
            return normal(0, (shape.rows, shape.inputs)), weight, jnp.asarray(shape.sizes)

        work = 2.0 * rows * inputs * outputs
        for implementation in ("pallas", "xla"):
            function = functools.partial(grouped_linear, implementation=implementation)
            # Backward by the rows alone where the experts are frozen, by their weights too where they are trained.
            for direction, wrt, times in (("forward", 0, 1), ("backward, frozen", 1, 1), ("backward", 2, 2)):
                yield Case(
                    "grouped_linear", f"{rows} rows x [{experts}, {outputs}, {inputs}]", direction, implementation,
                    function, arguments, times * work, "TFLOP/s", gradient=wrt > 0, wrt=wrt,
                )  # fmt: skip


def stacked_grouped_linears_of_experts() -> Iterator[Case]:
    """Gate and up of a Qwen 3 30B-A3B in 4 bits with adapters, dequantising included; backward gives X's gradient."""
    shape = shapes.TUNED_GROUPED[1]
    rows, experts, inputs, outputs = shape[1:]

    def arguments():
        def layer(seed):
            weight = quantize(
                normal(seed, (experts, outputs, inputs), factor=0.02), QuantizationConfig("nf4")
            )
            a = normal(seed + 1, (experts, shapes.RANK, inputs), jnp.float32)
            return LinearWeights(weight, a, normal(seed + 2, (experts, outputs, shapes.RANK), jnp.float32))

        return normal(0, (rows, inputs)), layer(1), layer(4), jnp.asarray(shape.sizes)

    def stacked(x, gate, up, sizes):
        return stacked_grouped_linears(x, (gate, up), sizes, scales=(1.0, 1.0), implementation="pallas")

    for direction in ("forward", "backward, frozen"):
        yield Case(
            "stacked_grouped_linears", f"{rows} rows x 2 x [{experts}, {outputs}, {inputs}], NF4", direction,
            "pallas", stacked, arguments, 4.0 * rows * inputs * outputs, "TFLOP/s",
            gradient=direction != "forward", wrt=1 if direction != "forward" else 0,
        )  # fmt: skip


def routings() -> Iterator[Case]:
    """Rows to their experts and back to their tokens, in a Qwen 3 30B-A3B: each row moved once, each token once."""
    tokens, choices, experts, hidden = 4096, 8, 128, 2048

    def order():
        chosen = jax.lax.top_k(normal(0, (tokens, experts), jnp.float32), choices)[1].astype(jnp.int32)
        return order_by_expert(chosen, experts)

    def tokens_and_order():
        return normal(1, (tokens, hidden)), order()

    def rows_and_order():
        weights = jnp.full((tokens, choices), 1 / choices, jnp.float32)
        return normal(2, (tokens * choices, hidden)), weights, order()

    moved = 2.0 * (tokens * choices + tokens) * hidden
    # Differentiated by what the op reads and nothing else: zeros for another array would be written, and timed.
    for op, function, arguments, wrt, times_backward in (
        ("rows_by_expert", rows_by_expert, tokens_and_order, 1, 1.0),
        ("sum_of_choices", sum_of_choices, lambda: rows_and_order()[::2], 1, 1.0),
        ("weighted_sum", weighted_sum, rows_and_order, 2, 1.5),
    ):
        for direction, times in (("forward", 1.0), ("backward", times_backward)):
            yield Case(
                op, f"{tokens} tokens, {choices} of {experts} experts, d {hidden}", direction, "xla", function,
                arguments, times * moved, "TB/s", gradient=direction == "backward", wrt=wrt,
            )  # fmt: skip


def nf4() -> Iterator[Case]:
    for shape in shapes.TUNED_NF4:
        count = shape.outputs * shape.inputs

        def arguments(count=count):
            codes = jax.random.bits(jax.random.key(0), (count // 2,), jnp.uint8)
            absmax = jax.random.bits(jax.random.key(1), (count // 64,), jnp.uint8)
            scales = NestedScales(
                jnp.ones((count // 64 // 256,), jnp.float32), jnp.linspace(0.0, 1.0, 256), jnp.float32(0.1)
            )
            return codes, absmax, jnp.linspace(-1.0, 1.0, 16), scales

        for implementation in ("pallas", "xla"):
            function = functools.partial(
                nf4_dequantize, shape=shape[1:], dtype=BF16, implementation=implementation
            )
            yield Case(
                "nf4_dequantize", f"[{shape.outputs}, {shape.inputs}], nested", "forward", implementation,
                function, arguments, count * 2 + count // 2 + count // 64, "TB/s",
            )  # fmt: skip
            # "xla": dequantised by its kernel, then multiplied by cuBLAS; bytes are those of the codes in either case.
            for rows in (1, 4, 16, 64):

                def product(x, *weight, shape=shape, fused=implementation == "pallas"):
                    if fused:
                        return nf4_product(x, *weight, shape=shape[1:], implementation="pallas")
                    return x @ nf4_dequantize(*weight, shape=shape[1:], dtype=BF16, implementation="pallas").T

                def with_rows(rows=rows, arguments=arguments, shape=shape):
                    return (jax.random.normal(jax.random.key(2), (rows, shape.inputs), BF16), *arguments())

                yield Case(
                    "nf4_product", f"{rows} x [{shape.outputs}, {shape.inputs}], nested", "forward", implementation,
                    product, with_rows, count // 2 + count // 64, "TB/s",
                )  # fmt: skip


# ---- the head ----


def heads() -> Iterator[Case]:
    rows, hidden, vocab = 32768, 2560, 128256

    def arguments():
        return (
            normal(0, (rows, hidden)),
            normal(1, (vocab, hidden), factor=hidden**-0.5),
            jax.random.randint(jax.random.key(2), (rows,), 0, vocab),
        )

    def tiled(h, w, labels):
        return linear_cross_entropy(h, w, labels, implementation="pallas")

    def full(h, w, labels):
        logits = jnp.einsum("td,vd->tv", h, w, preferred_element_type=jnp.float32)
        return jnp.sum(cross_entropy(logits, labels, implementation="xla"))

    functions = {"pallas": tiled, "xla": full}
    if tokamax_has("linear_softmax_cross_entropy_loss"):
        functions["tokamax"] = _tokamax_head
    name = f"rows {rows}, d {hidden}, vocab {vocab}"
    product = 2.0 * rows * hidden * vocab
    for implementation, function in functions.items():
        yield Case(
            "linear_cross_entropy", name, "forward", implementation, function, arguments, product, "TFLOP/s"
        )
        for direction, argnums, products in (("with dh", (0,), 2), ("with dh, dw", (0, 1), 3)):
            # Loss and gradient in one program: ours computes the gradient together with the loss.
            yield Case(
                "linear_cross_entropy", name, direction, implementation,
                jax.value_and_grad(function, argnums), arguments, products * product, "TFLOP/s",
            )  # fmt: skip


def _tokamax_head(h, w, labels):
    import tokamax

    return tokamax.linear_softmax_cross_entropy_loss(h, labels, w.T, reduction="sum")
