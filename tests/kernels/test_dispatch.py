"""Which backend serves a call, forcing one, and the reasons."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import layerskip_kernels as lk
from layerskip_kernels import _extension, dispatch, reference
from layerskip_kernels.schemas import SCHEMAS

from .common import run
from .examples import OPS, example

has_native = pytest.mark.skipif(_extension.cpu_reason is not None, reason=f"no native kernels: {_extension.cpu_reason}")


@pytest.mark.parametrize("op", SCHEMAS)
def test_every_op_has_a_reference(op: str) -> None:
    assert callable(getattr(reference, f"{op}_ref"))
    assert "reference" in dispatch._table[op]


@has_native
@pytest.mark.parametrize("op", OPS)
def test_cpu_tensors_go_to_the_native_kernels(op: str) -> None:
    explanation = lk.explain(op, *example(op).values())
    assert explanation.backend == "cpu"
    assert str(explanation) == f"{op} is served by cpu"


@pytest.mark.parametrize("op", OPS)
def test_reference_can_be_forced(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own = dispatch.Implementation(lambda *args: calls.append(args), lambda *args: None)
    monkeypatch.setitem(dispatch._table[op], "reference", own)
    args = example(op)
    with lk.use_backend("reference"):
        dispatch.serve(op, *args.values())
        assert len(calls) == 1
        assert lk.explain(op, *args.values()).backend == "reference"


@has_native
@pytest.mark.parametrize("op", OPS)
def test_forced_reference_is_what_the_public_function_runs(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    def reached(*args: Any) -> None:
        raise Reached

    monkeypatch.setitem(dispatch._table[op], "reference", dispatch.Implementation(reached, lambda *args: None))
    with lk.use_backend("reference"), pytest.raises(Reached):
        run(op, *example(op).values())
    run(op, *example(op).values())


CUDA_ORDER, CPU_ORDER = ["cuda", "triton", "reference"], ["cpu", "reference"]


@pytest.mark.parametrize(("device", "order"), [("cuda", CUDA_ORDER), ("cpu", CPU_ORDER), ("meta", ["reference"])])
def test_the_first_supporting_backend_serves(device: str, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By device; each stand-in refuses in its turn, and those before the one that serves are listed in order."""
    refusing: set[str] = set()
    for backend in dispatch.BACKENDS:
        reason = lambda *args, own=backend: f"{own} is busy" if own in refusing else None  # noqa: E731
        stand_in = dispatch.Implementation(lambda *args: None, reason)
        monkeypatch.setitem(dispatch._table["rms_norm"], backend, stand_in)
    with FakeTensorMode():
        args = torch.empty(2, 4, device=device), torch.empty(4, device=device), 1e-5
    for place, backend in enumerate(order):
        explanation = lk.explain("rms_norm", *args)
        assert explanation.backend == backend
        assert list(explanation.skipped.items()) == [(one, f"{one} is busy") for one in order[:place]]
        refusing.add(backend)
    with pytest.raises(lk.BackendError, match="no backend serves rms_norm"):
        lk.explain("rms_norm", *args)


def test_forced_backend_does_not_fall_back() -> None:
    args = example("rms_norm").values()
    with lk.use_backend("cuda"), pytest.raises(lk.BackendError, match=r"no backend serves rms_norm .*cuda"):
        lk.rms_norm(*args)


@has_native
@pytest.mark.parametrize("through", ["the public function", "torch's dispatcher"])
def test_native_refusals_are_value_errors_with_their_message(through: str) -> None:
    args = {**example("draft"), "token": torch.tensor([0, 37])}
    function = partial(run, "draft") if through == "the public function" else torch.ops.layerskip.draft
    with pytest.raises(ValueError, match=r"^token 37 is outside the vocabulary of 37$"):
        function(*args.values())


@has_native
def test_other_native_errors_keep_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("no memory")

    own = dispatch.Implementation(fails, checks=True)
    monkeypatch.setitem(dispatch._table["rms_norm"], "cpu", own)
    with pytest.raises(RuntimeError, match=r"^no memory$"):
        lk.rms_norm(*example("rms_norm").values())


def test_the_prefix_of_refusals_is_that_of_the_header() -> None:
    header = Path(__file__).parents[2] / "csrc" / "common" / "checks.h"
    assert f'message << "{dispatch.REFUSAL}";' in header.read_text()


def test_forcing_ends_with_the_block() -> None:
    args = example("rms_norm").values()
    before = lk.explain("rms_norm", *args).backend
    with lk.use_backend("reference"):
        with lk.use_backend(None):
            assert lk.explain("rms_norm", *args).backend == before
        assert lk.explain("rms_norm", *args).backend == "reference"
    assert lk.explain("rms_norm", *args).backend == before


def test_forcing_ends_with_an_exception() -> None:
    before = lk.explain("rms_norm", *example("rms_norm").values()).backend
    with pytest.raises(ZeroDivisionError), lk.use_backend("reference"):
        raise ZeroDivisionError
    assert lk.explain("rms_norm", *example("rms_norm").values()).backend == before


def test_unknown_names() -> None:
    with (
        pytest.raises(ValueError, match="unknown backend 'fast', expected one of cuda, triton, cpu, reference"),
        lk.use_backend("fast"),
    ):
        pass
    with pytest.raises(ValueError, match="unknown op 'softmax', expected one of accept_greedy, "):
        lk.explain("softmax", torch.ones(1))


def test_reasons_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A native library that is missing: the reference serves, and the reason is there to read."""
    absent = dispatch.Implementation(lambda *args: None, lambda *args: "_cpu.abi3.so was not built")
    monkeypatch.setitem(dispatch._table["rms_norm"], "cpu", absent)
    explanation = lk.explain("rms_norm", *example("rms_norm").values())
    assert explanation.backend == "reference"
    assert explanation.skipped == {"cpu": "_cpu.abi3.so was not built"}
    assert str(explanation) == "rms_norm is served by reference\n  cpu: _cpu.abi3.so was not built"
    with lk.use_backend("cpu"), pytest.raises(lk.BackendError, match=r"cpu: _cpu\.abi3\.so was not built"):
        lk.rms_norm(*example("rms_norm").values())


def run_with(backend: str) -> subprocess.CompletedProcess[str]:
    code = "import torch, layerskip_kernels as lk; x = torch.ones(2); print(lk.explain('rms_norm', x, x, 0.0).backend)"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LAYERSKIP_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_forces_a_backend() -> None:
    assert run_with("reference").stdout.strip() == "reference"
    failed = run_with("fast")
    assert failed.returncode != 0
    assert "unknown backend 'fast', expected one of cuda, triton, cpu, reference" in failed.stderr
