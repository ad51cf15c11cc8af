"""Worker threads of the CPU kernels: none runs ahead, and a long wait gives up its core."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


@pytest.fixture(scope="module", params=[(), ("-DLSK_PORTABLE_WAIT",)], ids=["here", "portable"])
def program(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler to build thread_pool.cpp with")
    built = tmp_path_factory.mktemp("thread_pool") / "thread_pool"
    flags = ["-std=c++20", "-O2", "-fopenmp", *request.param, f"-I{HERE.parents[1] / 'csrc'}"]
    subprocess.run([*shlex.split(COMPILER), *flags, str(HERE / "thread_pool.cpp"), "-o", str(built)], check=True)
    return built


def run(program: Path, test: str, environment: dict[str, str]) -> None:
    done = subprocess.run([str(program), test], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("test", ["barrier", "sleep"])
def test_workers_wait_for_each_other_and_sleep_in_long_waits(program: Path, test: str) -> None:
    run(program, test, {**os.environ, "LAYERSKIP_FIXED_THREADS": "1"})


def test_worker_sleeps_after_the_spin_limit(program: Path) -> None:
    """Neither earlier nor twice, and it is woken; in simulated time, so that other processes do not matter."""
    run(program, "simulate", dict(os.environ))


def test_only_a_call_that_slept_reduces_the_threads(program: Path) -> None:
    fixed = ("LAYERSKIP_FIXED_THREADS", "LAYERSKIP_FIXED_TEAM")
    run(program, "shrink", {name: value for name, value in os.environ.items() if name not in fixed})
