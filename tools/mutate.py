"""Plants known bugs, one at a time, and says which the tests catch: ``python -m tools.mutate``, ``make mutate``.

It works on a copy of what git tracks, so the checkout stays as it is, whatever ends the run. A bug is caught where a
test fails, or does not end in time. The tests must pass without it, which is tried first.

``--output benchmarks/results/mutations.md`` keeps a table, a row as soon as a bug was tried. A bug that has a row is
not tried again unless no test caught it: an interrupted run continues, and a deleted row is measured again.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from layerskip import _ends
from layerskip._files import write_atomically

from .mutations import MUTATIONS, Mutation
from .mutations.mutation import VLLM

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED = 0, 1  # pytest's exit codes; any other says that it could not run
LIMIT = 1800  # seconds that the tests of one bug may take
HEAD = """# Planted bugs

Written by `make mutate MUTATE_ARGS="--output benchmarks/results/mutations.md"`: each bug of `tools/mutations/`,
planted alone, and the first test that failed. A bug without a row has not been tried since the table was begun.

| bug | file | caught by | seconds |
|---|---|---|---|
"""
NOT_CAUGHT = "**not caught**"
Rows = dict[str, str]  # by the bug's name: its row of the table


def copy_to(folder: Path) -> None:
    """Copy the files that git tracks, and the libraries that were built from them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    built = [path.relative_to(ROOT) for path in (ROOT / "layerskip_kernels").glob("*.so")]
    for name in [*map(Path, filter(None, listed.split("\0"))), *built]:
        target = folder / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)


@contextmanager
def planted(mutation: Mutation, folder: Path) -> Iterator[None]:
    """The copy with one bug in it.

    Raises
    ------
    ValueError
        If the text to replace is not in the file exactly once.
    """
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        found = text.count(mutation.old)
        raise ValueError(f"{mutation.name}: {mutation.file} has {mutation.old!r} {found} times, must have it once")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def build(folder: Path) -> None:
    """Compile what has changed of the CPU library."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=_environment(folder), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"it does not compile: {done.stdout[-500:]} {done.stderr[-500:]}")


def failure(tests: str, folder: Path) -> str | None:
    """What the tests say: the first that fails, or None where all pass.

    Raises
    ------
    ValueError
        If they could not be run.
    """
    command = [str(interpreter(tests)), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *_words(tests)]
    environment = _environment(folder)
    if "/compiled/" in tests:
        environment["TRITON_INTERPRET"] = "0"
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {LIMIT} s"
    if done.returncode == PASSED:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode != FAILED or not lines:
        raise ValueError(f"pytest {tests} could not run: {done.stdout[-500:]} {done.stderr[-500:]}")
    return lines[0].removeprefix("FAILED ").split(" - ")[0]


def interpreter(tests: str) -> Path:
    """The Python of some tests: those inside vLLM have an environment of their own, which ``make test-vllm`` makes."""
    own = tests.startswith(VLLM)
    return Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm")) / "bin/python" if own else Path(sys.executable)


def can_run(mutation: Mutation) -> bool:
    """Whether the environment of a bug's tests is there; where it is not, a line says so."""
    python = interpreter(mutation.tests)
    if not python.is_file():
        print(f"{mutation.name} is not planted: its tests run in {python}, which make test-vllm or VLLM_VENV provides")
    return python.is_file()


def _words(tests: str) -> list[str]:
    """Files, then ``-k`` and what follows it as one word."""
    files, _, chosen = tests.partition(" -k ")
    return [*files.split(), *(["-k", chosen] if chosen else [])]


def _environment(folder: Path) -> dict[str, str]:
    paths = [folder, folder / "python", folder / "examples/smollm2"]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "LAYERSKIP_CUDA": "0"}


def check(mutations: Sequence[Mutation], folder: Path) -> Iterator[tuple[Mutation, str | None, float]]:
    """Plant each; gives what caught it, if anything, and the seconds that it took."""
    if any(mutation.compiled for mutation in mutations):
        build(folder)
    for tests in dict.fromkeys(mutation.tests for mutation in mutations):
        if (failing := failure(tests, folder)) is not None:
            raise ValueError(f"{failing} fails with no bug planted")
    print(f"{len(mutations)} bugs to plant; their tests pass without", flush=True)
    stale = False  # the library has the bug before this one
    for mutation in mutations:
        started = time.perf_counter()
        with planted(mutation, folder):
            if mutation.compiled or stale:
                build(folder)
            stale = mutation.compiled
            caught = failure(mutation.tests, folder)
        yield mutation, caught, time.perf_counter() - started


def rows_of(page: Path | None) -> Rows:
    """Return the rows of an earlier run, without the bugs that no test caught."""
    if page is None or not page.exists():
        return {}
    text = page.read_text(encoding="utf-8")
    if not text.startswith(HEAD):
        raise ValueError(f"{page} is not a table of planted bugs; --output must name one, or a new file")
    names = {mutation.name for mutation in MUTATIONS}
    lines = [line for line in text.removeprefix(HEAD).splitlines() if NOT_CAUGHT not in line]
    return {name: line for line in lines if (name := line.split("|")[1].strip()) in names}


def write(page: Path, rows: Rows) -> None:
    """Write the table, in the order of `MUTATIONS`."""
    table = "\n".join(rows[mutation.name] for mutation in MUTATIONS if mutation.name in rows)
    write_atomically(page, f"{HEAD}{table}\n".encode())


def row_of(mutation: Mutation, caught: str | None, seconds: float) -> str:
    """One line of the table; of a test's path its file alone."""
    test = NOT_CAUGHT if caught is None else f"`{re.sub('^[^ :]*/', '', caught)}`"
    return f"| {mutation.name} | `{mutation.file}` | {test} | {seconds:.0f} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each bug; 0 if all are caught, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutate", description=__doc__)
    parser.add_argument("--only", default="", help="those bugs alone whose name or file has this in it")
    parser.add_argument("--folder", type=Path, help="keep the copy here, so that a later run need not compile it all")
    parser.add_argument("--output", type=Path, metavar="PAGE", help="keep the table here, and continue from it")
    _ends.declare(parser)
    args = parser.parse_args(argv)
    rows = rows_of(args.output)
    chosen = [one for one in MUTATIONS if args.only in one.name or args.only in one.file]
    if not chosen:
        raise ValueError(f"--only {args.only} names no bug")
    left, survivors = [one for one in chosen if one.name not in rows and can_run(one)], []
    with tempfile.TemporaryDirectory(prefix="mutate-") as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        if folder == ROOT:
            raise ValueError("--folder must not be the checkout, whose files would be changed")
        copy_to(folder)
        for mutation, caught, seconds in check(left, folder):
            verdict = "NOT CAUGHT" if caught is None else f"caught by {caught}"
            print(f"{mutation.name} ({mutation.file}): {verdict}, {seconds:.0f} s", flush=True)
            if caught is None:
                survivors.append(mutation.name)
            if args.output is not None:
                rows[mutation.name] = row_of(mutation, caught, seconds)
                write(args.output, rows)
    print(f"{len(left) - len(survivors)} of {len(left)} caught" + "".join(f"\nnot caught: {one}" for one in survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(_ends.module("tools.mutate", main))
