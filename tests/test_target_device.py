"""Compiling for a GPU that is not there: what is told without jax's CUDA plugin, and what is compiled with it."""

import json

import jax
import jax.numpy as jnp
import pytest

from pronghorn.cli import main
from pronghorn.errors import InputError
from pronghorn.lora import LoRAConfig
from pronghorn.models.config import DecoderConfig
from pronghorn.pallas_kernels import launch, tuned
from pronghorn.pallas_kernels.flash_attention import flash_attention
from pronghorn.target_device import TARGETS, compiling_for
from pronghorn.training import plan_memory
from pronghorn.training.config import TrainConfig
from pronghorn.training.policy_choice import device_kind, device_limit
from tests import tiny
from tests.compiling import compile_for_h100, h100

CONFIG = DecoderConfig("llama", 512, 256, 512, 2, 4, 2, 64, 1024)


def test_an_unknown_device_is_refused_with_those_that_are_known():
    with pytest.raises(InputError, match="use one of h100"), compiling_for("h9000"):
        pass


def test_everything_asks_for_the_target_inside_of_the_block_alone():
    found = TARGETS["h100"]
    target = launch.Target(
        found.device_kind, found.compute_capability, found.multiprocessors, found.memory_bytes, None
    )
    before = launch.on_gpu(), device_kind(), launch.resolve(None)
    with launch.lowering_for(target):
        assert launch.on_gpu() and not launch.interpreting() and launch.resolve(None) == "pallas"
        assert device_kind() == "NVIDIA H100 80GB HBM3" and device_limit() == found.memory_bytes
        assert tuned.multiprocessors() == 132
    assert (launch.on_gpu(), device_kind(), launch.resolve(None)) == before


def test_a_step_is_compiled_for_it_with_kernels_and_memory_in_its_host():
    with h100():
        plans = {
            policy: plan_memory(
                CONFIG,
                LoRAConfig(rank=4, alpha=4),
                TrainConfig(max_steps=2, batch_size=8, memory_policy=policy),
                jnp.bfloat16,
                max_length=1024,
            )
            for policy in ("keep", "offload")
        }
    assert plans["offload"].pinned_host >= 2 * 8 * 1024 * 256 * 2 > plans["keep"].pinned_host == 0
    assert plans["offload"].peak_device_bytes < plans["keep"].peak_device_bytes


def test_cudnn_is_asked_about_the_target_and_not_about_this_machine():
    head_dim = 256  # cuDNN has it from Hopper on
    heads = jax.ShapeDtypeStruct((1, 256, 2, head_dim), jnp.bfloat16)
    text = compile_for_h100(lambda q: jax.grad(lambda q: jnp.sum(flash_attention(q, q, q)))(q), heads)
    assert "cudnn$fmha" in text


def test_a_plan_for_a_device_that_cannot_be_compiled_for_says_what_it_takes(tmp_path, capsys):
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "rows.jsonl")
    job = {"model": str(tmp_path / "model"), "data": {"path": str(tmp_path / "rows.jsonl")}}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    assert main(["plan", str(tmp_path / "job.yaml"), "--device", "h9000"]) != 0
    assert "use one of h100" in capsys.readouterr().err
    try:
        with h100():
            pass
    except pytest.skip.Exception:
        assert main(["plan", str(tmp_path / "job.yaml"), "--device", "h100"]) != 0
        assert "CUDA 13 plugin" in capsys.readouterr().err
    else:
        assert main(["plan", str(tmp_path / "job.yaml"), "--device", "h100"]) == 0
        assert "device memory" in capsys.readouterr().out
    assert jax.default_backend() in ("cpu", "gpu")
