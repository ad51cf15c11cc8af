"""Compiles ``ops/*.cpp`` and copies of it with ninja into ``build/cuda_emulation``."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FOLDER = ROOT / "build" / "cuda_emulation"

COMMON = [
    "-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-U_FORTIFY_SOURCE",
    "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wextra",
]  # fmt: skip
# The hooks that these call are in runtime/hooks.h; no sanitizer's library is linked.
DEVICE = [
    "-DLSK_CUDA_EMULATION", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,alignment,shift,integer-divide-by-zero", "-fno-sanitize-recover=all",
    "-Wno-unknown-pragmas", "-Wno-attributes", f"-isystem {HERE / 'include'}",
]  # fmt: skip

RULES = """\
rule cxx
  command = g++ $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = g++ -shared $in -o $out
build runtime.o: cxx {runtime}
  flags = {flags}
build {name}.o: cxx {source}
  flags = {device_flags}
build {name}.so: link {name}.o runtime.o
"""


def _ninja() -> str:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja") or "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


def build(name: str, variant: str = "", overlay: Path | None = None) -> Path:
    """Compile one library; gives its path.

    Parameters
    ----------
    name : str
        Of the file in ``ops``.
    variant : str
        Added to the library's name.
    overlay : Path, optional
        A folder whose headers come before those of the checkout, under the same names: ``cuda/exit_head.cuh``.
    """
    source, name = HERE / "ops" / f"{name}.cpp", name + variant
    FOLDER.mkdir(parents=True, exist_ok=True)
    common = [*COMMON, f"-I{HERE.parent}"]
    include = [f"-I{folder}" for folder in (overlay, ROOT / "csrc") if folder is not None]
    text = RULES.format(
        name=name,
        source=source,
        runtime=HERE / "runtime" / "runtime.cpp",
        flags=" ".join(common),
        device_flags=" ".join([*COMMON, *DEVICE, *include, f"-I{HERE.parent}"]),
    )
    with (FOLDER / "lock").open("w") as lock:  # several test processes share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = FOLDER / f"{name}.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        command = [_ninja(), "-C", str(FOLDER), "-f", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling {source} failed:\n{done.stdout}{done.stderr}")
    return FOLDER / f"{name}.so"
