"""Flash attention against its oracle: values and every gradient, each feature alone and together."""

import dataclasses
import functools
import importlib

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import attention_blocks, launch, tuned
from pronghorn.pallas_kernels.attention_blocks import AttentionBlocks, KernelBlocks
from pronghorn.pallas_kernels.attention_bounds import interval_bounds
from pronghorn.pallas_kernels.cudnn_attention import FORWARD_PRIMITIVES
from pronghorn.pallas_kernels.flash_attention import (
    attention_saveable,
    flash_attention,
    flash_attention_reference,
)
from tests.lowering import lower_for_h100
from tests.pallas_kernels.comparison import (
    assert_matches_oracle,
    equations,
    gradient,
    kernel_outputs,
    normal,
    shapes_computed,
    value_and_gradients,
)
from tests.tolerances import assert_close

# Small, unlike, and not dividing the lengths below: every loop has whole blocks and both edges.
SMALL = AttentionBlocks(
    forward=KernelBlocks(16, 32, 4, 2), dkdv=KernelBlocks(32, 16, 4, 2), dq=KernelBlocks(32, 16, 4, 2)
)
# Segments of one token, of many, an id that comes back, and padding at the end.
PACKED = np.array([[1] + [2] * 40 + [3] + [1] * 20 + [0] * 5, [7] * 67])


@dataclasses.dataclass(frozen=True)
class Case:
    seq_len: int = 67
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    dtype: str = "float32"
    batch: int = 2
    segments: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    blocks: AttentionBlocks | None = SMALL

    def arguments(self):
        """q, k, v and, where there are any, sinks; and the cotangent of the output."""
        query = (self.batch, self.seq_len, self.heads, self.head_dim)
        key = (self.batch, self.seq_len, self.kv_heads, self.head_dim)
        tensors = [normal(i, shape, self.dtype) for i, shape in enumerate((query, key, key))]
        return (*tensors, normal(3, (self.heads,))) if self.sinks else tuple(tensors), normal(
            4, query, self.dtype
        )

    def op(self, implementation):
        """The call as a function of the differentiable arguments."""
        options = {"sliding_window": self.window, "softcap": self.softcap, "scale": self.scale}
        if self.segments:
            options["segment_ids"] = jnp.asarray(PACKED if self.seq_len == 67 else long_segments(self))
        call = flash_attention_reference
        if implementation != "xla":
            call = functools.partial(flash_attention, implementation=implementation, blocks=self.blocks)
        return lambda q, k, v, sinks=None: call(q, k, v, sinks=sinks, **options)

    @property
    def names(self):
        return ("o", "dq", "dk", "dv", "dsinks")[: 5 if self.sinks else 4]


