"""Write the measured figures of README.md from benchmarks/results/, so that no figure is typed by hand.

python benchmarks/readme_tables.py           # rewrite README.md
python benchmarks/readme_tables.py --check   # exit 1 when it is out of date
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str):
    """The rows or record of a result file, or None."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else None


def quickstart_block() -> str:
    """What the quickstart printed on two CPU cores, and on a GPU when that was recorded."""
    blocks = []
    for name in ("quickstart-cpu.json", "quickstart-gpu.json"):
        record = read(name)
        if record is not None:
            blocks.append("```\n" + record["summary"].rstrip() + "\n```")
    return "\n\n".join(blocks)


def figures_block() -> str:
    """GPU tests, kernels by device, and steps by run."""
    parts = []
    tests = read("gpu-tests.json")
    if tests is not None:
        count = tests["count"]
        parts.append(
            f"Kernels: {count['passed']} GPU tests passed, {count['failure'] + count['error']} failed, on one "
            f"{tests['device']} (jax {tests['versions']['jax']}, {tests['date'][:10]}, commit {tests['commit'][:8]}): "
            "`python benchmarks/record_gpu_tests.py`."
        )
        parts += [
            f"Of the kernels that changed since, {later['count']['passed']} tests passed, "
            f"{later['count']['failure'] + later['count']['error']} failed ({later['date']}, commit "
            f"{later['commit'][:8]}): `{later['command']}`."
            for later in tests.get("later", ())
        ]
    parts += [kernel_table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("kernels-*.json"))]
    delta = read("delta-rule-fla.json")
    if delta is not None:
        parts.append(delta_table(delta))
    rows = [row for path in sorted(RESULTS.glob("step-*.json")) for row in json.loads(path.read_text())]
    rows = [row for row in rows if "error" not in row]
    for run in dict.fromkeys(row["run"] for row in rows):
        parts.append(step_table([row for row in rows if row["run"] == run]))
    longest = read("longest-context.json")
    if longest is not None:
        parts.append(longest_table(longest))
    return "\n\n".join(parts)


