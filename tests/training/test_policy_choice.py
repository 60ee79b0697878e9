"""Which memory policy "auto" takes, and what it says of the others."""

import dataclasses

import numpy as np
import pytest

from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig
from pronghorn.models.config import RopeConfig
from pronghorn.models.experts_config import ExpertsConfig
from pronghorn.models.extras_config import AltUpConfig, ExtrasConfig
from pronghorn.models.latent_config import LatentConfig
from pronghorn.models.memory_policies import POLICIES
from pronghorn.training import TrainConfig, plan_memory
from pronghorn.training.policy_choice import cost_lines, estimate_policies, first_that_fits
from tests.training.small import small_config

GIB = 2**30
LLAMA = small_config(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)


def costs(length=4096, rows=2, device="NVIDIA H100 80GB HBM3"):
    return estimate_policies(LLAMA, micro_batches=1, rows=rows, length=length, itemsize=2, device_kind=device)


def choose(peaks, limit, resident=0, length=4096):
    """The policies compiled on the way, and the one taken."""
    compiled = []

    def compile_policy(policy):
        compiled.append(policy)
        if isinstance(peaks[policy], Exception):
            raise peaks[policy]
        return policy

    found, known = first_that_fits(
        costs(length),
        compile_policy,
        lambda policy: (peaks[policy], 0),
        resident_bytes=resident,
        limit=limit,
    )
    return compiled, found, known


def test_keeping_everything_is_fastest_and_products_faster_than_the_bus_make_offloading_slower():
    fast = {cost.policy: cost.relative_time for cost in costs()}
    slow = {cost.policy: cost.relative_time for cost in costs(device="NVIDIA B200")}
    assert set(fast) == set(POLICIES) and fast["keep"] == 1.0 == min(fast.values())
    assert fast["offload_attention"] == fast["attention"] < fast["offload"] == fast["layer_inputs"] < 1.5
    assert slow["offload_projections"] > slow["attention"]


def kept_by(config, policy):
    found = estimate_policies(
        config, micro_batches=1, rows=1, length=1, itemsize=1, device_kind="NVIDIA H100"
    )
    cost = next(cost for cost in found if cost.policy == policy)
    return (cost.kept_device_bytes + cost.kept_host_bytes) / config.num_layers, cost


def test_latent_vectors_are_counted_in_the_place_of_heads():
    """A layer of DeepSeek-V3: its input and the stream, both latent vectors, attention's output padded and cut, gate
    and up; and its heads are expanded again whatever the policy is."""
    latent = LatentConfig(512, 128, 64, 128, query_rank=1536)
    config = dataclasses.replace(
        LLAMA,
        hidden_size=7168,
        num_heads=128,
        num_kv_heads=128,
        head_dim=192,
        intermediate_size=18432,
        latent=latent,
    )
    kept, cost = kept_by(config, "keep")
    assert kept == 2 * 7168 + 1536 + 576 + 128 * (192 + 128) + 2 * 18432
    assert cost.recomputed_flops == 2 * (1536 * 128 * 192 + 512 * 128 * 256) * 32
    assert kept_by(config, "offload_projections")[0] == 2 * 7168 + 1536 + 576 + 128 * (192 + 128)


def test_a_token_keeps_gate_and_up_of_the_experts_that_it_chose():
    experts = ExpertsConfig(64, 6, 1408, shared_width=2816, dense_layers=tuple(range(8)))
    dense, sparse = kept_by(LLAMA, "keep")[0], kept_by(dataclasses.replace(LLAMA, experts=experts), "keep")[0]
    wide = (8 * 14336 + 24 * (6 * 1408 + 2816)) // 32
    assert dense - sparse == 2 * (14336 - wide)


