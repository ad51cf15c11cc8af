"""What holds without running a kernel: lazy import, reasons, the tuning table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import layerskip_kernels as lk
from layerskip_kernels import triton
from layerskip_kernels.schemas import SCHEMAS


def test_importing_the_library_does_not_import_triton() -> None:
    code = "import sys, layerskip_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0


def test_every_entry_names_an_op_and_a_file() -> None:
    assert {op for ops in triton.FILES.values() for op in ops} <= set(SCHEMAS)
    for module in triton.FILES:
        assert (Path(triton.__file__).parent / f"{module}.py").exists()


def test_an_absent_triton_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_installed", lambda: "triton is not installed")
    with lk.use_backend("triton"), pytest.raises(lk.BackendError, match="triton is not installed"):
        lk.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)


def test_float64_is_not_served() -> None:
    pytest.importorskip("triton")
    assert triton.supports(torch.ones(2, dtype=torch.float64)) == "float64 is not served"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A stand-in for a weight on a card, with an empty table beside it."""
    pytest.importorskip("triton")
    from layerskip_kernels.triton import _config

    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card/1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _config._tuned.cache_clear()
    yield SimpleNamespace(
        is_cuda=True, device="cuda:0", dtype=torch.bfloat16, shape=(2048, 4096), stride=lambda dim: 4096
    )
    _config._tuned.cache_clear()


def test_tuning_keeps_the_fastest_on_disk(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerskip_kernels.triton import _config

    tried: list[_config.Config] = []
    monkeypatch.setattr(_config, "_fastest", lambda run: [run(config) for config in _config.SPACE][5])
    monkeypatch.setenv("LAYERSKIP_AUTOTUNE", "1")
    assert _config.pick("linear", card, lambda config: tried.append(config) or config) == _config.SPACE[5]
    assert tried == list(_config.SPACE)
    _config._tuned.cache_clear()  # as a new process would find it
    monkeypatch.delenv("LAYERSKIP_AUTOTUNE")
    assert _config.pick("linear", card, lambda config: pytest.fail("ran again")) == _config.SPACE[5]
    assert _config.cache_file("A card/1").name == "triton-A-card-1.json"


def test_nothing_is_tuned_while_a_graph_is_captured(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerskip_kernels.triton import _config

    monkeypatch.setenv("LAYERSKIP_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    chosen = _config.pick("linear", card, lambda config: pytest.fail("ran in a capture"))
    assert chosen == _config.default("linear", card)
