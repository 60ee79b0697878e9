"""What ptxas makes of each kernel for an H100, on a machine without one: registers, spills, and two faults.

Tensor cores add up in registers while a program goes on, until it waits for them. ptxas (13.5) can go wrong in both
directions, and says so in one of them only:

* early: it moves instructions that read those registers in front of the wait. Sums are wrong, now and then.
* serialized: it cannot tell that nothing reads them (warning C7514), and waits after each product. Sums are right and
  late.

Both are seen where a loop of products may have no step: its registers are then joined with zeros of the other way. The
kernels are the benchmark's cases, or with --candidates everything that the tuner tries; exit status 1 where one is
early. Kernels of wgmma alone are listed.

Needs jax's CUDA plugin, jax 0.11 or later, and nvdisasm (pip install nvidia-cuda-nvdisasm).

    JAX_PLATFORMS=cpu python benchmarks/machine_code.py
    JAX_PLATFORMS=cpu python benchmarks/machine_code.py --candidates --only grouped
"""

import argparse
import contextlib
import dataclasses
import re
import shutil
import site
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import jax
import kernel_case
import kernel_cases

from pronghorn.pallas_kernels import autotune_jobs, launch, tuned
from pronghorn.target_device import compiling_for

ARCHITECTURE = "sm_90a"
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\d+\.F32\S* R(\d+), .*")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)")


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """One kernel.

    Attributes:
      products: wgmma instructions.
      early: instructions that touch the sums of a product that was not waited for.
      serialized: ptxas waits after each product.
    """

    kernel: str
    registers: int
    spilled_bytes: int
    products: int
    early: int
    serialized: bool


def tool(name: str) -> str:
    """The path of a CUDA tool: on the PATH, or inside of an installed wheel."""
    places = [shutil.which(name), *(str(p) for folder in site.getsitepackages() for p in _in(folder, name))]
    for place in places:
        if place:
            return place
    raise SystemExit(f"{name} was not found; pip install nvidia-cuda-{'nvcc' if name == 'ptxas' else name}.")


def _in(folder: str, name: str) -> Iterator[Path]:
    for pattern in (f"nvidia/*/bin/{name}", f"triton/backends/nvidia/bin/{name}"):
        yield from Path(folder).glob(pattern)