def test_layers_of_different_sizes_are_counted_as_they_are_and_streams_all_of_them():
    """Two sliding layers with small heads and two full ones; the last two read the others' keys and values."""
    extras = ExtrasConfig(
        sliding_head_dim=64, sliding_kv_heads=4, shared_kv_layers=2, layer_widths=(100, 100, 200, 200)
    )
    config = dataclasses.replace(
        LLAMA,
        num_layers=4,
        layer_kinds=("sliding", "full") * 2,
        layer_ropes=("local", "global") * 2,
        local_rope=RopeConfig(),
        sliding_window=8,
        block="sandwich",
        extras=extras,
    )
    queries, keys = 32 * (64 + 128) // 2, (4 * 64 + 8 * 128) // 4
    assert kept_by(config, "keep")[0] == 2 * 4096 + 2 * queries + 2 * keys + 2 * 150
    streams = dataclasses.replace(extras, altup=AltUpConfig(4, 0, True, 64))
    assert kept_by(dataclasses.replace(config, extras=streams), "layer_inputs")[0] == 4 * 4096


def test_longer_rows_leave_more_time_to_move_projections():
    order = [cost.policy for cost in costs(length=32768, rows=1)]
    assert order.index("offload_projections") < order.index("offload_attention")


def test_what_cannot_fit_is_not_compiled_and_the_first_that_fits_is_taken():
    peaks = dict.fromkeys(POLICIES, 10 * GIB) | {"attention": 30 * GIB, "keep": 90 * GIB}
    compiled, found, known = choose(peaks, limit=40 * GIB, resident=16 * GIB)
    assert "keep" not in compiled and compiled[-1] == found
    assert {cost.policy for cost in known if cost.peak_device_bytes} == set(compiled)
    assert choose(peaks, limit=None)[1] == "keep"


def test_a_device_without_pinned_memory_gets_a_policy_without():
    peaks = {
        p: ValueError("no addressable memory pinned_host") if POLICIES[p].offloaded else 20 * GIB
        for p in POLICIES
    }
    assert not POLICIES[choose(peaks, limit=24 * GIB, resident=16 * GIB)[1]].offloaded


def test_a_fault_of_ours_in_an_offloading_step_is_not_taken_for_a_lack_of_memory():
    peaks = {p: ValueError("a shape") if POLICIES[p].offloaded else 90 * GIB for p in POLICIES}
    with pytest.raises(ValueError, match="a shape"):
        choose(peaks, limit=24 * GIB, resident=16 * GIB)


def test_what_host_memory_cannot_hold_is_not_compiled():
    compiled = []

    def compile_policy(policy):
        compiled.append(policy)
        return policy

    found, _ = first_that_fits(
        costs(),
        compile_policy,
        lambda _: (20 * GIB, 0),
        resident_bytes=16 * GIB,
        limit=21 * GIB,
        host_limit=3 * GIB,  # layer inputs are 2 GiB, attention's output and the stream after it 4 more
    )
    assert not {"offload_attention", "offload_projections"} & set(compiled) and found == "layer_inputs"


def test_nothing_that_fits_is_one_sentence_with_the_smallest_need():
    peaks = dict.fromkeys(POLICIES, 50 * GIB) | {"offload": 33 * GIB}
    with pytest.raises(InputError, match=r"needs 33\.00 GiB and the device has 20\.00 GiB"):
        choose(peaks, limit=20 * GIB)


def test_the_table_marks_the_choice_and_what_was_not_compiled():
    peaks = dict.fromkeys(POLICIES, 10 * GIB)
    _, found, known = choose(peaks, limit=12 * GIB, resident=8 * GIB)
    lines = cost_lines(known, found)
    assert len(lines) == len(POLICIES) + 1
    starred = [line for line in lines if line.startswith("*")]
    assert len(starred) == 1 and found in starred[0] and "~" not in starred[0]
    assert all("~" in line for line in lines[1:] if line not in starred)


def test_plan_takes_the_policy_that_fits_a_given_memory():
    config = small_config(num_layers=2, intermediate_size=512)
    train = TrainConfig(max_steps=3, batch_size=8)
    options = {"max_length": 64, "layers": "scanned"}
    lora = LoRAConfig(rank=2)
    kept = plan_memory(config, lora, train, np.float32, **options)
    assert kept.memory_policy == "keep" and "* keep" in str(kept)
    limit = int(kept.peak_device_bytes * 0.9)
    smaller = plan_memory(config, lora, train, np.float32, memory_limit=limit, **options)
    assert smaller.memory_policy != "keep" and smaller.peak_device_bytes <= limit
