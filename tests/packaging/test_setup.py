"""What `setup.py` decides: compilers, CUDA, and when to compile again; on a tiny tree of sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, Run, run, succeeded

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

SOURCE = '#include "common/value.h"\nextern "C" __attribute__((visibility("default"))) int value() { return VALUE; }\n'
KERNEL = "__global__ void fill(float* out) { out[threadIdx.x] = 1.0f; }\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A setup.py with one C++ file and one header."""
    shutil.copy(ROOT / "setup.py", tmp_path / "setup.py")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "tiny"\nversion = "1"\n')
    for folder in ("csrc/cpu", "csrc/cuda", "csrc/common", "layerskip_kernels", "python", "nothing"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "csrc/cpu/value.cpp").write_text(SOURCE)
    (tmp_path / "csrc/common/value.h").write_text("#define VALUE 1\n")
    shutil.copy(ROOT / "csrc/cuda/torch_cuda_stub.cpp", tmp_path / "csrc/cuda")
    return tmp_path


def build(tree: Path, **environment: str | None) -> Run:
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, **environment)


def value(tree: Path) -> int:
    library = tree / "layerskip_kernels/_cpu.abi3.so"
    code = f"import ctypes, torch; print(ctypes.CDLL({str(library)!r}).value())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@needs_compiler
def test_compiles_again_when_a_header_changes(tree: Path) -> None:
    succeeded(build(tree))
    assert value(tree) == 1
    assert "value.cpp.o" not in succeeded(build(tree)).stdout
    (tree / "csrc/common/value.h").write_text("#define VALUE 2\n")
    assert "value.cpp.o" in succeeded(build(tree)).stdout
    assert value(tree) == 2


@needs_compiler
def test_compiles_again_when_the_flags_change(tree: Path) -> None:
    (tree / "csrc/common/value.h").unlink()
    (tree / "csrc/cpu/value.cpp").write_text(SOURCE.split("\n", 1)[1])
    succeeded(build(tree, CXXFLAGS="-DVALUE=3"))
    assert value(tree) == 3
    succeeded(build(tree, CXXFLAGS="-DVALUE=4"))
    assert value(tree) == 4


@needs_compiler
def test_a_compiler_that_fails_is_an_error(tree: Path) -> None:
    (tree / "csrc/cpu/value.cpp").write_text("int value( { }\n")
    done = build(tree)
    assert done.returncode != 0
    assert "building _cpu.abi3.so failed, see the compiler's message above" in done.stderr
    assert "value.cpp" in done.stdout
    assert not (tree / "layerskip_kernels/_cpu.abi3.so").exists()


@needs_compiler
def test_undefined_symbols_fail_at_the_build_not_at_the_import(tree: Path) -> None:
    (tree / "csrc/cpu/value.cpp").write_text('int missing();\nextern "C" int value() { return missing(); }\n')
    done = build(tree)
    assert done.returncode != 0
    assert "missing" in done.stdout


def test_a_compiler_that_is_named_must_exist(tree: Path) -> None:
    done = build(tree, CXX="no-such-compiler -x")
    assert done.returncode != 0
    assert "CXX=no-such-compiler -x is not a program" in done.stderr


def test_without_a_compiler_the_build_warns(tree: Path) -> None:
    done = succeeded(build(tree, PATH=str(tree / "nothing"), CXX=None))
    assert "no C++ compiler found (CXX, c++, g++, clang++)" in done.stderr
    assert not list((tree / "layerskip_kernels").glob("*.so"))


def test_cuda_without_nvcc(tree: Path) -> None:
    (tree / "csrc/cuda/fill.cu").write_text(KERNEL)
    done = build(tree, PATH=str(tree / "nothing"), CXX=None, LAYERSKIP_CUDA="1")
    assert done.returncode != 0
    assert "LAYERSKIP_CUDA=1 needs nvcc on PATH: install the CUDA toolkit" in done.stderr


def test_invalid_cuda_choice(tree: Path) -> None:
    done = build(tree, LAYERSKIP_CUDA="yes")
    assert done.returncode != 0
    assert "LAYERSKIP_CUDA=yes is not understood, expected 0, 1 or unset" in done.stderr


