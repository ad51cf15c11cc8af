"""Worker threads of the CPU kernels: none runs ahead, and a long wait gives up its core."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip_kernels import _extension

HERE = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


@pytest.fixture(scope="module", params=[(), ("-DLSK_PORTABLE_WAIT",)], ids=["here", "portable"])
def program(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler to build thread_pool.cpp with")
    built = tmp_path_factory.mktemp("thread_pool") / "thread_pool"
    flags = ["-std=c++20", "-O2", "-fopenmp", *request.param, f"-I{HERE.parents[1] / 'csrc'}"]
    subprocess.run([*shlex.split(COMPILER), *flags, str(HERE / "thread_pool.cpp"), "-o", str(built)], check=True)
    return built


def run(program: Path, test: str, environment: dict[str, str]) -> None:
    done = subprocess.run([str(program), test], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("test", ["barrier", "sleep"])
def test_workers_wait_for_each_other_and_sleep_in_long_waits(program: Path, test: str) -> None:
    run(program, test, {**os.environ, "LAYERSKIP_FIXED_THREADS": "1"})


def test_worker_sleeps_after_the_spin_limit(program: Path) -> None:
    """Neither earlier nor twice, and it is woken; in simulated time, so that other processes do not matter."""
    run(program, "simulate", dict(os.environ))


def test_only_a_call_that_slept_reduces_the_threads(program: Path) -> None:
    fixed = ("LAYERSKIP_FIXED_THREADS", "LAYERSKIP_FIXED_TEAM")
    run(program, "shrink", {name: value for name, value in os.environ.items() if name not in fixed})


STRESS = """
import os
import random
import signal
import sys
import threading

import torch

from tests.kernels.common import run
from tests.kernels.examples import example

OPS = ("linear", "swiglu", "verify_attention", "partial_forward", "exit_head", "speculative_round", "accept_greedy")


def call(op, rows=40):
    args = example(op)
    if op in ("linear", "swiglu"):
        args["x"] = args["x"][:1].repeat(rows, *[1] * (args["x"].dim() - 1))
        args.pop("residual", None)
    return [one.clone() for one in tensors(run(op, **args))] + [
        args[name] for name in ("k_cache", "seq_lens") if name in args
    ]


def tensors(out):
    return [out] if isinstance(out, torch.Tensor) else [one for one in out if isinstance(one, torch.Tensor)]


def agree(found, expected):
    return all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in zip(found, expected, strict=True))


torch.set_num_threads(1)
expected = {op: call(op) for op in OPS}
wrong, repeats = [], int(sys.argv[1])


def work(seed):
    draw = random.Random(seed)
    while repeats > work.done.setdefault(seed, 0):
        op = draw.choice(OPS)
        torch.set_num_threads(draw.randint(1, 4))  # of this thread alone
        if not agree(call(op), expected[op]):
            wrong.append(op)
        if draw.random() < 0.1:  # refused in a thread: the others go on
            try:
                run("linear", x=torch.ones(2, 3), weight=torch.ones(4, 5))
                wrong.append("not refused")
            except ValueError:
                pass
        work.done[seed] = work.done.get(seed, 0) + 1


work.done = {}
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
for thread in threads:
    thread.start()
for _ in range(5):  # forks while others compute; libgomp's workers do not exist in a child
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        torch.set_num_threads(1)
        os._exit(0 if all(agree(call(op), expected[op]) for op in OPS) else 1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        wrong.append("fork")
for thread in threads:
    thread.join()
assert not wrong, wrong
assert sum(work.done.values()) == 6 * repeats
for seed in range(10, 14):  # the interpreter exits while these compute, and waits for them
    threading.Thread(target=work, args=(seed,)).start()
print("equal")
"""


def test_threads_forks_and_exit_give_the_bits_of_one_thread() -> None:
    if _extension.cpu_reason is not None:
        pytest.skip(f"no native kernels: {_extension.cpu_reason}")
    paths = [str(HERE.parents[1]), str(HERE.parents[1] / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", STRESS, "60"], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr
