"""Wheels and installs work outside the checkout, with and without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tools import manylinux

from .conftest import ROOT, Run, build_wheel, copy_of_checkout, pip, run, succeeded

needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf to read the library with")

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


def install(python: Path, *arguments: str, where: Path, **environment: str) -> Run:
    return succeeded(pip("--python", str(python), "install", "--no-deps", *arguments, where=where, **environment))


def dynamic_section(wheel: Path, library: str, where: Path) -> str:
    file = zipfile.ZipFile(wheel).extract(f"layerskip_kernels/{library}.abi3.so", where)
    return subprocess.run(["readelf", "-dW", file], capture_output=True, text=True, check=True).stdout


def test_wheel_serves_every_later_python(wheel: Path) -> None:
    _, version, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("cp310", "abi3")
    assert platform.startswith("linux_") or platform.startswith("macosx_")
    assert f'__version__ = "{version}"' in (ROOT / "layerskip_kernels/__init__.py").read_text()


def test_manylinux_tag_of_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """As `make wheel` writes it: a manylinux tag, and no library of torch's or OpenMP's of its own."""
    reason = manylinux.obstacle()
    if reason is not None:
        pytest.skip(reason)
    manylinux.main([str(wheel), "--output", str(tmp_path / "dist")])
    (made,) = (tmp_path / "dist").iterdir()
    assert re.fullmatch(r"layerskip_kernels-[\d.]+-cp310-abi3-(manylinux_\d+_\d+_\w+\.?)+\.whl", made.name)
    libraries = [name for name in zipfile.ZipFile(made).namelist() if ".so" in name]
    assert libraries == ["layerskip_kernels/_cpu.abi3.so"]


def test_cibuildwheel_leaves_the_same_libraries_outside() -> None:
    command = re.search(r"auditwheel repair [^\"]*", (ROOT / "pyproject.toml").read_text())
    assert command is not None
    assert re.findall(r"--exclude '?([\w*.]+)", command[0]) == list(manylinux.EXCLUDED)


def test_a_wheel_that_cannot_be_repaired_is_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = [tmp_path / f"one-1-{tag}.whl" for tag in ("py3-none-any", "cp310-abi3-linux_x86_64")]
    for made in wheels:
        made.write_text(made.name)
    monkeypatch.setattr(manylinux, "find_spec", lambda name: None)
    manylinux.main([*map(str, wheels), "--output", str(tmp_path / "dist")])
    assert [path.read_text() for path in sorted((tmp_path / "dist").iterdir())] == sorted(made.name for made in wheels)
    printed = capsys.readouterr().out
    assert printed.count('as it is: auditwheel is not installed (pip install -e ".[dev]")') == 2
    monkeypatch.setattr(manylinux, "obstacle", lambda: None)
    manylinux.main([str(wheels[0]), "--output", str(tmp_path / "dist")])
    assert "as it is: it has no compiled library" in capsys.readouterr().out


def test_wheel_has_every_module_and_data_file(wheel: Path, checkout: Path) -> None:
    wanted = {"layerskip_kernels/_cpu.abi3.so"}
    for root in (checkout, checkout / "python"):
        for package in ("layerskip_kernels", "layerskip"):
            wanted |= {str(path.relative_to(root)) for path in (root / package).rglob("*") if path.is_file()}
    wanted = {name for name in wanted if not name.endswith((".pyc", ".md"))}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == wanted


def test_wheel_is_small_and_has_no_adapter(wheel: Path) -> None:
    """What the demo needs is a package of its own, in examples/."""
    assert wheel.stat().st_size < 5_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".safetensors") or "smollm2" in name] == []


@needs_readelf
def test_library_needs_no_python(wheel: Path, tmp_path: Path) -> None:
    """No libtorch_python, no symbol of CPython, nothing found through a path of the machine that built it."""
    library = zipfile.ZipFile(wheel).extract("layerskip_kernels/_cpu.abi3.so", tmp_path)
    dynamic = dynamic_section(wheel, "_cpu", tmp_path)
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


def test_missing_extras_are_named_in_one_line(bare_environment: Path, tmp_path: Path) -> None:
    """And what it can, it does: ops, and what `layerskip env` shows."""
    file, backend, messages = use(bare_environment, tmp_path)
    assert Path(file).is_relative_to(tmp_path / "bare")
    assert (backend, messages) == ("cpu", "[]")
    command = str(bare_environment.parent / "layerskip")
    assert "rms_norm" in succeeded(run([command, "env"], tmp_path)).stdout
    example = "comes with the example package: pip install ./examples/smollm2 (in the repository)"
    (tmp_path / "recipe.yaml").write_text("model: owner/name\n")
    refused = {
        "demo": f"the demo smollm2 {example}",
        "generate x": f"the model smollm2 {example}",
        "generate x --model owner/name": 'loading models needs transformers: pip install "layerskip-kernels[demo]"',
        "bench": f"the model smollm2 {example}",
        "bench --model owner/name": 'loading models needs transformers: pip install "layerskip-kernels[demo]"',
        "train": f"the task parsing {example}",
        "train recipe.yaml": 'reading a recipe needs yaml: pip install "layerskip-kernels[train]"',
        "bench --prompts hub:any --model owner/name": 'hub:any needs datasets: pip install "layerskip-kernels[hub]"',
    }
    for arguments, message in refused.items():
        done = run([command, *arguments.split()], tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr == f"layerskip {arguments.split()[0]}: {message}\n"


def test_cuda_wheel(cuda_wheel: Path, wheel: Path) -> None:
    """The same and one library more; a build number keeps the two apart in a folder."""
    assert re.fullmatch(r"layerskip_kernels-[\d.]+-1cu\d+-cp310-abi3-.*", cuda_wheel.stem)
    with_cuda, without = (
        {name for name in zipfile.ZipFile(one).namelist() if ".dist-info/" not in name} for one in (cuda_wheel, wheel)
    )
    assert with_cuda - without == {"layerskip_kernels/_cuda.abi3.so"}
    assert without <= with_cuda


def test_cuda_library_does_not_stay_behind(cuda_wheel: Path, checkout: Path, tmp_path: Path) -> None:
    again = build_wheel(checkout, tmp_path, LAYERSKIP_CUDA="0")
    assert "layerskip_kernels/_cuda.abi3.so" not in zipfile.ZipFile(again).namelist()


@needs_readelf
def test_cuda_library_takes_torch_from_where_it_is(cuda_wheel: Path, tmp_path: Path) -> None:
    """Built without a CUDA torch, it still names that library; the CUDA runtime is inside."""
    dynamic = dynamic_section(cuda_wheel, "_cuda", tmp_path)
    assert "[libtorch_cuda.so]" in dynamic
    for unwanted in ("libtorch_python", "libpython", "libcudart", "libcuda.so", "RPATH", "RUNPATH"):
        assert unwanted not in dynamic


def test_cuda_library_names_its_architectures(cuda_wheel: Path, checkout: Path, tmp_path: Path) -> None:
    """Every symbol is found beside the stand-in for libtorch_cuda; the driver need not be there."""
    library = zipfile.ZipFile(cuda_wheel).extract("layerskip_kernels/_cuda.abi3.so", tmp_path)
    (stub,) = (checkout / "build").rglob("libtorch_cuda.so")
    code = f"""
