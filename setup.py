"""Build the native libraries and find the packages; all other settings are in pyproject.toml.

Each library is one stable-ABI shared object that `torch.ops.load_library` loads: no CPython extension module, no symbol
of libtorch_python, so one wheel serves CPython >= 3.10 and torch >= 2.10.

Environment variables: CXX is the compiler, CXXFLAGS and LDFLAGS are added to its flags, and MAX_JOBS limits parallel
jobs. LAYERSKIP_CUDA=1 requires the CUDA library, LAYERSKIP_CUDA=0 disables it; by default it is built if nvcc is found
and the installed torch has CUDA.
LAYERSKIP_CUDA_ARCHS="80;90a" selects its architectures; compute_100 is PTX, which the driver compiles for newer GPUs.
ccache is used if it is installed. LAYERSKIP_NAMESPACE=name builds only a CPU library with its ops in that namespace
(tools/hub_package.py).
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000", "-DNDEBUG"]
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fPIC", "-Wall", "-Wextra"]
MACOS = sys.platform == "darwin"
if platform.machine() in ("aarch64", "arm64"):
    # Without this flag a compiler may fuse a multiplication and an addition in one kernel, but not in its variant for
    # more rows, which must give the same bits.
    CXX_FLAGS.append("-ffp-contract=off")
CUDA_ARCHS = "80;90a;100a;compute_100"
# The registers and spills of each kernel go to a file next to the object, for `make cuda-report`.
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
NAMESPACE = os.environ.get("LAYERSKIP_NAMESPACE")
NAMED = {"library.cpp", "torch_binding.cpp"}  # the files that use it
ISA_KERNELS = "isa_kernels.cpp"  # compiled once per instruction set; those of other processors give empty objects
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "neon_bf16", "neon", "portable", "amx_emulated")
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}

NINJA_RULES = """\
rule cxx
  command = {ccache}{cxx} -MMD -MF $out.d {cxx_flags} $own_flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule nvcc
  command = {ccache}{nvcc} -ccbin {cxx} -MD -MF $out.d {nvcc_flags} -c $in -o $out >$out.ptxas 2>&1; status=$$?; $
      grep -vE '^(ptxas info|    [0-9]+ bytes stack frame)' $out.ptxas; exit $$status
  depfile = $out.d
  deps = gcc
  description = $out
rule stub
  command = {cxx} -shared -fPIC -Wl,-soname,libtorch_cuda.so $in -o $out
  description = $out
rule link
  command = {linker} -shared $in {link_flags} -o $out
  description = $out
