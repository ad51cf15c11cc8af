"""What ptxas made of a kernel: how far its loads are from their first use, and how many are in flight together."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_REGISTER = re.compile(r"\bR(\d+)\b")
_WIDE = {"64": 2, "128": 4}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its address, its name with all modifiers, and its operands as they are printed."""

    address: int
    name: str
    operands: str

    @property
    def target(self) -> range:
        """The registers that a load writes."""
        first = _REGISTER.match(self.operands)
        width = next((_WIDE[part] for part in self.name.split(".") if part in _WIDE), 1)
        return range(int(first[1]), int(first[1]) + width) if first else range(0)

    @property
    def sources(self) -> set[int]:
        """The registers that are named after the first operand, or that a store names."""
        written = "" if self.name.startswith(("ST", "RED")) else self.operands.partition(",")[0]
        found = {int(number) for number in _REGISTER.findall(self.operands.removeprefix(written))}
        if self.name.startswith(("HMMA", "IMMA")):  # an operand names the first of its registers
            found |= {number + 1 for number in found}
        return found


def instructions(sass: str) -> list[Instruction]:
    """Those of the text that nvdisasm prints of one function."""
    return [Instruction(int(at, 16), name, operands.strip()) for at, name, operands in _LINE.findall(sass)]


def use_distances(code: list[Instruction], load: str) -> list[int]:
    """For each load whose name begins with ``load``: how many instructions come before the first that needs it.

    The code is followed in the order in which it lies, which is that of a loop's body.
    """
    distances = []
    for index, one in enumerate(code):
        if not one.name.startswith(load):
            continue
        wanted = set(one.target)
        later = range(index + 1, len(code))
        distances.append(next((at - index - 1 for at in later if code[at].sources & wanted), len(code) - index))
    return distances


def batches(code: list[Instruction], load: str) -> list[int]:
    """Sizes of the groups of loads of which none waits for another: the loads before the first use of any of them."""
    groups, pending = [], []  # type: tuple[list[int], list[set[int]]]
    for one in code:
        if any(one.sources & target for target in pending):
            groups.append(len(pending))
            pending = []
        if one.name.startswith(load):
            pending.append(set(one.target))
    return [*groups, len(pending)] if pending else groups


def tool(name: str) -> str | None:
    """The path of ``cuobjdump`` or ``nvdisasm``: the toolkit's, or the one in triton's wheel; None without either."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        found = str(inside) if inside.exists() else None
    return found


def functions(cubin: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """Each kernel in a cubin: its mangled name and its code."""
    disassembler = tool("nvdisasm")
    if disassembler is None:
        raise FileNotFoundError("nvdisasm is neither on the path nor in triton's wheel")
    text = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"^\.text\.(?=\S+:$)", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(":")
        yield name, instructions(body)


def toolkit() -> str | None:
    """The release of nvcc, as "13.0"; None without nvcc."""
    if shutil.which("nvcc") is None:
        return None
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", told)
    return found[1] if found else None


def compile_kernels(file: str, architecture: str, folder: Path) -> tuple[Path, str]:
    """The cubin of the bf16 kernels of ``csrc/cuda/<file>.cu`` for one architecture, with the build's options, and
    ptxas's words.
    """
    out = folder / f"{file}.{architecture}.cubin"
    flags = ["-std=c++20", "-O3", "-Xptxas=-v", f"-arch={architecture}", f"-I{ROOT / 'csrc'}"]
    source = ROOT / "csrc" / "cuda" / f"{file}.cu"
    done = subprocess.run(["nvcc", *flags, "-DLSK_ONLY_BF16", "-cubin", "-o", str(out), str(source)],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return out, done.stderr
