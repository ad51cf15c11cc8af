"""Installs of a copy of the checkout, each into an environment of its own, used from an empty directory."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "layerskip_kernels", "python")

Run = subprocess.CompletedProcess[str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests here slow; they share one build, so one worker of xdist runs them."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.time_limit(7200))
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


@pytest.fixture(scope="session", autouse=True)
def quick_compiler() -> Iterator[None]:
    """Compile without most optimizations, which takes half the time: no test here depends on speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", "-O1")
        yield


def pip(*arguments: str, where: Path, **environment: str | None) -> Run:
    return run([sys.executable, "-m", "pip", *arguments], where, **environment)


def succeeded(done: Run) -> Run:
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose CUDA library has one small file: how it is packed does not depend on more."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    source = copy_of_checkout(tmp_path_factory.mktemp("checkout") / "source")
    cuda = source / "csrc/cuda"
    for file in (*cuda.rglob("*.cu"), *(cuda / "ops").glob("*.cpp")):
        if file.name != "build.cu":
            file.unlink()
    return source


def build_wheel(checkout: Path, folder: Path, **environment: str) -> Path:
    """``pip wheel . --no-build-isolation``."""
    arguments = ["wheel", ".", "--no-build-isolation", "--no-deps", "-w", str(folder)]
    succeeded(pip(*arguments, where=checkout, **environment))
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="session")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without CUDA kernels."""
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"), LAYERSKIP_CUDA="0")


@pytest.fixture(scope="session")
def cuda_wheel(checkout: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a CUDA library, from the same tree."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(checkout, folder, LAYERSKIP_CUDA="1", LAYERSKIP_CUDA_ARCHS="80")


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


@pytest.fixture
def bare_environment(wheel: Path, tmp_path: Path) -> Path:
    """An environment with the wheel and what it requires, no extra among that; gives its Python."""
    folder = tmp_path / "bare"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    target = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for name in required("layerskip-kernels") - {"layerskip-kernels"}:
        distribution = metadata.distribution(name)
        home = Path(str(distribution.locate_file("")))
        for top in {path.parts[0] for path in distribution.files or [] if path.parts[0] not in ("..", "__pycache__")}:
            (target / top).symlink_to(home / top)
    succeeded(pip("--python", str(python), "install", "--no-deps", str(wheel), where=tmp_path))
    return python


def required(name: str) -> set[str]:
    """What a distribution requires here, extras left out, and what that requires."""
    found, open_ends = set(), [name]
    while open_ends:
        found.add(one := canonicalize_name(open_ends.pop()))
        for line in metadata.requires(one) or []:
            wanted = Requirement(line)
            name = canonicalize_name(wanted.name)
            if name not in found and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
                open_ends.append(name)
    return found
