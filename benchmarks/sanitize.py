"""The gpu tests of the CUDA kernels under compute-sanitizer: what ``benchmarks.gpu --sanitize`` runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# memcheck: reads and writes out of bounds, misaligned ones, errors of the API; racecheck: hazards of shared memory.
TOOLS = ("memcheck", "racecheck")
NO_SANITIZER, FOUND = 3, 9
# Every tensor gets an allocation of its own, so that what is past its end is no other tensor's.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def sanitize() -> int:
    """Run each tool over the tests, say what it found; returns the exit status."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print(
            "compute-sanitizer is not on PATH: it comes with the CUDA toolkit, in its folder bin or compute-sanitizer "
            "(https://developer.nvidia.com/cuda-toolkit)",
            file=sys.stderr,
        )
        return NO_SANITIZER
    root = Path(__file__).parents[1]
    tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(root / "tests" / "kernels" / "cuda_ops")]
    failed = []
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, *tests]
        status = subprocess.run(command, cwd=root, env={**os.environ, **ENVIRONMENT}).returncode
        if status != 0:
            failed.append(f"{tool} (exit {status})")
    print(f"compute-sanitizer: {', '.join(failed)} failed" if failed else f"compute-sanitizer: {TOOLS} found nothing")
    return FOUND if failed else 0
