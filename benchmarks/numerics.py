"""Measure what docs/numerics.md shows: how far logits and gradients are from transformers, case by case, in fp32.

The same cases as tests/models/test_parity.py, which fails where a limit is passed; here the distances are kept.

    python benchmarks/numerics.py
"""

import argparse
import sys
from pathlib import Path

import common
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.models.reference import (  # noqa: E402
    decoder_results,
    gradient_error,
    random_ids,
    tiny_torch_model,
    to_decoder,
    torch_results,
)
from tests.models.test_parity import CASES  # noqa: E402
from tests.tolerances import MODEL_GRADIENT, MODEL_LOGITS  # noqa: E402

DOCUMENT = ROOT / "docs" / "numerics.md"


def measure(name: str) -> dict:
    """Worst logit and worst gradient of one case."""
    from pronghorn.models import family_for

    model_type, layers, tokens, overrides = CASES[name]
    torch_model = tiny_torch_model(model_type, **overrides)
    ids = random_ids(tokens)
    expected_logits, expected = torch_results(torch_model, ids)
    model = to_decoder(torch_model, layers=layers)
    logits, gradients = decoder_results(model, ids)
    names = family_for(torch_model.config.to_dict()).tensor_names(model.config)
    errors = {ours: gradient_error(gradients[ours], expected[theirs]) for ours, theirs in names.items()}
    worst = max(errors, key=errors.__getitem__)
    return {
        "case": name,
        "model_type": model_type,
        "layers": layers,
        "tokens": tokens,
        "logits_max_abs": float(np.max(np.abs(logits - expected_logits))),
        "gradients": len(errors),
        "worst_gradient": worst,
        "worst_gradient_relative": float(errors[worst]),
    }


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"Limits: logits {MODEL_LOGITS:.0e} absolute, each gradient {MODEL_GRADIENT:.0e} relative to its norm.",
        "",
        "| case | family | layers | tokens | logits, largest difference | gradients | the worst of them |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        worst = f"{row['worst_gradient_relative']:.1e} ({row['worst_gradient']})"
        lines.append(
            f"| {row['case']} | {row['model_type']} | {row['layers']} | {row['tokens']} | "
            f"{row['logits_max_abs']:.1e} | {row['gradients']} | {worst} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_arguments(parser, "numerics")
    options = parser.parse_args()
    rows = []
    for name in CASES:
        rows.append(measure(name))
        print(rows[-1], flush=True)
    common.write(options.out, {**common.environment(options.commit, "torch", "transformers"), "rows": rows})
    text = DOCUMENT.read_text()
    head, rest = text.split("<!-- parity:begin -->", 1)
    _, tail = rest.split("<!-- parity:end -->", 1)
    DOCUMENT.write_text(f"{head}<!-- parity:begin -->\n{table(rows)}\n<!-- parity:end -->{tail}")


if __name__ == "__main__":
    main()