def long_segments(case):
    """Sorted ids: about one segment in 300 tokens, of any length, and one-token segments at both ends."""
    cuts = np.random.default_rng(5).integers(1, case.seq_len, (case.batch, case.seq_len // 300))
    ids = 1 + (np.arange(case.seq_len)[None, :, None] >= cuts[:, None, :]).sum(-1)
    ids[:, 0], ids[:, -1] = 0, 9999
    return ids


def assert_case(case, implementation="pallas"):
    arguments, cotangent = case.arguments()
    assert_matches_oracle(
        case.op(implementation), case.op("xla"), arguments, cotangent, case.dtype, case.names
    )


# A group of 2 query heads is cut in parts here (few programs), a group of 3 is summed inside the kernel.
CASES = {
    "causal": Case(),
    "group of three": Case(heads=6, segments=True),
    "group of three, bf16, all of it": Case(
        heads=6, dtype="bfloat16", segments=True, window=9, softcap=2.0, sinks=True
    ),
    "window": Case(window=7),
    "window of one": Case(window=1, seq_len=33),
    "window longer than the row": Case(window=100, sinks=True, heads=2),
    "window, odd head dim": Case(window=20, head_dim=80, dtype="float16", softcap=5.0),
    "softcap and scale": Case(softcap=1.5, scale=0.7, heads=2),
    "sinks, head dim 128, blocks by rule": Case(sinks=True, head_dim=128, dtype="bfloat16", blocks=None),
    "largest heads, blocks by rule": Case(
        segments=True, heads=2, kv_heads=1, head_dim=320, dtype="bfloat16", blocks=None
    ),
    "rows fill the blocks": Case(seq_len=64, batch=1, window=24),
    "one token": Case(seq_len=1, sinks=True, blocks=None),
    "three tokens": Case(seq_len=3, head_dim=16, window=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernels_match_the_oracle(case):
    assert_case(case)


def test_oracle_matches_attention_written_out_for_one_row():
    q, k, v = (normal(i, (1, 5, 1, 4)) for i in range(3))
    sinks, segments = jnp.array([0.3]), jnp.array([[1, 1, 1, 1, 2]])
    options = {"segment_ids": segments, "sliding_window": 2, "softcap": 1.2, "sinks": sinks, "scale": 0.5}
    out = jax.jit(lambda *a: flash_attention_reference(*a, **options))(q, k, v)
    logits = {
        s: 1.2 * np.tanh(0.5 * np.dot(q[0, 3, 0], k[0, s, 0]) / 1.2) for s in (2, 3)
    }  # token 3 sees 2 and 3
    total = np.exp(0.3) + sum(map(np.exp, logits.values()))
    assert_close(out[0, 3, 0], sum(np.exp(x) / total * np.asarray(v[0, s, 0]) for s, x in logits.items()))
    alone = np.exp(1.2 * np.tanh(0.5 * np.dot(q[0, 4, 0], k[0, 4, 0]) / 1.2))
    assert_close(out[0, 4, 0], alone / (alone + np.exp(0.3)) * v[0, 4, 0])


@pytest.mark.parametrize("window", [None, 1, 6])
def test_interval_bounds_are_the_mask(window):
    k_start, q_end = (np.asarray(x)[:, :, None] for x in interval_bounds(jnp.asarray(PACKED), window))
    t, s = np.arange(67)[:, None], np.arange(67)[None, :]
    run = np.cumsum(np.diff(PACKED, prepend=PACKED[:, :1]) != 0, axis=1)
    mask = (s <= t) & (run[:, :, None] == run[:, None, :]) & (t - s < (window or 67))
    np.testing.assert_array_equal((k_start <= s) & (s <= t), mask)
    np.testing.assert_array_equal(((s.T <= t.T) & (q_end > t.T)).swapaxes(1, 2), mask)


def test_packed_equals_unpacked():
    lengths = (1, 41, 25)
    case = Case(batch=1, sinks=True)
    (q, k, v, sinks), cotangent = case.arguments()
    ids = jnp.asarray(np.repeat([5, 2, 9], lengths))[None]
    packed = functools.partial(flash_attention, segment_ids=ids, implementation="pallas", blocks=SMALL)
    out, gradients = value_and_gradients(lambda q, k, v: packed(q, k, v, sinks=sinks), (q, k, v), cotangent)
    start = 0
    for length in lengths:
        rows = np.s_[:, start : start + length]
        alone, alone_gradients = value_and_gradients(
            lambda q, k, v: flash_attention_reference(q, k, v, sinks=sinks),
            (q[rows], k[rows], v[rows]),
            cotangent[rows],
        )
        assert_close(out[rows], alone, what="o")
        for name, packed_gradient, gradient_alone in zip(
            ("dq", "dk", "dv"), gradients, alone_gradients, strict=True
        ):
            assert_close(packed_gradient[rows], gradient_alone, what=name)
        start += length


def test_layers_in_a_scan_with_rematerialisation_match_the_oracle():
    q, k, v = Case(seq_len=33, heads=2, batch=1).arguments()[0]
    weights = jnp.array([0.5, 1.5, 1.0])

    def stack(q, weights, k, v, implementation):
        @jax.checkpoint
        def layer(x, weight):
            return x + weight * flash_attention(
                x, weight * k, v, sliding_window=20, implementation=implementation, blocks=SMALL
            ), None

        return jax.lax.scan(layer, q, weights)[0]

    op, oracle = (functools.partial(stack, k=k, v=v, implementation=i) for i in ("pallas", "xla"))
    assert_matches_oracle(op, oracle, (q, weights), normal(7, q.shape), "float32", ("o", "dq", "dweights"))


def test_vmap_adds_a_batch_axis():
    case = Case(seq_len=20, batch=1, heads=2, kv_heads=1)
    q, k, v = (jnp.stack([x, 2 * x]) for x in case.arguments()[0])
    out = jax.jit(jax.vmap(case.op("pallas")))(q, k, v)
    assert_close(out, jax.jit(jax.vmap(case.op("xla")))(q, k, v))


def forward_launches(case, implementation, policy):
    """How often attention's forward runs in a gradient through `jax.checkpoint`, dead code removed."""
    checkpointed = jax.checkpoint(lambda *a: jnp.sin(case.op(implementation)(*a)), policy=policy)

    def run(*arguments):
        out, pullback = jax.vjp(checkpointed, *arguments)
        return out, pullback(out)

    program = jax.make_jaxpr(run)(*case.arguments()[0])
    live, _ = dce_jaxpr(program.jaxpr, [True] * len(program.out_avals))
    names = [
        str(e.params["name"]) if e.primitive.name == "pallas_call" else e.primitive.name
        for e in equations(jax.extend.core.jaxpr_as_fun(program.replace(jaxpr=live)), *case.arguments()[0])
    ]
    return sum(name in ("flash_attention_forward", *FORWARD_PRIMITIVES[:1]) for name in names)


def test_saving_the_named_residuals_keeps_the_forward_kernel_from_running_twice():
    assert forward_launches(Case(), "pallas", None) == 2
    assert forward_launches(Case(), "pallas", attention_saveable) == 1


def test_a_gradient_that_nobody_asks_for_is_not_computed():
    q, k, v = Case().arguments()[0]
    program = jax.make_jaxpr(jax.grad(lambda q: Case().op("pallas")(q, k, v).sum()))(q)
    live, _ = dce_jaxpr(program.jaxpr, [True])
    kernels = kernel_outputs(jax.extend.core.jaxpr_as_fun(program.replace(jaxpr=live)), q)
    assert set(kernels) == {"flash_attention_forward", "flash_attention_dq"}


def test_segments_and_windows_make_no_quadratic_array():
    case = Case(seq_len=200, batch=1, window=90)
    ids = jnp.ones((1, 200), jnp.int32)
    op = functools.partial(
        flash_attention, segment_ids=ids, sliding_window=90, implementation="pallas", blocks=SMALL
    )
    shapes = shapes_computed(gradient(op), *case.arguments()[0])
    assert not [s for s in shapes if sum(extent >= 200 for extent in s) > 1]


def test_small_problems_cut_a_group_and_large_ones_sum_it_in_the_kernel():
    def dk_shapes(batch):
        arguments, _ = Case(seq_len=64, batch=batch, heads=4, kv_heads=1).arguments()
        return kernel_outputs(gradient(Case().op("pallas")), *arguments)["flash_attention_dkdv"]

    assert dk_shapes(1)[0] == (1, 64, 4, 32)
    enough = tuned.multiprocessors()  # at least one program each
    assert dk_shapes(enough)[0] == (enough, 64, 1, 32)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_forward_and_backward_lower_for_an_h100(head_dim):
    case = Case(
        seq_len=577, head_dim=head_dim, dtype="bfloat16", blocks=None, segments=True, softcap=30.0, sinks=True
    )
    text = lower_for_h100(gradient(case.op("pallas")), *case.arguments()[0])
    assert text.count("flash_attention_") >= 3 and text.count("xla.gpu.triton") == 3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vmapped_attention_of_any_dtype_lowers_for_an_h100(dtype):
    case = Case(dtype=dtype, head_dim=80, blocks=None)
    arguments = [jnp.stack([x, x]) for x in case.arguments()[0]]
    text = lower_for_h100(gradient(jax.vmap(case.op("pallas"))), *arguments)
    assert text.count("xla.gpu.triton") == 3


def test_blocks_by_rule_fit_every_listed_device():
    for capability, kib in attention_blocks._SHARED_KIB.items():
        for padded in (16, 32, 64, 128, 256, 512):
            for itemsize, dtype in ((2, "bfloat16"), (4, "float32")):
                if not attention_blocks.smallest_fits(padded, dtype, capability):
                    assert (padded, dtype) == (512, "float32") and kib < 227  # these are XLA's
                    continue
                blocks = attention_blocks._rule(padded, itemsize, capability)
                for b, kept, streamed, tiles in (
                    (blocks.forward, blocks.forward.block_q, blocks.forward.block_k, 1),
                    (blocks.dkdv, blocks.dkdv.block_k, blocks.dkdv.block_q, 2),
                    (blocks.dq, blocks.dq.block_q, blocks.dq.block_k, 2),
                ):
                    assert min(kept, streamed) >= 16 and kept & (kept - 1) == streamed & (streamed - 1) == 0
                    tiles_bytes = padded * itemsize * (tiles * kept + 2 * b.num_stages * streamed)
                    assert tiles_bytes <= kib * 1024, (capability, padded, itemsize)


def test_measured_blocks_of_the_device_are_preferred():
    by_rule = attention_blocks.attention_blocks(64, jnp.bfloat16, 4096)
    with tuned.candidate("flash_attention_dq", (64, 16, 2, 3)):
        found = attention_blocks.attention_blocks(64, jnp.bfloat16, 4096)
    assert found.dq == KernelBlocks(block_q=64, block_k=16, num_warps=2, num_stages=3)
    assert (found.forward, found.dkdv) == (by_rule.forward, by_rule.dkdv)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 512, 32, 64), "pallas"),
        ((4, 2048, 32, 64), "pallas"),
        ((1, 4096, 32, 64), "cudnn"),
        ((4, 2048, 9, 64), "cudnn"),
        ((1, 512, 32, 128), "cudnn"),
    ],
)
def test_a_gpu_takes_the_faster_of_two_where_both_can(monkeypatch, shape, expected):
    module = importlib.import_module("pronghorn.pallas_kernels.flash_attention")
    monkeypatch.setattr(module, "unsupported_reason", lambda *_, **__: None)
    query = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert module.default_implementation(query, segment_ids=None, softcap=None, sinks=None) == expected


