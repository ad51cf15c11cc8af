"""Programs that a model wrote, each in a process of its own, with limits and without a network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

GUARDED = Path(__file__).with_name("_guarded.py")
SECONDS, MEGABYTES = 10, 1024
_ENDED = 79  # any code that a program does not end with by itself


class Outcome(NamedTuple):
    """What became of a program.

    Attributes
    ----------
    passed : bool
        Whether it came to its end: nothing was raised, and no limit reached.
    reason : str
        What was, in a line.
    network : str
        What kept the network away: "namespace", one of its own, or "hook", an audit hook of Python, where the kernel
        gives no namespaces. Empty where it took too long.
    """

    passed: bool
    reason: str
    network: str


def run(program: str, seconds: int = SECONDS, megabytes: int = MEGABYTES) -> Outcome:
    """Run a program in Python and see whether it comes to its end.

    It may not use sockets, start processes, or change files. Limits of time and memory are the kernel's; the rest is
    kept by Python's audit hooks and, where there are some, namespaces. This stops what a model writes by mistake. It is
    no prison for a program that wants to break out.

    Parameters
    ----------
    program : str
    seconds : int
        Of wall time, and of the processor's.
    megabytes : int
        Of address space.
    """
    limits = map(str, (seconds, megabytes << 20, _ENDED))
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-s", "-B", str(GUARDED), *limits],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder,
            start_new_session=True,
            env={"PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        )  # fmt: skip
        try:
            said, _ = process.communicate(program.encode(), timeout=seconds)
            reason = ""
        except subprocess.TimeoutExpired:
            said, reason = b"", f"took more than {seconds} s"
        finally:
            with suppress(ProcessLookupError):  # all of its session has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    network, _, error = said.decode(errors="replace").strip().partition("\n")
    passed = process.returncode == _ENDED
    return Outcome(passed, "" if passed else reason or error or _ending(process.returncode), network)


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
