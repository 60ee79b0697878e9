"""The kernels of mixtures of experts and of delta nets at real sizes; `kernel_cases` has the others."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from kernel_case import BF16, Case, normal

from pronghorn.models.experts import Order, order_by_expert, rows_by_expert, weighted_sum
from pronghorn.pallas_kernels import shapes
from pronghorn.pallas_kernels.convolved_heads import convolved_heads
from pronghorn.pallas_kernels.gated_delta_rule import gated_delta_rule
from pronghorn.pallas_kernels.grouped_linear import grouped_linear, grouped_linears
from pronghorn.pallas_kernels.stacked_linears import LinearWeights


def layer_cases() -> Iterator[Case]:
    """Every case of this file."""
    yield from convolutions()
    yield from delta_rules()
    yield from linears_of_rows()
    yield from linears_of_tokens()
    yield from routings()


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


def linears_of_rows() -> Iterator[Case]:
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


def linears_of_tokens() -> Iterator[Case]:
    """The first product and the last one of a Qwen 3 30B-A3B, of rows that are copies of tokens: read through their
    order, or copied in front of it and added up behind it."""
    tokens, choices, experts, hidden, width, rank = 4096, 8, 128, 2048, 768, 16

    def read(x, a, b, weight, order, through):
        linears = (LinearWeights(weight, a, b),)
        rows = {"read": order.tokens()} if through else {}
        x = x if through else rows_by_expert(x, order)
        return grouped_linears(x, linears, order.group_sizes, scales=(2.0,), implementation="pallas", **rows)[
            0
        ]

    def summed(x, a, b, weight, order, through):
        linears = (LinearWeights(weight, a, b),)
        rows = {"summed": order.tokens()} if through else {}
        y = grouped_linears(x, linears, order.group_sizes, scales=(2.0,), implementation="pallas", **rows)[0]
        return y if through else weighted_sum(y, jnp.ones((tokens, choices), jnp.float32), order)

    def trained(function):
        """With W in the place of what is trained, and no adapter."""
        return lambda x, weight, order, through: function(x, None, None, weight, order, through)

    def arguments(rows, inputs, outputs, adapter):
        weight = normal(1, (experts, outputs, inputs), factor=0.02)
        factors = (
            normal(2, (experts, rank, inputs), jnp.float32, 0.02),
            normal(3, (experts, outputs, rank), jnp.float32, 0.02),
        )
        return (
            normal(0, (rows, inputs)),
            *(factors if adapter else ()),
            weight,
            chosen_order(tokens, choices, experts),
        )

    work = 2.0 * tokens * choices * hidden * width
    for name, function, sizes in (
        ("read", read, (tokens, hidden, width)),
        ("summed", summed, (tokens * choices, width, hidden)),
    ):
        for direction, form, adapter, wrt, times in (
            ("forward", function, True, 0, 1),
            ("backward, adapter", function, True, 3, 1),
            ("backward, W", trained(function), False, 2, 2),
        ):
            for through in (True, False):
                yield Case(
                    f"grouped_linears, {name}" if through else f"grouped_linears, {name} as copies",
                    f"{tokens} tokens, {choices} of [{experts}, {sizes[2]}, {sizes[1]}]", direction, "pallas",
                    functools.partial(form, through=through), functools.partial(arguments, *sizes, adapter),
                    times * work, "TFLOP/s", gradient=wrt > 0, wrt=wrt,
                )  # fmt: skip


def chosen_order(tokens: int, choices: int, experts: int) -> Order:
    """The order of rows for experts that are drawn."""
    chosen = jax.lax.top_k(normal(0, (tokens, experts), jnp.float32), choices)[1].astype(jnp.int32)
    return order_by_expert(chosen, experts)


def routings() -> Iterator[Case]:
    """Rows to their experts and back to their tokens, in a Qwen 3 30B-A3B: each row moved once, each token once."""
    tokens, choices, experts, hidden = 4096, 8, 128, 2048

    def order():
        return chosen_order(tokens, choices, experts)

    def tokens_and_order():
        return normal(1, (tokens, hidden)), order()

    def rows_and_order():
        weights = jnp.full((tokens, choices), 1 / choices, jnp.float32)
        return normal(2, (tokens * choices, hidden)), weights, order()

    moved = 2.0 * (tokens * choices + tokens) * hidden
    # Differentiated by what the op reads and nothing else: zeros for another array would be written, and timed.
    for op, function, arguments, wrt, times_backward in (
        ("rows_by_expert", rows_by_expert, tokens_and_order, 1, 1.0),
        ("sum of choices", lambda y, order: order.tokens().sum(y), lambda: rows_and_order()[::2], 1, None),
        ("weighted_sum", weighted_sum, rows_and_order, 2, 1.5),
    ):
        for direction, times in (("forward", 1.0), ("backward", times_backward)):
            if times is None:  # part of an op whose gradient is its own
                continue
            yield Case(
                op, f"{tokens} tokens, {choices} of {experts} experts, d {hidden}", direction, "xla", function,
                arguments, times * moved, "TB/s", gradient=direction == "backward", wrt=wrt,
            )  # fmt: skip
