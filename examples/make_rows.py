"""Write the rows of the recipes from what is on every machine, or one package away.

    python examples/make_rows.py topics rows/topics.jsonl          the language reference, for continued pretraining
    python examples/make_rows.py docstrings rows/docstrings.jsonl  functions of Python's library and their docstrings
    python examples/make_rows.py functions rows/functions.jsonl    questions and the function call that answers each

The last needs the Berkeley function-calling leaderboard's data (Apache-2.0): pip install --no-deps bfcl-eval. Its
package is read and never imported.
"""

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SYSTEM = "Answer with one JSON object that calls the function: {name, arguments}. The function: "


def topics() -> Iterator[dict[str, Any]]:
    """Raw text: the chapters of Python's language reference that `help()` shows."""
    from pydoc_data.topics import topics as chapters

    for name in sorted(chapters):
        yield {"text": chapters[name].strip()}


def docstrings() -> Iterator[dict[str, Any]]:
    """Chats of one domain: a function, and what its docstring says."""
    from pronghorn.data.docstrings import docstring_rows

    yield from docstring_rows("train")


def functions() -> Iterator[dict[str, Any]]:
    """Chats: one function, a question, the call. Of several accepted arguments the first is taken."""
    spec = find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("bfcl-eval is not installed; run: pip install --no-deps bfcl-eval")
    data = Path(spec.submodule_search_locations[0]) / "data"
    for name in ("BFCL_v4_simple_python.json", "BFCL_v4_multiple.json"):
        questions, answers = (
            {
                row["id"]: row
                for row in map(json.loads, (data / folder / name).read_text("utf-8").splitlines())
            }
            for folder in (".", "possible_answer")
        )
        for key, row in questions.items():
            [(called, accepted)] = answers[key]["ground_truth"][0].items()
            # An empty string among the accepted values means that the argument may be left out.
            arguments = {argument: values[0] for argument, values in accepted.items() if "" not in values}
            function = next(f for f in row["function"] if f["name"] == called)
            yield {
                "messages": [
                    {"role": "system", "content": SYSTEM + json.dumps(function)},
                    *row["question"][0],
                    {"role": "assistant", "content": json.dumps({"name": called, "arguments": arguments})},
                ]
            }


def main() -> None:
    makers = {"topics": topics, "docstrings": docstrings, "functions": functions}
    if len(sys.argv) != 3 or sys.argv[1] not in makers:
        raise SystemExit(__doc__)
    out = Path(sys.argv[2])
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in makers[sys.argv[1]]()]
    out.write_text("".join(rows), encoding="utf-8")
    print(f"{out}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
