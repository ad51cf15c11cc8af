"""Instruction sets of the native kernels: which ones there are, and that each can be forced."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

import layerskip_kernels as lk
from layerskip_kernels import _extension

from .common import ISAS, Inputs, running_on

pytestmark = pytest.mark.skipif(_extension.cpu_reason is not None, reason=f"no native kernels: {_extension.cpu_reason}")

FLAGS = {
    "amx": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
    "neon_bf16": {"asimd", "bf16"},
    "neon": {"asimd"},
    "portable": set(),
    "amx_emulated": set(),
}


def processor_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip(f"no /proc/cpuinfo to compare with ({platform.system()} {platform.machine()})")
    line = next(line for line in info.read_text().splitlines() if line.startswith(("flags", "Features")))
    return set(line.split(":")[1].split())


@pytest.mark.parametrize("name", ISAS)
def test_available_where_the_processor_has_it(name: str) -> None:
    if FLAGS[name] <= processor_flags():
        before = lk.set_cpu_isa(name)
        assert lk.cpu_isa() == name
        assert lk.set_cpu_isa(before) == name
    else:
        with pytest.raises(RuntimeError, match=f"'{name}' is not one of .* that this machine has"):
            lk.set_cpu_isa(name)


def test_the_best_is_the_default() -> None:
    flags = processor_flags()
    assert lk.cpu_isa() == next(name for name in ISAS if FLAGS[name] <= flags)


def test_unknown_name() -> None:
    before = lk.cpu_isa()
    with pytest.raises(RuntimeError, match=f"'sse9' is not one of {', '.join(ISAS)}"):
        lk.set_cpu_isa("sse9")
    assert lk.cpu_isa() == before


def test_forced_sets_really_differ() -> None:
    """bf16 products are summed in another order with pairs or tiles: equal bits would mean that one code ran twice."""
    make = Inputs(torch.bfloat16)
    hidden, norm, head = make.normal(8, 576), make.norm(576), make.weight(333, 576)
    results = {}
    for name in ISAS:
        if FLAGS[name] <= processor_flags():
            with running_on(name):
                results[name] = lk.exit_head(hidden, norm, head, 1e-5).logsumexp
    for name, other in (("amx", "avx512_bf16"), ("avx512_bf16", "avx512"), ("neon_bf16", "neon")):
        assert name not in results or not torch.equal(results[name], results[other])
    assert not torch.equal(results["amx_emulated"], results["portable"])
    for result in results.values():
        torch.testing.assert_close(result, results["portable"], rtol=1e-4, atol=1e-4)


def test_a_missing_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "cpu_reason", "_cpu.abi3.so was not built")
    with pytest.raises(RuntimeError, match=r"no native CPU library: _cpu\.abi3\.so was not built"):
        lk.cpu_isa()
