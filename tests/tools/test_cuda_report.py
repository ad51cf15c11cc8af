"""ptxas's words are read right, and no kernel of this checkout spills."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools.cuda_report import Kernel, kernels, logs, markdown, parse

WORDS = """\
ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN3lsk4fillIfEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN3lsk4fillIfEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 2 barriers, 128 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 27.154 ms
ptxas info    : Compiling entry function '_ZN3lsk4fillI6__halfEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN3lsk4fillI6__halfEEvPT_
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for __internal_trig_reduction_slowpathd
    40 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 40 bytes cumulative stack size
"""


def test_reads_what_ptxas_says() -> None:
    assert list(parse(WORDS)) == [
        Kernel("_ZN3lsk4fillIfEEvPT_", "sm_80", 20, 128, 0, 0),
        Kernel("_ZN3lsk4fillI6__halfEEvPT_", "sm_90a", 255, 0, 40, 16),
    ]


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt to read names with")
def test_table(tmp_path: Path) -> None:
    log = tmp_path / "fill.cu.o.ptxas"
    log.write_text(WORDS)
    table = markdown(kernels([log]))
    assert table.splitlines()[0] == "| kernel | sm_80 | sm_90a | static shared | stack | spills |"
    assert table.splitlines()[2:] == [
        "| `fill<float>` | 20 |  | 128 | 0 | 0 |",
        "| `fill<fp16>` |  | 255 | 0 | 40 | 16 |",
    ]


def test_no_kernel_spills() -> None:
    """Neither registers to memory, nor an array that did not fit into registers."""
    found = kernels(logs())
    if not found:
        pytest.skip("no CUDA kernels were built in this checkout")
    assert [kernel for kernel in found if kernel.stack or kernel.spills] == []
