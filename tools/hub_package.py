"""Write the op library as a package for the Hugging Face hub, as its ``kernels`` library loads them.

The folder has what the hub's builder compiles for all its platforms (build.toml, torch-ext, csrc) and, under ``build``,
what this machine runs: the CPU library, with its ops in a namespace of their own, so that it lives in one process with
an installed ``layerskip_kernels`` or with another version. Its name has a digest of the sources.

The layout: https://huggingface.co/docs/kernels/kernel-requirements
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from layerskip._files import replaced
from layerskip_kernels import __version__

ROOT = Path(__file__).parents[1]
TEMPLATES = Path(__file__).parent / "hub"
NAME, MODULE = "layerskip-kernels", "layerskip_kernels"
STABLE_ABI = "2.10"  # TORCH_TARGET_VERSION of setup.py
NATIVE = ("csrc/common", "csrc/cpu")
CUDA = ("csrc/cuda", "csrc/cuda/ops")
STUB = "torch_cuda_stub.cpp"  # the builder links with a CUDA torch
# Fused or not, a product and a sum differ: one kernel and its twin for more rows must not be compiled differently.
# setup.py asks for the last flag on aarch64 alone, the builder knows no flags of one processor.
CXX_FLAGS = ("-O3", "-fopenmp", "-fvisibility=hidden", "-DNDEBUG", "-ffp-contract=off")
GENERATED = "_ops.py"  # by what builds the package

OPS = """\
import torch

from . import {namespace}

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{namespace}::{{op_name}}"
"""

# Older releases of kernels look for the package in a folder of its own.
COMPATIBILITY = """\
import importlib.util
import sys
from pathlib import Path

if "{namespace}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{namespace}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{namespace}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{namespace}"])
_module = sys.modules["{namespace}"]
globals().update({{name: getattr(_module, name) for name in _module.__all__}})
"""


def python_files() -> list[Path]:
    """The package's files, relative to it, without the one that is generated."""
    home = ROOT / MODULE
    return sorted(path.relative_to(home) for path in home.rglob("*.py") if path.name != GENERATED)


def native_files(folders: Sequence[str] = NATIVE) -> list[Path]:
    """The sources and headers of some folders, relative to the checkout."""
    paths = (path for folder in folders for path in (ROOT / folder).iterdir())
    return sorted(path.relative_to(ROOT) for path in paths if path.is_file() and path.name != STUB)


def namespace() -> str:
    """The id of the package: another one for other sources."""
    digest = hashlib.sha256()
    binding = Path("csrc/hub/torch_binding.cpp")
    for path in [*(Path(MODULE) / file for file in python_files()), *native_files(), binding]:
        digest.update(str(path).encode() + b"\0" + (ROOT / path).read_bytes() + b"\0")
    return f"_{MODULE}_cpu_{digest.hexdigest()[:7]}"


def variant() -> str:
    """The name that the hub gives a build for this machine."""
    machine = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return f"torch-stable-abi{STABLE_ABI.replace('.', '')}-cpu-{machine}-{platform.system().lower()}"


def write_sources(folder: Path) -> None:
    """Write what the hub's builder takes."""
    for path in native_files((*NATIVE, *CUDA)):
        _copy(ROOT / path, folder / path)
    for path in python_files():
        _copy(ROOT / MODULE / path, folder / "torch-ext" / MODULE / path)
    _copy(ROOT / "csrc/hub/torch_binding.cpp", folder / "torch-ext/torch_binding.cpp")
    _copy(ROOT / "LICENSE", folder / "LICENSE")
    for template in sorted(TEMPLATES.iterdir()):
        _copy(template, (folder / "torch-ext" if template.suffix == ".h" else folder) / template.name)
    toml = (folder / "build.toml").read_text(encoding="utf-8")
    values = {
        "VERSION": __version__.split(".")[0],
        "STABLE_ABI": STABLE_ABI,
        "CXX_FLAGS": ", ".join(f'"{flag}"' for flag in CXX_FLAGS),
        "CPU_SOURCES": _lines(native_files()),
        "CUDA_SOURCES": _lines(native_files(CUDA)),
    }
    for name, value in values.items():
        toml = toml.replace(f"@{name}@", value)
    (folder / "build.toml").write_text(toml, encoding="utf-8")


def write_build(folder: Path) -> None:
    """Write the package that this machine loads."""
    name = namespace()
    for path in python_files():
        _copy(ROOT / MODULE / path, folder / path)
    (folder / GENERATED).write_text(OPS.format(namespace=name), encoding="utf-8")
    (folder / MODULE).mkdir()
    (folder / MODULE / "__init__.py").write_text(COMPATIBILITY.format(namespace=name), encoding="utf-8")
    compile_into(folder, name)
    files = {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    metadata = {
        "id": name,
        "name": NAME,
        "version": int(__version__.split(".")[0]),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def compile_into(folder: Path, name: str) -> None:
    """Build the CPU library with its ops in the namespace ``name``; kernels that are compiled already are taken."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", scratch]
        environment = {**os.environ, "LAYERSKIP_CUDA": "0", "LAYERSKIP_NAMESPACE": name}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        library = Path(scratch, MODULE, f"{name}.abi3.so")
        if done.returncode != 0 or not library.exists():
            raise RuntimeError(f"the library was not built: {done.stdout}{done.stderr}")
        shutil.copy(library, folder)


def _lines(paths: Sequence[Path]) -> str:
    return "\n".join(f'    "{path.as_posix()}",' for path in paths)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def _digest(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


def main(argv: list[str] | None = None) -> None:
    """Write the op library as a package for the Hugging Face hub."""
    parser = argparse.ArgumentParser(prog="python -m tools.hub_package", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("dist/hub"), help="the folder to write")
    args = parser.parse_args(argv)
    with replaced(args.output) as (folder,):
        write_sources(folder)
        write_build(folder / "build" / variant())
    print(f"wrote {args.output}: load it with kernels.get_local_kernel(Path({str(args.output)!r}))")


if __name__ == "__main__":
    main()
