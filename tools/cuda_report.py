"""What ptxas made of every CUDA kernel, without a GPU: ``python -m tools.cuda_report``.

The build keeps ptxas's own words beside each object; this reads them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# CUDA kernels: what ptxas reports

Written by `make cuda-report`, which needs nvcc but no GPU. Registers a thread on each architecture, then bytes of
static shared memory, stack frame and spills.

"""


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture: registers a thread, bytes of static shared memory, of stack and of spills."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int


def parse(text: str) -> Iterator[Kernel]:
    """Each kernel in the output of ``ptxas -v``; what functions it calls need counts as its own."""
    kernel: Kernel | None = None
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel = Kernel(found[1], found[2], 0, 0, 0, 0)
        elif kernel is None:
            continue
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, found.groups())
            kernel = replace(kernel, stack=max(kernel.stack, stack), spills=kernel.spills + stores + loads)
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            yield replace(kernel, registers=int(found[1]), shared=int(shared[1]) if shared else 0)
            kernel = None


def logs() -> list[Path]:
    """What the last build of the CUDA library in this checkout left; empty without one."""
    built = [one.parent for one in (ROOT / "build").glob("layerskip_kernels._cuda-*/_cuda.abi3.so")]
    if not built:
        return []
    last = max(built, key=lambda folder: (folder / "build.ninja").stat().st_mtime)
    objects = re.findall(r"^build (\S+): nvcc", (last / "build.ninja").read_text(), re.MULTILINE)
    return [last / f"{name}.ptxas" for name in objects]


def kernels(files: Iterable[Path]) -> list[Kernel]:
    """All kernels, with the names that people use."""
    found = [kernel for file in files for kernel in parse(file.read_text())]
    return [replace(kernel, name=name) for kernel, name in zip(found, _readable(found), strict=True)]


def _readable(found: list[Kernel]) -> list[str]:
    names = [kernel.name for kernel in found]
    if shutil.which("c++filt") is None or not names:
        return names
    told = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [_short(name) for name in told.splitlines()]


def _short(name: str) -> str:
    """Without namespaces, parameters and what CUDA calls its types."""
    head = re.split(r">\(|(?<=\w)\(", name)[0]
    head = head + ">" if "<" in head and not head.endswith(">") else head
    head = re.sub(r"lsk::|\(anonymous namespace\)::|^void ", "", head)
    return re.sub(r"\((?:int|bool|unsigned int)\)", "", head).replace("__nv_bfloat16", "bf16").replace("__half", "fp16")


def markdown(found: list[Kernel]) -> str:
    """A table with a line a kernel, and a column an architecture."""
    archs = sorted({kernel.arch for kernel in found}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    rows: dict[str, dict[str, Kernel]] = {}
    for kernel in found:
        rows.setdefault(kernel.name, {})[kernel.arch] = kernel
    lines = [f"| kernel | {' | '.join(archs)} | static shared | stack | spills |", "|---" * (len(archs) + 4) + "|"]
    for name, by_arch in sorted(rows.items()):
        each = by_arch.values()
        registers = [str(by_arch[arch].registers) if arch in by_arch else "" for arch in archs]
        rest = [max(kernel.shared for kernel in each), max(kernel.stack for kernel in each)]
        cells = [f"`{name}`", *registers, *map(str, rest), str(max(kernel.spills for kernel in each))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Read, show, write; 1 where something spills."""
    parser = argparse.ArgumentParser(prog="python -m tools.cuda_report", description=__doc__)
    parser.add_argument("--output", type=Path, help="a Markdown file to write")
    args = parser.parse_args()
    if not logs():
        parser.error("the CUDA library was not built here: LAYERSKIP_CUDA=1 python setup.py build_ext --inplace")
    found = kernels(logs())
    text = markdown(found)
    print(text)
    if args.output is not None:
        args.output.write_text(f"{HEAD}{text}\n", encoding="utf-8")
    spilled = [kernel for kernel in found if kernel.stack or kernel.spills]
    if spilled:
        raise SystemExit("\n".join(f"spills or has a stack frame: {kernel}" for kernel in spilled))


if __name__ == "__main__":
    main()
