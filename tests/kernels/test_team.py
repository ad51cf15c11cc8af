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


@pytest.fixture(scope="module", params=[(), ("-DLSK_PORTABLE_WAIT",)], ids=["here", "portable"])
def program(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler to build team.cpp with")
    built = tmp_path_factory.mktemp("team") / "team"
    flags = ["-std=c++20", "-O2", "-fopenmp", *request.param, f"-I{HERE.parents[1] / 'csrc'}"]
    subprocess.run([*shlex.split(COMPILER), *flags, str(HERE / "team.cpp"), "-o", str(built)], check=True)
    return built


def run(program: Path, what: str, environment: dict[str, str]) -> None:
    done = subprocess.run([str(program), what], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("what", ["waits", "sleeps"])
def test_members_wait_for_each_other_asleep_where_that_takes_long(program: Path, what: str) -> None:
    run(program, what, {**os.environ, "LAYERSKIP_FIXED_TEAM": "1"})


def test_a_member_sleeps_when_its_patience_is_over(program: Path) -> None:
    """Not before, once, and it is woken; in a time that is played, so that other processes do not matter."""
    run(program, "plays", dict(os.environ))


def test_only_a_team_that_slept_is_followed_by_a_smaller_one(program: Path) -> None:
    run(program, "shrinks", {name: value for name, value in os.environ.items() if name != "LAYERSKIP_FIXED_TEAM"})
