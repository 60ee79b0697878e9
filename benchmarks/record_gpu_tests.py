"""Run the tests marked `gpu` on the GPU of this machine and record the outcome in results/gpu-tests.json.

Continuous integration has no GPU: this file is the proof that the kernels were right on one.

    python benchmarks/record_gpu_tests.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import common

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_arguments(parser, "gpu-tests")
    parser.add_argument("tests", nargs="*", default=["tests"], help="files or folders to run")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes at once (pytest-xdist); 0 is this one"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *options.tests, f"--junitxml={report}"]
        command += ["-p", "no:cacheprovider", "--tb=short", "--durations=15"]
        if options.workers:
            command += ["-n", str(options.workers), "-v"]
        # Several processes share the card, and none needs much of it. Timing candidate products for one another's
        # oracles on a shared card takes minutes and decides nothing here.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
        outcome = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": flags}
        )
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    tests = [
        {
            "test": f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}",
            "outcome": next(
                (kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed"
            ),
            "seconds": float(case.get("time", 0)),
        }
        for case in cases
    ]
    count = {
        kind: sum(t["outcome"] == kind for t in tests) for kind in ("passed", "failure", "error", "skipped")
    }
    common.write(
        options.out, {**common.environment(options.commit, "pytest"), "count": count, "tests": tests}
    )
    print(count)
    return outcome.returncode


if __name__ == "__main__":
    sys.exit(main())
