"""The same LoRA step in Unsloth, Liger + PEFT, or transformers + PEFT: one process, one row.

Fused AdamW, gradient clipping by norm, the same random tokens each step. `benchmarks/compare.py`
runs pronghorn and the peers side by side on one GPU.

    python benchmarks/peers.py --framework unsloth --folder FOLDER --batch 1 --seq 4096 --checkpointing none
"""

import argparse
import contextlib
import json
import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DELTA_NET_TARGETS = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]


def has_delta_nets(folder: str) -> bool:
    """Whether some layers of the model have a gated delta net in place of attention."""
    settings = json.loads((Path(folder) / "config.json").read_text())
    return "linear_attention" in (settings.get("layer_types") or ())


def targets(folder: str) -> list[str]:
    """Every linear inside of the layers; PEFT and Unsloth take those names for stacked experts' parameters too."""
    return TARGETS + (DELTA_NET_TARGETS if has_delta_nets(folder) else [])


def use_fla_convolution() -> None:
    """flash-linear-attention's Triton kernel for Qwen 3.5's short convolutions.

    transformers takes it from causal-conv1d, which needs nvcc to be installed, and else from PyTorch, which is slow.
    The delta rule itself it takes from flash-linear-attention wherever that can be imported.
    """
    if find_spec("fla") is None or find_spec("causal_conv1d") is not None:
        return
    from fla.modules.causal_conv1d import causal_conv1d
    from transformers.models.qwen3_5 import modeling_qwen3_5

    def convolution(hidden_states, weight, bias=None, activation=None, **_):
        """hidden_states [batch, features, seq], weight [features, width]; fla has tokens in front of features."""
        out, _ = causal_conv1d(hidden_states.transpose(1, 2), weight, bias, activation=activation)
        return out.transpose(1, 2)

    modeling_qwen3_5.causal_conv1d_fn = convolution


def delta_rule_source(folder: str) -> str | None:
    """Where the delta rule came from, asked after a step: "fla 0.6.0" or "torch"; None for a model without."""
    if not has_delta_nets(folder):
        return None
    fla = sys.modules.get("fla")
    used = fla is not None and any(name.startswith("fla.ops.gated_delta_rule") for name in sys.modules)
    return f"fla {getattr(fla, '__version__', 'of unknown version')}" if used else "torch"


def load_unsloth(options):
    from unsloth import FastLanguageModel

    full = options.adapter == "full"
    checkpointing = {"none": False, "full": True, "offload": "unsloth"}[options.checkpointing]
    model, _ = FastLanguageModel.from_pretrained(
        options.folder,
        max_seq_length=options.seq,
        dtype=None,
        load_in_4bit=options.weights == "nf4",
        full_finetuning=full,
        local_files_only=True,
        # Without an adapter nothing else is told, and the default is to recompute.
        **({"use_gradient_checkpointing": checkpointing} if full else {}),
    )
    if full:
        return model
    return FastLanguageModel.get_peft_model(
        model,
        r=options.rank,
        lora_alpha=options.rank,
        lora_dropout=0,
        bias="none",
        target_modules=targets(options.folder),
        use_gradient_checkpointing=checkpointing,
        random_state=0,
    )


