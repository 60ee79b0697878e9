"""How fast rows become tokens, how full packed rows are, and what a batch costs the host.

Conversations and texts of an instruction set's lengths, made of English words; the whole way is measured: reading rows
from memory, rendering the chat template, tokenising, masks, packing. Two cores: run it as

    taskset -c 0,1 python benchmarks/tokenizing.py --tokenizer FOLDER
"""

import argparse
import os
import time
from pathlib import Path

import alpaca_like
import common
import numpy as np

from pronghorn.data import DataConfig, Loader, tokenize_rows


def rows(kind: str, count: int, seed: int = 0) -> list[dict]:
    """Rows of about `alpaca_like.lengths` tokens: 1.3 tokens a word is usual."""
    words = np.asarray(" ".join(p["text"] for p in _texts()).split())
    rng = np.random.default_rng(seed)
    made = []
    for tokens in alpaca_like.lengths(seed, count).tolist():
        text = rng.choice(words, max(4, int(tokens / 1.35)))
        cut = len(text) // 4
        if kind == "text":
            made.append({"text": " ".join(text)})
        else:
            question, answer = " ".join(text[:cut]), " ".join(text[cut:])
            made.append({"prompt": question, "response": answer})
    return made


def _texts() -> list[dict]:
    from pronghorn.data.general_text import general_text_rows

    return list(general_text_rows())


def measure(kind: str, tokenizer, count: int, repeats: int) -> dict:
    """The best of some runs: whatever else the machine does only ever slows it down."""
    made, best = rows(kind, count), {"tokens_per_second": 0.0, "tokens_per_processor_second": 0.0}
    for _ in range(repeats):
        wall, busy = time.perf_counter(), time.process_time()
        dataset = tokenize_rows(made, tokenizer, DataConfig(max_length=4096))
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        tokens = dataset.stats.real_tokens
        best["tokens_per_second"] = max(best["tokens_per_second"], tokens / wall)
        best["tokens_per_processor_second"] = max(best["tokens_per_processor_second"], tokens / busy)
    return best | {"rows": kind, "tokens": dataset.stats.real_tokens, "format": dataset.format.reason}


def batches(shape: tuple[int, int], count: int, steps: int = 100) -> dict:
    """Packing efficiency and the time of `Loader.batch_at`."""
    loader: Loader = alpaca_like.packed_loader(*shape, 32_000, count=count)
    loader.batch_at(0)
    taken = []
    for step in range(1, steps + 1):
        start = time.perf_counter()
        loader.batch_at(step)
        taken.append(time.perf_counter() - start)
    start = time.perf_counter()
    loader.streams[0].epoch_plan(1)
    return {
        "rows": f"batches of {shape[0]}x{shape[1]}",
        "packing_efficiency": loader.efficiency,
        "batch_milliseconds": float(np.median(taken) * 1e3),
        "epoch_plan_milliseconds": (time.perf_counter() - start) * 1e3,
        "documents": count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_arguments(parser, "tokenizing")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder with a tokenizer.json and a template"
    )
    parser.add_argument("--count", type=int, default=8000, help="rows of each kind")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    from pronghorn.converters.huggingface import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "vocabulary": len(tokenizer),
    }
    environment = common.environment(options.commit, "tokenizers", "transformers", "numpy")
    found = []
    for kind in ("conversations", "text"):
        row = measure(kind, tokenizer, options.count, options.repeats)
        print(
            f"{kind}: {row['tokens_per_second']:,.0f} tokens/s on {machine['cores']} cores, "
            f"{row['tokens_per_processor_second']:,.0f} a processor second ({row['tokens']:,} tokens)",
            flush=True,
        )
        found.append(row | machine | environment)
    for shape in ((4, 4096), (8, 2048), (1, 8192)):
        row = batches(shape, 52_000)
        print(
            f"{row['rows']}: {row['packing_efficiency']:.2%} full, {row['batch_milliseconds']:.2f} ms a batch, "
            f"{row['epoch_plan_milliseconds']:.0f} ms to draw an epoch of {row['documents']:,} documents",
            flush=True,
        )
        found.append(row | machine | environment)
    common.write(options.out, found)


if __name__ == "__main__":
    main()
