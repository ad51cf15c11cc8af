"""Installs of a copy of the checkout, each into an environment of its own, used from an empty directory."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "layerskip_kernels", "python")

Run = subprocess.CompletedProcess[str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them are slow, and share one build, so one worker of xdist should run them."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("packaging"))


def copy_of_checkout(target: Path) -> Path:
    """The sources alone: nothing that was built."""
    target.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
        elif source.exists():
            shutil.copy(source, target / name)
    return target


def run(command: list[str], where: Path, **environment: str | None) -> Run:
    """Run a command; an environment variable of None is taken away."""
    env = {name: value for name, value in os.environ.items() if name not in environment and name != "PYTHONPATH"}
    env.update({name: value for name, value in environment.items() if value is not None})
    return subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)


def pip(*arguments: str, where: Path, **environment: str | None) -> Run:
    return run([sys.executable, "-m", "pip", *arguments], where, **environment)


def succeeded(done: Run) -> Run:
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    return copy_of_checkout(tmp_path_factory.mktemp("checkout") / "source")


@pytest.fixture(scope="session")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pip wheel . --no-build-isolation``."""
    folder = tmp_path_factory.mktemp("wheel")
    succeeded(pip("wheel", ".", "--no-build-isolation", "--no-deps", "-w", str(folder), where=checkout))
    (built,) = folder.iterdir()
    return built


@pytest.fixture
def environment(tmp_path: Path) -> Callable[[], Path]:
    """Make an environment that sees this one's packages, but not its editable installs; gives its Python."""

    def make() -> Path:
        folder = tmp_path / "environment"
        venv.create(folder, with_pip=False)
        python = folder / "bin" / "python"
        path = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        # Paths named in a .pth are searched, but the .pth files within them are not read.
        Path(path, "outer.pth").write_text("\n".join(site.getsitepackages()))
        return python

    return make