def load_transformers(options):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if has_delta_nets(options.folder):
        use_fla_convolution()
    # Fully trained weights are fp32 masters, as ours are; products run in bf16 under autocast.
    dtype = torch.float32 if options.adapter == "full" else torch.bfloat16
    arguments = {"dtype": dtype, "attn_implementation": "sdpa", "device_map": {"": 0}}
    if options.weights == "nf4":
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if options.framework == "liger":
        from liger_kernel.transformers import AutoLigerKernelForCausalLM

        model = AutoLigerKernelForCausalLM.from_pretrained(options.folder, **arguments)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.folder, **arguments)
    if options.adapter == "lora":
        lora = LoraConfig(
            r=options.rank,
            lora_alpha=options.rank,
            target_modules=targets(options.folder),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    if options.checkpointing != "none":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if options.compile:
        model = torch.compile(model)
    return model


def packed_inputs(path: str, framework: str):
    """(arguments of the model, real tokens): all rows one after the other without padding, as TRL's collator has them.

    Unsloth is given the documents' lengths besides, as its own collator does.
    """
    import numpy as np
    import torch

    batch = {name: values.reshape(-1) for name, values in np.load(path).items()}
    real = batch["segment_ids"] > 0
    ids, positions = (
        torch.from_numpy(batch[n][real]).long().cuda()[None] for n in ("input_ids", "positions")
    )
    labels = torch.where(positions == 0, -100, ids)
    inputs = {"input_ids": ids, "labels": labels, "position_ids": positions}
    if framework == "unsloth":
        starts = np.flatnonzero(np.append(batch["positions"][real] == 0, True))
        inputs["packed_seq_lengths"] = torch.from_numpy(np.diff(starts)).int()
    return inputs, int(real.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", required=True, choices=("unsloth", "liger", "transformers"))
    parser.add_argument("--folder", required=True)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--weights", default="bf16", choices=("bf16", "nf4"))
    parser.add_argument("--adapter", default="lora", choices=("lora", "full"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--data", default=None, help="a packed batch, from alpaca_like.py")
    parser.add_argument("--checkpointing", default="none", choices=("none", "full", "offload"))
    parser.add_argument("--attention", default="default", choices=("default", "cudnn", "flash"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--packages", default=None, help="folder of packages that take precedence, such as another Triton"
    )
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--run", default="single")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.packages:
        sys.path.insert(0, options.packages)

    model = load_unsloth(options) if options.framework == "unsloth" else load_transformers(options)
    import torch

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.vocab_size
    if options.data is None:
        ids = torch.randint(0, vocab_size, (options.batch, options.seq), generator=generator).cuda()
        inputs = {"input_ids": ids, "labels": ids}
        tokens = ids.numel()
    else:
        inputs, tokens = packed_inputs(options.data, options.framework)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    seconds, losses, norms, warm_up = [], [], [], 0.0
    begin = time.perf_counter()
    for index in range(options.steps):
        if index == 3:
            torch.cuda.synchronize()
            warm_up = time.perf_counter() - begin
        torch.cuda.synchronize()
        start = time.perf_counter()
        chosen = kinds.get(options.attention)
        with contextlib.ExitStack() as stack:
            if chosen is not None:
                stack.enter_context(sdpa_kernel(chosen))
            if trained[0].dtype == torch.float32 and options.adapter == "full":
                stack.enter_context(torch.autocast("cuda", torch.bfloat16))
            loss = model(**inputs).loss
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
        norms.append(float(norm))
    step_seconds = sorted(seconds[3:])[len(seconds[3:]) // 2]
    from importlib.metadata import version

    names = ["torch", "transformers", "peft", "triton"]
    names += {"unsloth": ["unsloth", "unsloth_zoo"], "liger": ["liger_kernel"], "transformers": []}[
        options.framework
    ]
    row = {
        "framework": options.framework,
        "model": options.model,
        "weights": options.weights,
        "adapter": options.adapter,
        "rank": options.rank,
        "trained_parameters": sum(p.numel() for p in trained),
        "delta_rule": delta_rule_source(options.folder),
        "batch": options.batch,
        "seq": options.seq,
        "memory_policy": options.checkpointing,
        "attention": options.attention,
        "torch_compile": options.compile,
        "documents_per_row": 1 if options.data is None else "alpaca-like",
        "real_tokens": tokens,
        "tokens_per_second": tokens / step_seconds,
        "step_milliseconds": step_seconds * 1e3,
        "peak_device_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_device_gib": torch.cuda.max_memory_reserved() / 2**30,
        "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "loss": losses[-1],
        "grad_norm": norms[-1],
        "losses": losses,
        "grad_norms": norms,
        "compile_seconds": warm_up,
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in names},
        "run": options.run,
    }
    options.out.write_text(json.dumps([row], indent=1) + "\n")
    print(
        f"{options.framework} {options.attention} {options.checkpointing} {options.batch}x{options.seq}: "
        f"{row['tokens_per_second']:,.0f} tokens/s, {row['step_milliseconds']:.1f} ms, "
        f"peak {row['peak_device_gib']:.2f} GiB, loss {losses[-1]:.4f}, grad norm {norms[-1]:.3e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