"""


def find_compiler() -> str | None:
    """The C++ compiler's command, or None; a CXX that is set but missing is an error."""
    wanted = os.environ.get("CXX")
    if wanted:
        if shutil.which(shlex.split(wanted)[0]) is None:
            sys.exit(f"CXX={wanted} is not a program; unset CXX, or set it to a C++20 compiler")
        return wanted
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def cuda_wanted(sources: list[str]) -> bool:
    """Whether to build the CUDA library; if asked, that needs nvcc, but neither a GPU nor a CUDA build of torch."""
    choice = os.environ.get("LAYERSKIP_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"LAYERSKIP_CUDA={choice} is not understood, expected 0, 1 or unset")
    nvcc = shutil.which("nvcc")
    if choice == "1" and nvcc is None:
        sys.exit(
            "LAYERSKIP_CUDA=1 needs nvcc on PATH: install the CUDA toolkit (https://developer.nvidia.com/cuda-toolkit)"
        )
    if choice == "1" and not sources:
        sys.exit("LAYERSKIP_CUDA=1, but csrc/cuda has no .cu files to build")
    return choice == "1" or (choice == "" and nvcc is not None and bool(sources) and torch_has_cuda())


def torch_has_cuda() -> bool:
    """Whether the torch that is installed is a CUDA build; False without one, as under build isolation."""
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is not None


def cuda_archs() -> str:
    """LAYERSKIP_CUDA_ARCHS, by default all."""
    return (os.environ.get("LAYERSKIP_CUDA_ARCHS") or CUDA_ARCHS).replace(" ", "")


def cuda_targets() -> list[str]:
    """Flags of nvcc for these architectures, and the define that records them in the library."""
    archs, flags = cuda_archs(), []
    for arch in archs.split(";"):
        found = re.fullmatch(r"(compute_)?(\d{2,3})([af]?)", arch)
        if found is None or int(found[2]) < (90 if found[1] else 80):
            # PTX of sm_80 lacks the instructions of programmatic dependent launch, which newer GPUs would use.
            sys.exit(
                f"LAYERSKIP_CUDA_ARCHS={archs}: {arch!r} is not understood, expected architectures from 80 on and PTX "
                f"from compute_90 on, like {CUDA_ARCHS}"
            )
        number = found[2] + found[3]
        flags.append(f"-gencode=arch=compute_{number},code={'compute' if found[1] else 'sm'}_{number}")
    return [*flags, f"'-DLSK_CUDA_ARCHS=\"{archs}\"'"]


def files(pattern: str) -> list[str]:
    """Paths relative to the checkout, as setuptools requires."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def library(name: str, sources: list[str]) -> Extension:
    """The extension ``layerskip_kernels/<name>.abi3.so``; headers are listed for source distributions."""
    return Extension(
        f"layerskip_kernels.{name}",
        sources,
        depends=[*files("csrc/**/*.h"), *files("csrc/**/*.cuh"), *files("csrc/cuda/*.cpp"), "setup.py"],
        py_limited_api=True,
        language="c++",
    )


def libraries() -> list[Extension]:
    """The libraries that can be built here. Without a compiler there are none, and the package uses torch's ops."""
    # ops/*.cpp are host code that includes CUDA headers.
    common, cuda_sources = files("csrc/common/*.cpp"), files("csrc/cuda/**/*.cu") + files("csrc/cuda/ops/*.cpp")
    with_cuda = cuda_wanted(cuda_sources)
    if with_cuda:
        cuda_targets()  # validates LAYERSKIP_CUDA_ARCHS early
    if find_compiler() is None:
        if BUILDS & set(sys.argv):
            print(
                "layerskip-kernels: no C++ compiler found (CXX, c++, g++, clang++), installing without the native "
                "kernels: everything works, about 10 times slower. Install g++ (apt-get install g++) and reinstall.",
                file=sys.stderr,
            )
        return []
    cpu_sources = files("csrc/cpu/*.cpp") + common
    if NAMESPACE:
        if not NAMESPACE.isidentifier():
            sys.exit(f"LAYERSKIP_NAMESPACE={NAMESPACE} is not a C++ identifier")
        return [library(NAMESPACE, cpu_sources + files("csrc/hub/*.cpp"))]
    found = [library("_cpu", cpu_sources)]
    return [*found, library("_cuda", cuda_sources + common)] if with_cuda else found


def find_ninja() -> str:
    """Path of ninja: of the Python package, else on PATH."""
    try:
        import ninja
    except ImportError:
        program = shutil.which("ninja")
        if program is None:
            sys.exit("building the native kernels needs ninja: pip install ninja")
        return program
    return str(Path(ninja.BIN_DIR) / "ninja")


class NinjaBuild(build_ext):
    """Compile with ninja, in parallel and incrementally."""

    def run(self) -> None:
        """Build all libraries, and remove those that an earlier build with other options left."""
        for name in {"layerskip_kernels._cpu", "layerskip_kernels._cuda"} - {ext.name for ext in self.extensions}:
            Path(self.build_lib, *name.split(".")).with_suffix(".abi3.so").unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Build one library and copy it to the path that setuptools expects."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the checkout: an editable install deletes build_temp.
        cuda = ext.name.endswith("_cuda")
        kind = f"-{cuda_archs().replace(';', '+')}" if cuda else ""  # one folder per selection of architectures
        name = f"layerskip_kernels.{'_cuda' if cuda else '_cpu'}"  # objects do not depend on the namespace
        folder = ROOT / "build" / f"{name}-{platform.system().lower()}-{platform.machine()}{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(rules(cuda) + edges(ext.sources, target.name))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        try:
            subprocess.run([find_ninja(), "-C", str(folder), *jobs], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"building {target.name} failed, see the compiler's message above (ninja exit {error.returncode})")
        self.copy_file(str(folder / target.name), str(target))


def rules(cuda: bool) -> str:
    """The ninja rules with this machine's compilers and paths."""
    try:
        import torch
    except ImportError:
        sys.exit("building the native kernels needs torch >= 2.10: pip install torch")
    home = Path(torch.__file__).parent
    include = [f"-I{ROOT / 'csrc'}", f"-isystem {home / 'include'}"]
    link = [f"-L{home / 'lib'}", "-ltorch_cpu"]
    cxx, nvcc = find_compiler(), shutil.which("nvcc") or "nvcc"
    if cuda:  # static runtime: torch may bring another version
        linker = f"{nvcc} -ccbin {cxx} -cudart=static"
        own = ["-L.", "-Xlinker=--no-undefined,--no-as-needed", "-ltorch_cuda"]
    else:
        # Resolved at load time: torch's OpenMP on macOS, Python's symbols in a module.
        complete = ["-undefined dynamic_lookup"] if MACOS else ["-fopenmp", "" if NAMESPACE else "-Wl,--no-undefined"]
        linker, own = str(cxx), [*complete, os.environ.get("LDFLAGS", "")]
    return NINJA_RULES.format(
        ccache="ccache " if shutil.which("ccache") else "",
        cxx=cxx,
        nvcc=nvcc,
        cxx_flags=" ".join([*CXX_FLAGS, *openmp(), *DEFINES, *include, os.environ.get("CXXFLAGS", "")]),
        nvcc_flags=" ".join([*NVCC_FLAGS, *(cuda_targets() if cuda else []), *DEFINES, *include]),
        linker=linker,
        link_flags=" ".join([*link, *own]),
    )


def openmp() -> list[str]:
    """Compiler flags for OpenMP; Apple's compiler needs the header of Homebrew's libomp."""
    if not MACOS:
        return ["-fopenmp"]
    if shutil.which("brew") is None:
        return ["-Xpreprocessor -fopenmp"]
    out = subprocess.run(["brew", "--prefix", "libomp"], capture_output=True, text=True, check=True).stdout
    return ["-Xpreprocessor -fopenmp", f"-isystem {out.strip()}/include"]


def edges(sources: list[str], target: str) -> str:
    """Ninja edges: one per object, and the link."""
    objects, lines = [], []

    def compile_one(source: str, prefix: str = "", flags: str = "") -> None:
        objects.append(f"{prefix}{'_'.join(Path(source).parts[2:])}.o")  # without csrc/cpu, csrc/cuda
        rule = "nvcc" if target.startswith("_cuda") else "cxx"
        lines.append(f"build {objects[-1]}: {rule} {ninja_path(ROOT / source)}")
        if flags:
            lines.append(f"  own_flags = {flags}")

    for source in sources:
        if Path(source).name == ISA_KERNELS:
            for isa in ISAS:
                compile_one(source, f"{isa}_", f"-DLSK_ISA_{isa}=1")
        elif NAMESPACE and Path(source).name in NAMED:
            python = sysconfig.get_path("include")
            compile_one(source, f"{NAMESPACE}_", f"-DTORCH_EXTENSION_NAME={NAMESPACE} -isystem {python}")
        else:
            compile_one(source)
    stub = ""
    if target.startswith("_cuda"):
        # A CPU build of torch has no libtorch_cuda to link with; the symbol is resolved at load time.
        lines.append(f"build libtorch_cuda.so: stub {ninja_path(ROOT / 'csrc/cuda/torch_cuda_stub.cpp')}")
        stub = "| libtorch_cuda.so"
    return "\n".join([*lines, f"build {target}: link {' '.join(objects)} {stub}", ""])


def ninja_path(path: Path) -> str:
    """Escape a path for build.ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def wheel_options(extensions: list[Extension]) -> dict[str, str]:
    """Options of a wheel for CPython >= 3.10; with CUDA kernels its build number has the toolkit release."""
    options = {"py_limited_api": "cp310"} if extensions else {}
    if len(extensions) > 1:
        out = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", out)
        if release is None:
            sys.exit(f"nvcc --version does not name a release: {out}")
        options["build_number"] = f"1cu{release[1]}{release[2]}"
    return options


extensions = libraries()
setup(
    package_dir={"layerskip": "python/layerskip"},
    packages=find_packages(include=["layerskip_kernels*"]) + find_packages("python"),
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": wheel_options(extensions)},
)
