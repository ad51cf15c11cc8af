"""The CUDA kernels of this version beside those of an older one, in turns: a part of ``python -m benchmarks.gpu``.

Each version has a process of its own (`benchmarks.gpu_worker`), and both are asked for one case after the other, so
that a card that slows down does so for both. The older one is a commit, which is built in a folder of its own, or a
folder that holds it, built.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
BEFORE = "bbbc6ef209462a7f1ab647382a3236d91b842614"
"""Before x was prefetched, splits were joined in batches, choices in batches, blocks as many as a context needs."""
TURNS = 5
CLOSE = 0.02  # of its norm, by which what two versions give may differ: bf16 has steps of 2^-8. The tests say more


class OlderVersionError(RuntimeError):
    """There is no older version that could be measured beside this one."""


@contextmanager
def checkout(version: str) -> Iterator[Path]:
    """A folder with the built older version: the given one, or one that is made of a commit for as long as this lasts.

    Raises
    ------
    OlderVersionError
        If there is no such commit here, or it does not build.
    """
    if Path(version).is_dir():
        yield Path(version).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="layerskip-before-") as name:
        folder = Path(name)
        archive = subprocess.run(["git", "archive", version], cwd=ROOT, capture_output=True, check=False)
        if archive.returncode:
            raise OlderVersionError(f"no commit {version} here: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = {**os.environ, "LAYERSKIP_CUDA": "1", "LAYERSKIP_CUDA_ARCHS": architecture()}
        built = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if built.returncode:
            raise OlderVersionError(f"commit {version} does not build: {built.stderr[-500:]}")
        yield folder


def architecture() -> str:
    """What nvcc calls the card: "80", "90a"."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major >= 9 else ''}"


class Worker:
    """A process that times the ops of the version in a folder."""

    def __init__(self, folder: Path, device: str, backend: str, arguments: Sequence[str] = ()) -> None:
        # Not as a file or a module: then Python would look in another folder first, here it is the version's.
        source = Path(__file__).with_name("gpu_worker.py").read_text(encoding="utf-8")
        command = [sys.executable, "-c", source, device, backend, *arguments]
        self._process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            hello = self._read()
            if not Path(hello["package"]).is_relative_to(folder):  # another one is installed, or comes first
                raise OlderVersionError(f"in {folder} Python finds the package {hello['package']}")
        except BaseException:
            self.close()
            raise
        self.cases: list[str] = hello["cases"]

    def ask(self, case: str) -> dict[str, float]:
        """What the process says of a case."""
        assert self._process.stdin is not None
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        found: dict[str, float] = self._read()
        return found

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OlderVersionError(f"a worker ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def compare(
    before: Path, after: Path, device: str = "cuda", backend: str = "cuda", arguments: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """For each case the medians of both versions, in microseconds, their ratio, and whether both give the same."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(closing(Worker(folder, device, backend, arguments))) for folder in (before, after)
        ]
        for case in workers[1].cases:
            turns = [[worker.ask(case) for worker in workers] for _ in range(TURNS)]
            old, new = (median(turn[index]["microseconds"] for turn in turns) for index in (0, 1))
            same = all(_alike(*turn) for turn in turns)
            yield {"what": case, "before_us": old, "after_us": new, "ratio": old / new, "same": same}


def _alike(one: dict[str, float], other: dict[str, float]) -> bool:
    return all(abs(one[name] - other[name]) <= CLOSE * abs(other["norm"]) for name in ("norm", "along"))


def before_and_after(version: str) -> dict[str, Any]:
    """The part of a report: the lines of `compare`, and why there are no more, if there could be."""
    report: dict[str, Any] = {"version": version, "rows": []}
    try:
        with checkout(version) as folder:
            for row in compare(folder, ROOT):
                print(row, flush=True)
                report["rows"].append(row)
    except OlderVersionError as error:
        print(f"an older version is not measured: {error}", file=sys.stderr)
        report["skipped"] = str(error)
    return report