def test_forcing_cudnn_leaves_calls_it_cannot_make_with_their_default():
    case = Case(seq_len=3, softcap=2.0)
    arguments, _ = case.arguments()
    with launch.kernels("cudnn"):
        out = jax.jit(case.op(None))(*arguments)
    assert_close(out, jax.jit(case.op("xla"))(*arguments))


BAD = {
    "must be \\[batch, seq, heads": {"k": (2, 66, 2, 32)},
    "cannot share 3 kv heads": {"k": (2, 67, 3, 32), "v": (2, 67, 3, 32)},
    "q, k, v are float32, bfloat16": {"k_dtype": "bfloat16"},
    "segment_ids \\(2, 66\\)": {"segment_ids": np.zeros((2, 66), np.int32)},
    "sinks \\(3,\\)": {"sinks": np.zeros(3, np.float32)},
    "sliding_window=0": {"sliding_window": 0},
    "softcap=-1": {"softcap": -1.0},
    "implementation='cudnn'.*softcap|implementation='cudnn': there is no": {
        "implementation": "cudnn", "softcap": 1.0, "dtype": "bfloat16",
    },
    "head dim 528 is over 512": {
        "implementation": "pallas", "q": (1, 2, 1, 528), "k": (1, 2, 1, 528), "v": (1, 2, 1, 528),
    },
}  # fmt: skip