import ctypes, pathlib, torch
ctypes.CDLL({str(stub)!r}, ctypes.RTLD_GLOBAL)
from layerskip_kernels import _extension
_extension._path = lambda name: pathlib.Path({library!r})
build = _extension._cuda_build()
print(build.archs, build.toolkit, build.driver >= 0)
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    done = succeeded(run([sys.executable, "-W", "ignore", "-c", code], tmp_path, PYTHONPATH=path))
    release = re.fullmatch(r".*-1cu(\d+)(\d)-cp310-.*", cuda_wheel.stem)
    assert release is not None
    assert done.stdout.split() == ["80", str(int(release[1]) * 1000 + int(release[2]) * 10), "True"]


def test_cuda_wheel_beside_a_torch_without_cuda(
    cuda_wheel: Path, environment: Callable[[], Path], tmp_path: Path
) -> None:
    """It is not loaded, CPU tensors are served as ever, and the reason can be read."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    python = environment()
    install(python, str(cuda_wheel), where=tmp_path)
    file, backend, messages = use(python, tmp_path)
    assert (Path(file).parent / "_cuda.abi3.so").exists()
    assert (backend, messages) == ("cpu", "[]")
    code = "import layerskip_kernels as lk, torch\nlk.rms_norm(torch.ones(2), torch.ones(2), 0.0)"
    done = run([str(python), "-c", code], tmp_path / "empty", LAYERSKIP_BACKEND="cuda")
    assert f"no backend serves rms_norm (cuda: torch {torch.__version__} was built without CUDA)" in done.stderr


def test_install_from_the_sources(wheel: Path, checkout: Path, environment: Callable[[], Path], tmp_path: Path) -> None:
    """``pip install --no-build-isolation .``; what the wheel compiled is not compiled again."""
    python = environment()
    install(python, "--no-build-isolation", ".", where=checkout, LAYERSKIP_CUDA="0")
    file, backend, _ = use(python, tmp_path)
    assert Path(file).is_relative_to(tmp_path / "environment")
    assert backend == "cpu"


def test_editable_install(wheel: Path, checkout: Path, environment: Callable[[], Path], tmp_path: Path) -> None:
    python = environment()
    install(python, "--no-build-isolation", "-e", ".", where=checkout, LAYERSKIP_CUDA="0")
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
