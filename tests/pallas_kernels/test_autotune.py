"""The tuner: what it measures, what it leaves out and says so, and that each of its jobs is what it claims."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pronghorn.errors import InputError
from pronghorn.pallas_kernels import autotune, autotune_jobs, shapes, tuned
from pronghorn.pallas_kernels.autotune import Job

SMALL = {
    shapes.AttentionShape: {"batch": 1, "seq": 20, "num_heads": 2, "num_kv_heads": 1},
    shapes.RowShape: {"rows": 5, "width": 24},
    shapes.LowrankShape: {"rows": 37, "width": 70, "rank": 6, "down_rank": 3},
    shapes.RopeShape: {"batch": 1, "seq": 5, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "rotated": 8},
    shapes.HeadShape: {"rows": 3, "vocab": 300},
    shapes.WeightShape: {"outputs": 6, "inputs": 64},
    shapes.RoutedShape: {"rows": 70, "groups": 3, "inputs": 40, "outputs": 24},
}


def small(shape):
    return shape._replace(**SMALL[type(shape)])


def job(**changes):
    """Doubles its argument; the candidate (3,) is wrong and (4,) does not trace."""

    def run(x):
        (value,) = tuned.choice("double", x.dtype, 1)
        if value == 4:
            raise ValueError("no such layout\nand more lines")
        return x * (2.5 if value == 3 else 2.0)

    base = Job(
        op="double",
        key="32-bit/1",
        label="a test",
        arguments=lambda: (jnp.ones(8),),
        run=run,
        expected=lambda: jnp.full(8, 2.0),
        part=lambda out: out,
        candidates=((1,), (2,), (3,), (4,), (5,)),
        work=(1e-6, "FLOP"),
        too_large=lambda choice: "too large" if choice == (5,) else None,
    )
    return dataclasses.replace(base, **changes)


def test_the_fastest_right_candidate_wins_and_the_others_are_named_with_their_reason():
    lines = []
    rows = autotune.tune([job()], budget=60, print_line=lines.append, threads=1)
    by_choice = {tuple(row["choice"]): row for row in rows}
    assert all(by_choice[c]["milliseconds"] > 0 and "skipped" not in by_choice[c] for c in [(1,), (2,)])
    assert "departs from the oracle by 2.5e-01" in by_choice[3,]["skipped"]
    assert by_choice[4,]["skipped"] == "ValueError: no such layout"
    assert by_choice[5,]["skipped"] == "too large"
    (best,) = [row for row in rows if row.get("best")]
    assert best["milliseconds"] == min(row["milliseconds"] for row in rows if "milliseconds" in row)
    assert autotune.choices(rows) == {"double": {"32-bit/1": tuple(best["choice"])}}
    text = "\n".join(lines)
    assert "<- best" in text and "skipped: too large" in text


def test_a_used_up_budget_chooses_nothing():
    rows = autotune.tune([job()], budget=0, print_line=lambda _: None, threads=1)
    assert autotune.choices(rows) == {}
    assert all("budget" in row["skipped"] or row["skipped"] == "too large" for row in rows)


@pytest.mark.parametrize("group", autotune_jobs.GROUPS)
def test_oracle_and_kernel_of_every_job_give_the_same_shapes(group):
    for one in autotune_jobs.jobs([group]):
        found = jax.eval_shape(
            lambda *a, run=one.run, part=one.part: part(run(*a)), *jax.eval_shape(one.arguments)
        )
        expected = jax.eval_shape(one.expected)
        shapes_of = functools.partial(jax.tree.map, lambda x: x.shape)
        assert shapes_of(found) == shapes_of(expected), one.op


@pytest.mark.parametrize("group", ["attention", "rms_norm", "lowrank_gated", "grouped_linear"])
def test_kernels_of_the_tuner_pass_its_check_and_wrong_ones_do_not(group):
    jobs = autotune_jobs.jobs([group], largest=small, head_dims=[64] if group == "attention" else ())
    for op, one in {one.op: one for one in jobs}.items():
        arguments, expected = one.arguments(), one.expected()
        with tuned.candidate(op, (16, 16, 4, 2) if group == "attention" else one.candidates[0]):
            # Interpreted kernels run once and take long to compile: spare the compiler its passes.
            quick = jax.jit(
                lambda *a, run=one.run: run(*a), compiler_options={"xla_backend_optimization_level": 0}
            )
            found = quick(*arguments)
        assert autotune.error(one, found, expected) <= autotune.LIMIT, op
        wrong = jax.tree.map(lambda x: x + jnp.max(jnp.abs(x)).astype(x.dtype), found)
        assert not autotune.error(one, wrong, expected) <= autotune.LIMIT, op


def test_attention_candidates_beyond_the_shared_memory_are_left_out():
    (forward, *_) = autotune_jobs.jobs(["attention"], head_dims=[128])
    assert forward.too_large((128, 128, 8, 2)) is None
    assert "KiB of shared memory" in forward.too_large((128, 128, 8, 4))


@pytest.mark.parametrize(
    ("arguments", "message"), [((["attn"],), "'attn' is no kernel"), (((), 80), "head dim 80")]
)
def test_unknown_kernels_and_head_dims_are_refused(arguments, message):
    names, *head_dim = arguments
    with pytest.raises(InputError, match=message):
        autotune_jobs.jobs(names, head_dims=head_dim)