@pytest.mark.parametrize(("message", "change"), BAD.items(), ids=list(BAD))
def test_what_makes_no_attention_is_refused_in_one_sentence(message, change):
    change = dict(change)
    dtype = change.pop("dtype", "float32")
    dtypes = {"q": dtype, "k": change.pop("k_dtype", dtype), "v": dtype}
    shapes = {"q": (2, 67, 4, 32), "k": (2, 67, 2, 32), "v": (2, 67, 2, 32)}
    tensors = {name: jnp.zeros(change.pop(name, shape), dtypes[name]) for name, shape in shapes.items()}
    with pytest.raises(InputError, match=message):
        flash_attention(**tensors, **change)


# ---- on a GPU ----

LARGE = {
    f"{case.seq_len} {case.head_dim} {case.dtype} {index}": case
    for index, case in enumerate(
        [
            Case(1000, 4, 2, 32, "float32", blocks=None),
            Case(1000, 4, 4, 64, "float32", blocks=None, segments=True, window=300, softcap=20.0, sinks=True),
            Case(1000, 2, 1, 128, "float32", blocks=None, window=100),
            Case(577, 2, 1, 256, "float32", blocks=None, sinks=True),
            Case(577, 2, 1, 320, "float32", blocks=None, window=100),
            Case(4097, 4, 1, 64, "bfloat16", batch=1, blocks=None),
            Case(2049, 4, 1, 512, "bfloat16", batch=1, blocks=None, segments=True),
            Case(4097, 6, 2, 128, "bfloat16", batch=1, blocks=None, segments=True),
            Case(4096, 8, 2, 128, "bfloat16", batch=1, blocks=None, window=1024, sinks=True),
            Case(4097, 4, 2, 256, "bfloat16", batch=1, blocks=None, softcap=50.0, window=511),
            Case(1000, 6, 3, 80, "float16", blocks=None, segments=True),
            Case(1000, 4, 2, 96, "bfloat16", blocks=None, softcap=30.0, sinks=True),
            Case(1, 4, 2, 128, "bfloat16", blocks=None),
            Case(127, 4, 2, 64, "float16", blocks=None, window=17),
        ]
    )
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
def test_compiled_kernels_match_the_oracle(case):
    assert_case(case)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(1000, 8, 2, 128, "bfloat16"),
        Case(1000, 4, 4, 64, "float16", window=100),
        Case(578, 4, 2, 80, "bfloat16", window=1),
        Case(130, 4, 2, 256, "bfloat16"),
    ],
    ids=str,
)
def test_cudnn_matches_the_oracle(case):
    assert_case(case, "cudnn")


@pytest.mark.gpu
def test_saving_attention_keeps_cudnn_from_running_twice():
    case = Case(256, 4, 2, 64, "bfloat16")
    assert forward_launches(case, "cudnn", None) == 2
    assert forward_launches(case, "cudnn", attention_saveable) == 1


@pytest.mark.gpu
def test_gradients_are_the_same_bits_every_time():
    case = Case(1000, 8, 2, 64, "bfloat16", blocks=None, segments=True)
    arguments, cotangent = case.arguments()
    first, second = (value_and_gradients(case.op("pallas"), arguments, cotangent) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