def kernel_table(record: dict) -> str:
    """One run of benchmarks/kernels.py: our kernels, their share of the ceiling, and how they compare."""
    ceiling = record["ceilings"]
    lines = [
        f"Each kernel alone on one {record['device']}, bf16. Ceilings measured in the same run: a product "
        f"{ceiling['TFLOP/s']:,.0f} TFLOP/s, a copy {ceiling['TB/s']:.2f} TB/s. Attention counts the pairs that are "
        "visible; speeds are ours over the other's:",
        "",
        "| kernel | case | | ms | rate | of the ceiling | against XLA | against cuDNN |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if row["implementation"] != "pallas" or "milliseconds" not in row:
            continue
        against = row.get("speed_against", {})
        ratio = [f"{against[other]:.2f}x" if other in against else "" for other in ("xla", "cudnn")]
        rate = f"{row['rate']:,.0f}" if row["unit"] == "TFLOP/s" else f"{row['rate']:.2f}"
        lines.append(
            f"| {row['op']} | {row['case']} | {row['direction']} | {row['milliseconds']:.3f} | {rate} {row['unit']} | "
            f"{row['share_of_ceiling']:.0%} | {ratio[0]} | {ratio[1]} |"
        )
    lines += [
        "",
        f"Commit {record['commit'][:8]}, jax {record['versions']['jax']}, {record['date'][:10]}: `{record['command']}`",
    ]
    return "\n".join(lines)


def delta_table(record: dict) -> str:
    """The run of benchmarks/delta_rule_fla.py."""
    lines = [
        f"The gated delta rule of a layer of Qwen3.5 9B on one {record['device']}, bf16, beside XLA's in fp32 and "
        f"flash-linear-attention {record['versions']['flash-linear-attention']} (Triton "
        f"{record['versions']['triton']}; in a CUDA graph, and as it is called). Largest errors are shares of the "
        "oracle's largest value:",
        "",
        "| case | | implementation | ms | ms as called | largest error |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        called = f"{row['eager_milliseconds']:.3f}" if "eager_milliseconds" in row else ""
        error = "the oracle" if row["implementation"] == "xla" else f"{max(row['errors'].values()):.1e}"
        lines.append(
            f"| {row['case']} | {row['direction']} | {row['implementation']} | {row['milliseconds']:.3f} | {called} | "
            f"{error} |"
        )
    lines += [
        "",
        f"Commit {record['commit'][:8]}, jax {record['versions']['jax']}, {record['date'][:10]}: `{record['command']}`",
    ]
    return "\n".join(lines)


def _what_is_trained(rows: list[dict]) -> str:
    lora = f"LoRA r={rows[0]['rank']} on every linear of the layers"
    if all(row["adapter"] == "full" for row in rows):
        return "Full fine-tuning"
    return lora if all(row["adapter"] == "lora" for row in rows) else f"{lora}, or full fine-tuning"


def step_table(rows: list[dict]) -> str:
    """One run on one device as a table."""
    first = rows[0]
    lines = [
        f"{_what_is_trained(rows)}, one after the other on one {first['device']}, random weights of "
        "true shape, no padding (each framework draws its own weights and tokens, hence the losses; packed rows hold "
        "the same documents of an instruction set's lengths, and real tokens count):",
        "",
        "| framework | model | weights | batch x seq | memory policy | tokens/s | MFU | peak GiB | compile s | loss | "
        "gradient norm |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mfu = f"{row['mfu']:.1%}" if row.get("mfu") else ""
        weights = row["weights"] + (", full" if row["adapter"] == "full" else "")
        policy = row["memory_policy"] + (", scanned" if row.get("layers") == "scanned" else "")
        shape = f"{row['batch']}x{row['seq']}"
        if row.get("documents_per_row") == "alpaca-like":
            shape += ", packed"
        note = f", {row['attention']} attention" if row.get("attention", "default") != "default" else ""
        lines.append(
            f"| {row['framework']}{note} | {row['model']} | {weights} | {shape} | "
            f"{policy} | {row['tokens_per_second']:,.0f} | {mfu} | {row['peak_device_gib']:.1f} | "
            f"{row['compile_seconds']:.0f} | {row['loss']:.3f} | {row['grad_norm']:.3f} |"
        )
    notes = [
        f"{row['framework']}, {row['model']}, {row['memory_policy']}: {row['note']}."
        for row in rows
        if "note" in row
    ]
    if notes:
        lines += ["", "\\* " + " ".join(notes)]
    ours = next((row for row in rows if row["framework"] == "pronghorn"), None)
    if ours is not None:
        lines += ["", f"Commit {ours['commit'][:8]}, jax {ours['versions']['jax']}: `{ours['command']}`"]
    return "\n".join(lines)


def longest_table(record: dict) -> str:
    """The runs of benchmarks/longest_context.py, a pool each."""
    lines = [
        f"Rows that NF4 LoRA (r=32, Llama-3.1-8B shape, one row) trains on in capped pools of device memory of one "
        f"{record['device']}, beside the lengths that Unsloth publishes; what a pool had no real step for is read from "
        "the compiled program (`python benchmarks/longest_context.py`):",
        "",
        "| pool GB | tokens | Unsloth's | | device GB | pinned host GiB | seconds a step | loss | gradient norm |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        step = (
            f"{row['step_seconds']:,.0f} | {row['loss']:.3f} | {row['grad_norm']:.3f}"
            if "step_seconds" in row
            else "not run | | "
        )
        lines.append(
            f"| {row['pool_gb']} | {row['tokens']:,} | {row['published_unsloth']:,} | "
            f"{row['tokens'] / row['published_unsloth']:.2f}x | {row['planned_device_gb']:.1f} | "
            f"{row['pinned_host_gib']:.1f} | {step} |"
        )
    return "\n".join(lines)


def filled(text: str, marker: str, block: str) -> str:
    """`text` with what stands between the marker's two comments replaced."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    head, rest = text.split(begin, 1)
    _, tail = rest.split(end, 1)
    return f"{head}{begin}\n{block}\n{end}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when README.md is out of date"
    )
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = filled(filled(text, "quickstart", quickstart_block()), "figures", figures_block())
    if options.check:
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
