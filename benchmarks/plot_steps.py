"""A plot of tokens/s against device memory, one panel a job, from results/step-*.json.

python benchmarks/plot_steps.py            # writes results/steps.png
"""

import argparse
import json
from pathlib import Path

import common


def jobs(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by job: model, adapter, batch x seq. Weights are marked on the point."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if "error" not in row and row.get("comparable", True):
            packed = ", packed" * (row.get("documents_per_row") == "alpaca-like")
            name = f"{row['model']}, {row['adapter']}, {row['batch']}x{row['seq']}{packed}"
            found.setdefault(name, []).append(row)
    return {name: group for name, group in found.items() if len({row["framework"] for row in group}) > 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "steps.png")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        row for path in sorted(common.RESULTS.glob("step-*.json")) for row in json.loads(path.read_text())
    ]
    panels = jobs(rows)
    columns = 3
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False)
    colours = {
        "pronghorn": "tab:orange",
        "unsloth": "tab:blue",
        "liger": "tab:green",
        "transformers": "tab:red",
    }
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, group) in zip(axes.flat, panels.items(), strict=False):
        for row in group:
            axis.scatter(
                row["peak_device_gib"], row["tokens_per_second"], color=colours[row["framework"]], s=60
            )
            label = f" {row['framework']} {row['weights']}"
            axis.annotate(label, (row["peak_device_gib"], row["tokens_per_second"]), fontsize=8)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("peak device memory, GiB")
        axis.set_ylabel("tokens/s")
        axis.set_xlim(0, 1.35 * max(row["peak_device_gib"] for row in group))
        axis.set_ylim(0, 1.15 * max(row["tokens_per_second"] for row in group))
    figure.tight_layout()
    figure.savefig(options.out, dpi=110)
    print(f"wrote {options.out.name}")


if __name__ == "__main__":
    main()
