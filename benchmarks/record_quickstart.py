"""Keep what a quickstart measured: runs/quickstart/report.json -> results/quickstart-cpu.json or -gpu.json.

make quickstart && python benchmarks/record_quickstart.py
"""

import argparse
import json
from pathlib import Path

import common

from pronghorn.quickstart import summary

# Curves and samples stay in the run's own folder.
KEPT = (
    "model",
    "device",
    "steps",
    "heldout_loss_before",
    "heldout_loss_after",
    "heldout_improvement",
    "forgetting",
    "general_loss_before",
    "general_loss_after",
    "grad_norm_min",
    "final_loss",
    "adapter_kl",
    "merged_kl",
    "tokens_per_second",
    "compile_seconds",
    "peak_device_bytes",
    "planned_device_bytes",
    "seconds",
    "config",
    "versions",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=Path("runs/quickstart/report.json"))
    parser.add_argument("--commit", default=None, help="commit to record where the tree has no .git")
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    # Wherever it ran, the reader's own run will be in the default folder.
    report |= {"adapter_dir": "runs/quickstart/adapter", "merged_dir": "runs/quickstart/merged"}
    kind = "cpu" if report["device"] == "cpu" else "gpu"
    record = {name: report[name] for name in KEPT}
    record |= {
        "summary": summary(report, Path("runs/quickstart")),
        "commit": common.commit(options.commit),
        "command": "make quickstart",
    }
    common.write(common.RESULTS / f"quickstart-{kind}.json", record)


if __name__ == "__main__":
    main()
