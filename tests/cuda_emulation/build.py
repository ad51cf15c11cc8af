"""Compiles ``ops/*.cpp`` and copies of it with ninja into ``build/cuda_emulation``."""

from __future__ import annotations

import fcntl
import re
import shlex
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FOLDER = ROOT / "build" / "cuda_emulation"
TYPES = ("float", "__nv_bfloat16", "__half")

COMMON = [
    "-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-U_FORTIFY_SOURCE",
    "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wextra",
]  # fmt: skip
# The hooks that these call are in runtime/hooks.h; no sanitizer's library is linked.
DEVICE = [
    "-DLSK_CUDA_EMULATION", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,alignment,shift,integer-divide-by-zero,signed-integer-overflow", "-fno-sanitize-recover=all",
    "-Wno-unknown-pragmas", "-Wno-attributes", "-isystem", str(HERE / "include"),
]  # fmt: skip

# -MD and not -MMD: the emulator's own headers are found as a system's are, and count.
RULES = """\
rule cxx
  command = g++ $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = g++ -shared $in -o $out
"""


def _ninja() -> str:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja") or "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


def build(name: str, code: int, variant: str = "", overlay: Path | None = None) -> Path:
    """Compile one library for one dtype; gives its path.

    Parameters
    ----------
    name : str
        Of the file in ``ops``.
    code : int
        Of the dtype, a place in `TYPES`.
    variant : str
        Added to the library's name.
    overlay : Path, optional
        A folder whose headers come before those of the checkout, under the same names: ``cuda/exit_head.cu``.
    """
    source, name = HERE / "ops" / f"{name}.cpp", f"{name}{variant}-{TYPES[code].strip('_')}"
    include = [f"-I{folder}" for folder in (overlay, ROOT / "csrc", HERE.parent) if folder is not None]
    runtime = _compile("runtime", HERE / "runtime" / "runtime.cpp", [*COMMON, f"-I{HERE.parent}"], "")
    link = f"build {name}.so: link {name}.o {_escaped(runtime)}.o\n"
    dtype = [f"-DEMU_TYPE={TYPES[code]}", f"-DEMU_CODE={code}"]
    return _compile(name, source, [*COMMON, *DEVICE, *dtype, *include], link).with_suffix(".so")


def _escaped(path: Path) -> str:
    return re.sub("([$ :])", r"$\1", str(path))


def _compile(name: str, source: Path, flags: list[str], then: str) -> Path:
    """What ninja makes of one source, in a folder of its own: several test processes may ask for it at once."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{RULES}build {name}.o: cxx {_escaped(source)}\n  flags = {shlex.join(flags)}\n{then}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        done = subprocess.run([_ninja(), "-C", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling {source} failed:\n{done.stdout}{done.stderr}")
    return folder / name