def ptx_of(function: Callable[..., Any], arguments: Sequence[Any], device: Any) -> list[str]:
    """The PTX of each kernel of the jitted function, compiled for the device of `compiling_for`."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    places = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with tempfile.TemporaryDirectory() as folder:
        options: Any = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        jax.jit(lambda *a: function(*a)).lower(*places).compile(compiler_options=options)
        return [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]


def machine_code(ptx: str) -> MachineCode:
    """Assemble one kernel, and read what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        said = subprocess.run(
            [tool("ptxas"), f"-arch={ARCHITECTURE}", "-v", "-O3", str(source), "-o", str(cubin)],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
        text = subprocess.run(
            [tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True
        )
    entry = re.search(r"\.entry (\S+?)\(", ptx)
    lines = [re.sub(r"/\*.*?\*/", "", line).strip().rstrip(";").strip() for line in text.stdout.splitlines()]
    return MachineCode(
        kernel=entry.group(1) if entry else "?",
        registers=int(_number(r"Used (\d+) registers", said)),
        spilled_bytes=int(_number(r"(\d+) bytes spill stores", said)),
        products=sum("HGMMA" in line for line in lines),
        early=early_reads(lines),
        serialized="C7514" in said,
    )


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else "0"


def early_reads(lines: Sequence[str]) -> int:
    """How many instructions touch sums in flight, read from top to bottom.

    A product ends its group with gsb0, `DEPBAR.LE gsb0, n` waits for all groups but the last n. A product may go on
    with the sums of the one before it. Behind a jump that is always taken nothing is known, and nothing is in flight.
    """
    flying: list[set[int]] = []  # the registers of each group
    open_group: set[int] = set()
    early = 0
    for line in lines:
        product, wait = PRODUCT.search(line), WAIT.search(line)
        if product:
            count, first = int(product.group(1)) // 2, int(product.group(2))
            open_group |= set(range(first, first + count))
            if "gsb0" in line:
                flying.append(open_group)
                open_group = set()
        elif wait:
            left = int(wait.group(1), 16)
            flying = flying[len(flying) - left :] if left else []
        elif re.match(r"(BRA|EXIT|RET)\b", line):
            flying, open_group = [], set()
        elif flying or open_group:
            early += bool(_registers(line) & set.union(open_group, *flying))
    return early


def _registers(line: str) -> set[int]:
    """The registers that an instruction reads or writes, neighbours of a wide operand included."""
    operation, _, operands = re.sub(r"^@!?U?P\w+ ", "", line).partition(" ")
    found = {int(n) for n in re.findall(r"\bR(\d+)", operands)}
    found |= {int(n) + 1 for n in re.findall(r"\bR(\d+)(?:\.reuse)?\.64", operands)}
    data = [int(n) for n in re.findall(r"(?:^|, )-?R(\d+)", operands)]  # those of addresses stand in brackets
    if data and ".WIDE" in operation:
        found |= {data[0] + 1, data[-1] + 1}
    elif data:
        words = (
            4
            if ".128" in operation or "M88.4" in operation
            else 2
            if re.search(r"\.64|^CS2R", operation)
            else 1
        )
        at = data[-1] if operation.startswith("ST") else data[0]
        found |= set(range(at, at + words))
    return found


def kernels(candidates: bool, only: str) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], Any]]:
    """(name, function, abstract arguments, context to trace it in)."""
    if candidates:
        for job in autotune_jobs.jobs():
            for choice in job.candidates:
                name = f"{job.op} {job.label} {','.join(map(str, choice))}"
                if re.search(only, name) and job.too_large(choice) is None:
                    yield name, job.run, jax.eval_shape(job.arguments), tuned.candidate(job.op, choice)
        return
    for case in kernel_cases.cases():
        name = f"{case.op} {case.name} {case.direction}"
        if case.implementation == "pallas" and re.search(only, name):
            yield name, _with_gradient(case), jax.eval_shape(case.arguments), contextlib.nullcontext()


def _with_gradient(case: kernel_case.Case) -> Callable[..., Any]:
    if not case.gradient:
        return case.function

    def both(*arguments):
        out, pull = jax.vjp(lambda *d: case.function(*d, *arguments[case.wrt :]), *arguments[: case.wrt])
        return pull(jax.tree.map(lambda y: (y * 0.5).astype(y.dtype), out))

    return both


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser, "machine-code")
    parser.add_argument("--only", default="", help="a regular expression of ops and cases")
    parser.add_argument("--candidates", action="store_true", help="everything that the tuner tries")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    seen: dict[str, MachineCode] = {}
    with compiling_for("h100") as target, launch.kernels("pallas"):
        for name, function, arguments, context in kernels(options.candidates, options.only):
            try:
                with context:
                    sources = ptx_of(function, arguments, target.device)
            except Exception as error:  # one that does not compile must not hide the others
                rows.append({"case": name, "failed": str(error).strip().splitlines()[0][:200]})
                print(f"{name}: {rows[-1]['failed']}", flush=True)
                continue
            for ptx in sources:
                if "wgmma" not in ptx:
                    continue
                if ptx not in seen:
                    seen[ptx] = machine_code(ptx)
                rows.append({"case": name} | dataclasses.asdict(seen[ptx]))
                print(line(rows[-1]), flush=True)
        record = common.environment(options.commit, "nvidia-cuda-nvcc") | {
            "device": target.device_kind,
            "rows": rows,
        }
    common.write(options.out, record)
    return int(any(row.get("early") for row in rows))


def line(row: dict[str, Any]) -> str:
    """One line of the printed table."""
    faults = [f"{row['early']} EARLY"] * bool(row["early"]) + ["serialized"] * row["serialized"]
    return (
        f"{row['case']:<74} {row['kernel']:<28} {row['products']:>3} products {row['registers']:>3} registers "
        f"{row['spilled_bytes']:>4} spilled {', '.join(faults)}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
