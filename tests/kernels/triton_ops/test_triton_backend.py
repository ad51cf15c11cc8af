"""What holds without running a kernel: lazy import, reasons, the tuning table."""

from __future__ import annotations

import subprocess
import sys
import warnings
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


def test_every_op_has_a_file() -> None:
    assert set(triton.FILES) <= set(SCHEMAS)
    for op in SCHEMAS:
        assert (Path(triton.__file__).parent / f"{triton.FILES.get(op, op)}.py").exists()


def test_an_absent_triton_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_installed", lambda: "triton is not installed")
    with lk.use_backend("triton"), pytest.raises(lk.BackendError, match="triton is not installed"):
        lk.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)


def test_float64_is_not_served() -> None:
    pytest.importorskip("triton")
    assert triton.supports(torch.ones(2, dtype=torch.float64)) == "float64 is not served"


def test_packed_weights_that_are_not_served() -> None:
    """fp8, what mixes formats in one launch, and heads; int8 gets as far as the question of the device."""
    pytest.importorskip("triton")
    x, norm = torch.ones(2, 32), torch.ones(32)
    int8, int4, fp8 = (torch.zeros(32, size, dtype=torch.uint8) for size in (34, 18, 36))
    assert triton.supports(x, norm, int8) == "packed weights are not served"
    on_device = triton.supports_packed(x, x)
    assert triton.supports_packed(x, int8) == triton.supports_packed(x, int8, int8) == on_device
    if on_device is None:
        assert triton.supports_packed(x, fp8) == "fp8 weights are not served"
        assert "interleaved weights are not served" in triton.supports_packed(x, int8.view(torch.int16))
        assert triton.supports_packed(x, int8, int4) == "gate and up of different formats are not served"
        layer = [norm, int8, int4, int8, int4, norm, int8, int8, int4]
        assert triton.supports_packed(x, layer) is None
        assert triton.supports_packed(x, [*layer[:7], int4, int4]) == "gate and up of different formats are not served"
        assert triton.supports_packed(x, [*layer[:8], fp8]) == "fp8 weights are not served"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A stand-in for a weight on a GPU, with an empty table beside it."""
    pytest.importorskip("triton")
    from layerskip_kernels.triton import _launch

    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU/1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_launch, "shared_limit", lambda index: 227 * 1024)
    _launch._tuned.cache_clear()
    yield SimpleNamespace(
        is_cuda=True, device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(2048, 4096), stride=lambda dim: 4096
    )
    _launch._tuned.cache_clear()


def test_tuning_keeps_the_fastest_on_disk(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerskip_kernels.triton import _launch

    tried: list[_launch.Config] = []
    monkeypatch.setattr(_launch, "_fastest", lambda op, run, limit: [run(config) for config in _launch.SPACE][5])
    monkeypatch.setenv("LAYERSKIP_AUTOTUNE", "1")
    assert _launch.pick("linear", gpu, 1, lambda config: tried.append(config) or config) == _launch.SPACE[5]
    assert tried == list(_launch.SPACE)
    _launch._tuned.cache_clear()  # as a new process would find it
    monkeypatch.delenv("LAYERSKIP_AUTOTUNE")
    assert _launch.pick("linear", gpu, 1, lambda config: pytest.fail("ran again")) == _launch.SPACE[5]
    from triton import __version__

    assert _launch.cache_file("A GPU/1").name == f"triton-{__version__}-A-GPU-1.json"


def test_a_prompt_that_comes_first_tunes_nothing(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerskip_kernels.triton import _launch

    monkeypatch.setenv("LAYERSKIP_AUTOTUNE", "1")
    chosen = _launch.pick("linear", gpu, 17, lambda config: pytest.fail("timed a prompt"))
    assert chosen == _launch.default("linear", gpu)


@pytest.mark.parametrize("limit", [99 * 1024, 64 * 1024])
def test_small_gpus_get_what_fits(limit: int, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_86, 89 and 120 have 99 KiB of shared memory a block, gfx942 64: no configuration is tried that exceeds it."""
    from layerskip_kernels.triton import _launch

    timed: list[_launch.Config] = []
    monkeypatch.setattr(_launch, "shared_limit", lambda index: limit)
    monkeypatch.setattr(_launch.triton.testing, "do_bench", lambda run, **options: (run(), float(len(timed)))[1])
    monkeypatch.setenv("LAYERSKIP_AUTOTUNE", "1")
    for op in ("linear", "qkv", "swiglu", "exit_head"):
        assert _launch.shared_bytes(op, _launch.default(op, gpu)) <= limit
        _launch.pick(op, gpu, 1, timed.append)
        assert timed
        assert all(_launch.shared_bytes(op, config) <= limit for config in timed)
        assert op != "swiglu" or len(timed) < len(_launch.SPACE)
        timed.clear()


def test_nothing_is_tuned_while_a_graph_is_captured(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerskip_kernels.triton import _launch

    monkeypatch.setenv("LAYERSKIP_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    chosen = _launch.pick("linear", gpu, 1, lambda config: pytest.fail("ran in a capture"))
    assert chosen == _launch.default("linear", gpu)


def test_warns_once_that_the_kernels_are_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they were asked for."""
    monkeypatch.setattr(triton, "device_of", lambda args: torch.device("cuda"))
    monkeypatch.setattr(triton, "import_module", lambda *name: SimpleNamespace(rms_norm=lambda *args: "served"))
    triton._warn_unproven.cache_clear()
    serve = triton._lazy("rms_norm", "rms_norm")
    with lk.use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert serve() == "served"
    with pytest.warns(RuntimeWarning, match="have not run on one yet") as told:
        assert (serve(), serve()) == ("served", "served")
    assert len(told) == 1
    triton._warn_unproven.cache_clear()


def test_a_round_reads_the_cache_once() -> None:
    """Llama-3.2-1B, eight slots of 128 K, five rows: the scratch may be half a layer's cache; a small one is 64 MiB."""
    pytest.importorskip("triton")
    from layerskip_kernels.triton.verify_attention import SPLIT, rows_at_once

    cache_bytes = 2 * 8 * 8 * 2**17 * 64 * 2
    assert rows_at_once(8, 32, 2**17 // SPLIT, 64, cache_bytes) >= 5
    assert rows_at_once(8, 32, 2**17 // SPLIT, 64, 0) == 1
    assert rows_at_once(1, 4, 1, 8, 0) == 64
