"""Wheels and installs work outside the checkout, with and without a compiler."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import ROOT, Run, copy_of_checkout, pip, run, succeeded

USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import layerskip_kernels as lk
import torch, layerskip
messages = [str(warning.message) for warning in caught if "layerskip_kernels" in str(warning.message)]
out = lk.rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
torch.testing.assert_close(out, torch.tensor([[3.0, 4.0]]) / 12.5**0.5)
print(lk.__file__)
print(lk.explain("rms_norm", out, torch.ones(2), 0.0).backend)
print(messages)
"""


def use(python: Path, where: Path) -> list[str]:
    """Import both packages and call an op, from an empty directory; where from, the backend, and the warnings."""
    empty = where / "empty"
    empty.mkdir()
    return succeeded(run([str(python), "-c", USE], empty)).stdout.splitlines()


def install(python: Path, *arguments: str, where: Path) -> Run:
    return succeeded(pip("--python", str(python), "install", "--no-deps", *arguments, where=where))


def test_wheel_serves_every_later_python(wheel: Path) -> None:
    _, version, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("cp310", "abi3")
    assert platform.startswith("linux_") or platform.startswith("macosx_")
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()


def test_wheel_has_every_module_and_data_file(wheel: Path, checkout: Path) -> None:
    wanted = {"layerskip_kernels/_cpu.abi3.so"}
    for root in (checkout, checkout / "python"):
        for package in ("layerskip_kernels", "layerskip"):
            wanted |= {str(path.relative_to(root)) for path in (root / package).rglob("*") if path.is_file()}
    wanted = {name for name in wanted if not name.endswith((".pyc", ".md"))}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == wanted


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf to read the library with")
def test_library_needs_no_python(wheel: Path, tmp_path: Path) -> None:
    """No libtorch_python, no symbol of CPython, nothing found through a path of the machine that built it."""
    library = zipfile.ZipFile(wheel).extract("layerskip_kernels/_cpu.abi3.so", tmp_path)
    dynamic = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    assert "[libtorch_cpu.so]" in dynamic
    for unwanted in ("libtorch_python", "libpython", "RPATH", "RUNPATH"):
        assert unwanted not in dynamic
    symbols = subprocess.run(
        ["readelf", "--dyn-syms", "-W", library], capture_output=True, text=True, check=True
    ).stdout
    undefined = [line.split()[-1] for line in symbols.splitlines() if " UND " in line and len(line.split()) > 7]
    assert undefined
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]


def test_wheel_works_outside_the_checkout(wheel: Path, environment: Callable[[], Path], tmp_path: Path) -> None:
    python = environment()
    install(python, str(wheel), where=tmp_path)
    file, backend, messages = use(python, tmp_path)
    assert Path(file).is_relative_to(tmp_path / "environment")
    assert (backend, messages) == ("cpu", "[]")
    script = succeeded(run([str(python.parent / "layerskip"), "--help"], tmp_path / "empty"))
    assert "generate" in script.stdout


def test_install_from_the_sources(wheel: Path, checkout: Path, environment: Callable[[], Path], tmp_path: Path) -> None:
    """``pip install --no-build-isolation .``; what the wheel compiled is not compiled again."""
    python = environment()
    install(python, "--no-build-isolation", ".", where=checkout)
    file, backend, _ = use(python, tmp_path)
    assert Path(file).is_relative_to(tmp_path / "environment")
    assert backend == "cpu"


def test_editable_install(wheel: Path, checkout: Path, environment: Callable[[], Path], tmp_path: Path) -> None:
    python = environment()
    install(python, "--no-build-isolation", "-e", ".", where=checkout)
    file, backend, _ = use(python, tmp_path)
    assert Path(file).is_relative_to(checkout)
    assert backend == "cpu"


def test_without_a_compiler(environment: Callable[[], Path], tmp_path: Path) -> None:
    """A pure Python wheel; it says at the build what is missing, at import once, and computes all the same."""
    source = copy_of_checkout(tmp_path / "source")
    (tmp_path / "nothing").mkdir()
    arguments = ["wheel", "-v", ".", "--no-build-isolation", "--no-deps", "-w", str(tmp_path / "wheel")]
    built = succeeded(pip(*arguments, where=source, PATH=str(tmp_path / "nothing"), CXX=None))
    assert (built.stdout + built.stderr).count("no C++ compiler found (CXX, c++, g++, clang++)") == 1
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    python = environment()
    install(python, str(wheel), where=tmp_path)
    _, backend, messages = use(python, tmp_path)
    assert backend == "reference"
    assert messages.count("_cpu.abi3.so was not built") == 1
    assert "Install g++" in messages
