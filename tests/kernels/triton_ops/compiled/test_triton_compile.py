"""What ptxas makes of every launch, without a GPU: it fits, nothing spills, the instructions meant are there."""

from __future__ import annotations

import re

import pytest
import torch
import triton

from layerskip_kernels.triton import _launch
from layerskip_kernels.triton._launch import PDL_COMPILES
from tools import triton_report as report

STREAMING = ("linear_kernel", "qkv_kernel", "swiglu_kernel", "exit_head_kernel")
TILED = ("early_exit_loss_kernel", "softmax_slope_kernel", "accumulate_kernel")
MULTIPLYING = (*STREAMING, *TILED, "verify_attention_kernel", "packed_linear_kernel", "packed_swiglu_kernel")
TENSOR_CORES = ("mma.sync.aligned.m16n8k16", "wgmma.mma_async", "tcgen05.mma")
CASES = {
    "llama-1b-bf16": (report.LLAMA_1B, torch.bfloat16, False),
    "llama-8b-bf16-full": (report.LLAMA_8B, torch.bfloat16, True),
    "llama-1b-fp16": (report.LLAMA_1B, torch.float16, False),
    "llama-1b-fp32": (report.LLAMA_1B, torch.float32, False),
    "odd-bf16": (report.ODD, torch.bfloat16, True),
}
KERNELS = {
    "rms_norm", "linear", "linear_finish", "qkv", "swiglu", "rope_kv_append", "verify_attention",
    "verify_attention_finish", "exit_head", "exit_head_finish", "accept_greedy", "row_statistics", "accept_sampled",
    "accept_sampled_finish", "draft_step",
    "early_exit_loss", "early_exit_loss_finish", "softmax_slope", "accumulate", "rms_norm_backward",
}  # fmt: skip


def flaws(launch: report.Launch, name: str) -> list[str]:
    """What is wrong with the code for one target."""
    target = report.TARGETS[name]
    compiled = report.compile_for(launch, target)
    used, ptx, kernel = report.resources(compiled), compiled.asm["ptx"], launch.kernel.__name__
    sixteen_bit = any(str(getattr(arg, "dtype", "")).endswith("16") for arg in launch.arguments.values())
    found = []
    if used.shared > report.SHARED_LIMIT[target.arch]:
        found.append(f"{used.shared} bytes of shared memory")
    if kernel in STREAMING:
        config = _launch.Config(launch.arguments["BLOCK_N"], launch.options["num_warps"], launch.options["num_stages"])
        counted = _launch.shared_bytes(kernel.removesuffix("_kernel"), config)
        if used.shared > counted:
            found.append(f"{used.shared} bytes of shared memory, tuning counts on {counted}")
        if PDL_COMPILES and target.arch >= 90 and launch.arguments.get("SPLITS", 1) == 1:
            fetch, wait = ptx.find("prefetch.global.L2"), ptx.find("griddepcontrol.wait")
            if not 0 <= fetch < wait:
                found.append(f"no weights are fetched before the wait: {fetch}, {wait}")
        elif "prefetch.global" in ptx:
            found.append("prefetches weights, with no wait to do it before")
    if used.spilled:
        found.append(f"{used.spilled} bytes spilled")
    dependent = [f"griddepcontrol.{word}" in ptx for word in ("launch_dependents", "wait")]
    if dependent != [PDL_COMPILES and target.arch >= 90] * 2:
        found.append(f"griddepcontrol: {dependent}")
    if kernel in MULTIPLYING and sixteen_bit and not any(name in ptx for name in TENSOR_CORES):
        found.append("no mma")
    if kernel in MULTIPLYING and not sixteen_bit and ("tf32" in ptx or "fma.rn.f32" not in ptx):
        found.append("fp32 is not multiplied as fp32")
    widths = set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (0x\w+)", ptx))
    if kernel in STREAMING and launch.arguments["EVEN"] and widths != {"0x10"}:
        found.append(f"weights are copied {widths} bytes at a time")
    return [f"{launch.name} on {name}: {flaw}" for flaw in found]


@pytest.mark.parametrize("target", report.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_every_launch(case: str, target: str) -> None:
    launches = report.launches(*CASES[case])
    names = {launch.kernel.__name__.removesuffix("_kernel") for launch in launches}
    assert names >= KERNELS - {"linear_finish"}
    assert [flaw for launch in launches for flaw in flaws(launch, target)] == []


@pytest.mark.parametrize("target", report.TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_weights(dtype: torch.dtype, target: str) -> None:
    launches = report.packed_launches(report.LLAMA_1B, dtype)
    assert len({launch.name for launch in launches}) == 12  # two kernels, six formats
    assert [flaw for launch in launches for flaw in flaws(launch, target)] == []


def test_split_products_are_among_the_launches() -> None:
    names = {launch.kernel.__name__ for launch in report.launches(*CASES["llama-1b-bf16"])}
    assert "linear_finish_kernel" in names


@pytest.mark.parametrize("target", report.TARGETS)
def test_every_configuration_of_the_tuning_space(target: str) -> None:
    plain = [one for one in report.launches(*CASES["llama-1b-bf16"]) if not one.arguments.get("SAMPLES")]
    launches = [
        tuned
        for launch in report.launches(*CASES["llama-8b-bf16-full"]) + plain
        if launch.kernel.__name__ in STREAMING
        for tuned in report.tuned(launch)
    ]
    assert len(launches) >= len(STREAMING) * 8
    assert [flaw for launch in {one.name: one for one in launches}.values() for flaw in flaws(launch, target)] == []


@pytest.mark.parametrize("case", ["llama-1b-bf16", "llama-8b-bf16-full"])
def test_hip(case: str) -> None:
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 5):
        pytest.skip(f"triton {triton.__version__} brings no linker for HIP")
    for launch in report.launches(*CASES[case]):
        compiled = report.compile_for(launch, report.HIP)
        assert compiled.metadata.shared <= 64 * 1024, launch.name
        assert "gfx942" in compiled.asm["amdgcn"]


def test_a_spill_is_seen() -> None:
    """The check can fail: a launch with few registers allowed spills."""
    launch = next(
        one for one in report.launches(*CASES["llama-1b-fp32"]) if one.kernel.__name__ == "verify_attention_kernel"
    )
    starved = report.Launch(launch.kernel, launch.arguments, {**launch.options, "maxnreg": 24})
    assert any("spilled" in flaw for flaw in flaws(starved, "sm_80"))
