"""The package for the Hugging Face hub: its files, and that it works beside the installed op library."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import layerskip_kernels
from layerskip_kernels import _extension
from tools import hub_package

pytestmark = [
    pytest.mark.skipif(_extension.cpu_reason is not None, reason=f"no native library: {_extension.cpu_reason}"),
    pytest.mark.xdist_group("hub_package"),
]

# What somebody does who has the package from the hub.
USER = """
import sys, torch, kernels, layerskip_kernels
from pathlib import Path
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping

path = Path(sys.argv[1])
build = kernels._rust.Build.open(path)
assert [str(one) for one in build.general.backends] == ["cpu", "cuda"], build.general.backends
hub = kernels.get_local_kernel(path)
x, weight = torch.randn(3, 64), torch.randn(48, 64)
assert torch.equal(hub.linear(x, weight), layerskip_kernels.linear(x, weight))


@use_kernel_forward_from_hub("RMSNorm")
class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.rand(64)), 1e-5

    def forward(self, hidden_states):
        raise AssertionError("the layer of the hub did not take its place")


model = torch.nn.Sequential(Norm())
with use_kernel_mapping({"RMSNorm": {"cpu": LocalLayerRepository(path, layer_name="RMSNorm")}}):
    model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
assert torch.equal(model(x), layerskip_kernels.rms_norm(x, model[0].weight, 1e-5))
model(x).sum().backward()
assert model[0].weight.grad is not None
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written once; of the library, only what knows its namespace is compiled."""
    folder = tmp_path_factory.mktemp("hub") / "package"
    hub_package.main(["--output", str(folder)])
    return folder


def build_of(package: Path) -> Path:
    (build,) = (package / "build").iterdir()
    return build


@pytest.fixture(scope="module")
def hub(package: Path) -> Iterator[ModuleType]:
    """The package as a module of its own name, imported as the hub's library does it."""
    build = build_of(package)
    name = json.loads((build / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for own in [own for own in sys.modules if own.split(".")[0] == name]:
        del sys.modules[own]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_the_installed_library_does(hub: ModuleType, dtype: torch.dtype) -> None:
    """Both in one process, each with its own ops and its own kernels."""
    x, weight = torch.randn(5, 96).to(dtype), torch.randn(70, 96).to(dtype)
    norm = torch.rand(96).to(dtype)
    for one in (hub, layerskip_kernels):
        assert one.explain("linear", x, weight).backend == "cpu"
    assert hub.linear is not layerskip_kernels.linear
    assert torch.equal(hub.linear(x, weight), layerskip_kernels.linear(x, weight))
    ours, theirs = (one.exit_head(x, norm, weight, 1e-5) for one in (hub, layerskip_kernels))
    assert all(map(torch.equal, ours, theirs))


def test_its_ops_are_in_a_namespace_of_their_own(hub: ModuleType) -> None:
    x, weight = torch.randn(5, 96), torch.rand(96)
    own = getattr(torch.ops, hub.__name__)
    assert torch.equal(own.rms_norm(x, weight, 1e-5), torch.ops.layerskip.rms_norm(x, weight, 1e-5))
    assert own.rms_norm.default._schema.name == f"{hub.__name__}::rms_norm"
    torch.library.opcheck(own.rms_norm.default, (x.requires_grad_(), weight, 1e-5))
    compiled = torch.compile(lambda x: hub.rms_norm(x, weight, 1e-5), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layerskip_kernels.rms_norm(x, weight, 1e-5))


def test_the_state_of_one_is_not_that_of_the_other(hub: ModuleType) -> None:
    before = layerskip_kernels.cpu_isa()
    assert hub.set_cpu_isa("portable") == before
    assert (hub.cpu_isa(), layerskip_kernels.cpu_isa()) == ("portable", before)
    hub.set_cpu_isa(before)
    with hub.use_backend("reference"):
        assert hub.explain("rms_norm", torch.ones(2), torch.ones(2), 0.0).backend == "reference"
        assert layerskip_kernels.explain("rms_norm", torch.ones(2), torch.ones(2), 0.0).backend == "cpu"


def test_beside_a_cuda_torch_it_says_that_it_has_no_cuda_kernels(
    hub: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks the hub for the CPU's build gets it whatever torch there is."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    reason = sys.modules[f"{hub.__name__}._extension"]._load_cuda()
    assert reason == f"{hub.__name__}.abi3.so has no CUDA kernels"


def test_the_folder_of_older_releases_has_the_same(hub: ModuleType, package: Path) -> None:
    file = build_of(package) / "layerskip_kernels/__init__.py"
    spec = importlib.util.spec_from_file_location("of_older_releases", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert all(getattr(module, name) is getattr(hub, name) for name in hub.__all__)


def test_the_hubs_own_library_loads_it(package: Path) -> None:
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("the package kernels is not installed")
    done = subprocess.run([sys.executable, "-c", USER, str(package)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_build_says_what_it_is(package: Path) -> None:
    build = build_of(package)
    assert re.fullmatch(r"torch-stable-abi210-cpu-(x86_64|aarch64)-(linux|darwin)", build.name)
    metadata = json.loads((build / "metadata.json").read_text())
    assert re.fullmatch(r"_layerskip_kernels_cpu_[0-9a-f]{7}", metadata["id"])
    assert metadata["version"] == int(layerskip_kernels.__version__.split(".")[0])
    files = {str(path.relative_to(build)): path for path in build.rglob("*") if path.is_file()}
    files = {name: path for name, path in files.items() if "__pycache__" not in name and name != "metadata.json"}
    digests = {
        name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for name, path in files.items()
    }
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
    assert f"{metadata['id']}.abi3.so" in files


def test_the_builder_gets_every_source(package: Path) -> None:
    """Relative imports alone, for the package has another name every time."""
    toml = (package / "build.toml").read_text()
    assert "@" not in toml
    listed = set(re.findall(r'"(csrc/[^"]+)"', toml))
    assert listed == {str(path.relative_to(package)) for path in (package / "csrc").rglob("*.*")}
    assert (package / "torch-ext/torch_binding.cpp").exists()
    python = list((package / "torch-ext/layerskip_kernels").rglob("*.py"))
    assert python
    for path in python:
        imported = re.findall(r"^\s*(?:from|import) (layerskip\w*)", path.read_text(), re.MULTILINE)
        assert imported == [], path
    assert not (package / "torch-ext/layerskip_kernels/_ops.py").exists()


def settings_of_setup() -> dict[str, list[str]]:
    """The lists of flags in setup.py, which can't be imported."""
    tree = ast.parse((hub_package.ROOT / "setup.py").read_text())
    lists = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    return {name: ast.literal_eval(lists[name]) for name in ("DEFINES", "CXX_FLAGS", "NVCC_FLAGS")}


def test_the_builder_gets_the_flags_of_setup(package: Path) -> None:
    """But those that it gives itself, and those that make compilers say more."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11, which reads TOML")
    kernels = tomllib.loads((package / "build.toml").read_text())["kernel"]
    setup, (defines, *_) = settings_of_setup(), ({"-DNDEBUG"},)
    assert defines < set(setup["DEFINES"])
    own = {"-std=c++20", "-fPIC", "-Wall", "-Wextra"}
    wanted = set(setup["CXX_FLAGS"]) - own | defines | {"-fopenmp", "-ffp-contract=off"}
    assert {kind: set(kernel["cxx-flags"]) for kind, kernel in kernels.items()} == {"cpu": wanted, "cuda": wanted}
    of_nvcc = {"-Xcompiler=-fPIC,-fvisibility=hidden": "-Xcompiler=-fvisibility=hidden"}
    wanted = {of_nvcc.get(flag, flag) for flag in setup["NVCC_FLAGS"]} - {"-Xptxas=-v"} | defines
    assert set(kernels["cuda"]["cuda-flags"]) - wanted == {"--pre-include=cuda_archs.h"}
    assert wanted <= set(kernels["cuda"]["cuda-flags"])


def test_a_cuda_build_knows_what_it_is_for(package: Path, tmp_path: Path) -> None:
    """The file that says it, compiled with the builder's flags."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11, which reads TOML")
    cuda = tomllib.loads((package / "build.toml").read_text())["kernel"]["cuda"]
    archs = [one.replace(".", "").removesuffix("+PTX") for one in cuda["cuda-capabilities"]]
    archs += [f"compute_{arch}" for arch, one in zip(archs, cuda["cuda-capabilities"], strict=True) if "+PTX" in one]
    header = (package / "torch-ext/cuda_archs.h").read_text()
    assert f'"{";".join(archs)}"' in header
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    includes = [f"-I{package / folder}" for folder in cuda["include"]]
    command = ["nvcc", *cuda["cuda-flags"], *includes, "-c", str(package / "csrc/cuda/build.cu"), "-o", "build.o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ";".join(archs).encode() in (tmp_path / "build.o").read_bytes()


def test_other_sources_are_another_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, names = tmp_path / "copy", {hub_package.namespace()}
    for folder in ("csrc", "layerskip_kernels"):
        shutil.copytree(hub_package.ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setattr(hub_package, "ROOT", root)
    assert names == {hub_package.namespace()}
    for changed in ("csrc/cpu/isa.cpp", "layerskip_kernels/schemas.py"):
        (root / changed).write_text((root / changed).read_text() + "\n")
        names.add(hub_package.namespace())
    assert len(names) == 3


def test_a_compiler_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="CXX=no-such-compiler is not a program"):
        hub_package.main(["--output", str(tmp_path / "package")])
    assert not (tmp_path / "package").exists()
