"""The team of threads of the CPU kernels: nobody runs ahead, and who waits for long leaves its core to others."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build team.cpp with")
def test_waits(tmp_path: Path) -> None:
    assert COMPILER is not None
    program = tmp_path / "team"
    flags = ["-std=c++20", "-O2", "-fopenmp", f"-I{HERE.parents[1] / 'csrc'}"]
    subprocess.run([*shlex.split(COMPILER), *flags, str(HERE / "team.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