@needs_nvcc
def test_cuda_without_sources(tree: Path) -> None:
    done = build(tree, LAYERSKIP_CUDA="1")
    assert done.returncode != 0
    assert "csrc/cuda has no .cu files to build" in done.stderr


@needs_nvcc
@needs_compiler
@pytest.mark.parametrize(
    ("choice", "torch_cuda", "built"),
    [(None, "13.0", True), (None, None, False), ("1", None, True), ("0", "13.0", False)],
)
def test_cuda(tree: Path, tmp_path: Path, choice: str | None, torch_cuda: str | None, built: bool) -> None:
    """By default the torch that is installed decides; on demand neither a GPU nor a CUDA build of torch is needed."""
    (tree / "csrc/cuda/fill.cu").write_text(KERNEL)
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in/sitecustomize.py").write_text(f"import torch.version\ntorch.version.cuda = {torch_cuda!r}\n")
    path = str(tmp_path / "stand-in")
    succeeded(build(tree, LAYERSKIP_CUDA=choice, LAYERSKIP_CUDA_ARCHS="80", PYTHONPATH=path))
    assert (tree / "layerskip_kernels/_cuda.abi3.so").exists() == built
    assert (tree / "layerskip_kernels/_cpu.abi3.so").exists()


@needs_nvcc
@needs_compiler
def test_cuda_architectures(tree: Path) -> None:
    """All of them, or those named; what ptxas says of each kernel lies beside the object, and not on the screen."""
    (tree / "csrc/cuda/ops").mkdir()
    (tree / "csrc/cuda/ops/fill.cu").write_text(KERNEL)
    for narrowed, wanted in ((None, ["sm_80", "sm_90a", "sm_100a"]), ("80; 90a", ["sm_80", "sm_90a"])):
        shutil.rmtree(tree / "build", ignore_errors=True)
        done = succeeded(build(tree, LAYERSKIP_CUDA="1", LAYERSKIP_CUDA_ARCHS=narrowed))
        assert "ptxas info" not in done.stdout
        (log,) = (tree / "build").rglob("ops_fill.cu.o.ptxas")
        assert re.findall(r"Compiling entry function .* for '(sm_\w+)'", log.read_text()) == wanted


@needs_nvcc
@needs_compiler
def test_a_kernel_that_does_not_compile_says_why(tree: Path) -> None:
    (tree / "csrc/cuda/fill.cu").write_text("__global__ void fill(float* out) { out[0] = missing; }\n")
    done = build(tree, LAYERSKIP_CUDA="1", LAYERSKIP_CUDA_ARCHS="80")
    assert done.returncode != 0
    assert 'identifier "missing" is undefined' in done.stdout
    assert "building _cuda.abi3.so failed" in done.stderr


@needs_nvcc
@pytest.mark.parametrize("archs", ["75", "80,90", "compute_80", "80;"])
def test_invalid_cuda_architectures(tree: Path, archs: str) -> None:
    (tree / "csrc/cuda/fill.cu").write_text(KERNEL)
    done = build(tree, LAYERSKIP_CUDA="1", LAYERSKIP_CUDA_ARCHS=archs)
    assert done.returncode != 0
    assert f"LAYERSKIP_CUDA_ARCHS={archs}: " in done.stderr
    assert "expected architectures from 80 on and PTX from compute_90 on, like 80;90a;100a;compute_100" in done.stderr


@needs_nvcc
@needs_compiler
def test_ccache_is_used_where_it_is_found(tree: Path) -> None:
    """A stand-in that notes what it is asked to run."""
    (tree / "csrc/cuda/fill.cu").write_text(KERNEL)
    (tree / "bin").mkdir()
    ccache = tree / "bin/ccache"
    ccache.write_text(f'#!/bin/sh\necho "$1" >> {tree}/noted\nexec "$@"\n')
    ccache.chmod(0o755)
    path = f"{tree}/bin:{os.environ['PATH']}"
    succeeded(build(tree, PATH=path, LAYERSKIP_CUDA="1", LAYERSKIP_CUDA_ARCHS="80"))
    noted = {Path(line).name for line in (tree / "noted").read_text().splitlines()}
    assert "nvcc" in noted
    assert noted - {"nvcc"} <= {"c++", "g++", "clang++"}
    assert len(noted) == 2
