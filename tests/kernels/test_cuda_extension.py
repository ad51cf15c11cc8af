"""Why the CUDA library doesn't serve: the reasons that `explain` gives, on machines that need not be there."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from layerskip_kernels import _extension
from layerskip_kernels._extension import CudaBuild, capability_reason, driver_reason

ALL = CudaBuild("80;90a;100a;compute_100", 13000, 13000)


@pytest.mark.parametrize(("toolkit", "driver"), [(13000, 13000), (13010, 13000), (12080, 13020)])
def test_a_driver_serves_every_toolkit_of_its_major_version_and_older(toolkit: int, driver: int) -> None:
    assert driver_reason(CudaBuild("80", toolkit, driver)) is None


def test_a_driver_that_is_too_old() -> None:
    reason = driver_reason(CudaBuild("80", 13000, 12080))
    assert reason == (
        "the NVIDIA driver serves CUDA 12.8, but the library was built with CUDA 13.0: update the driver, or rebuild "
        "with nvcc 12.x on PATH"
    )


def test_no_driver() -> None:
    assert driver_reason(CudaBuild("80", 13000, 0)) == "no NVIDIA driver was found"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0)])
def test_gpus_that_a_full_build_serves(capability: tuple[int, int]) -> None:
    assert capability_reason(ALL, capability, "cuda:0") is None


@pytest.mark.parametrize(
    ("archs", "capability"),
    [("80", (9, 0)), ("90a", (8, 0)), ("100a", (10, 3)), ("86", (8, 0)), ("compute_100", (9, 0)), ("90a", (10, 0)),
     ("compute_90a", (10, 0)), ("compute_100f", (12, 0)), ("80;90a", (12, 0))],
)  # fmt: skip
def test_gpus_that_a_narrow_build_does_not_serve(archs: str, capability: tuple[int, int]) -> None:
    number = "{}{}".format(*capability)
    assert capability_reason(CudaBuild(archs, 13000, 13000), capability, "cuda:1 (GPU)") == (
        f"cuda:1 (GPU) has compute capability {capability[0]}.{capability[1]}, but the library was built for {archs}: "
        f"rebuild with LAYERSKIP_CUDA_ARCHS={number}"
    )


def test_a_driver_compiles_no_ptx_of_a_newer_toolkit() -> None:
    build = CudaBuild("90a;compute_90", 13010, 13000)
    assert capability_reason(build, (9, 0), "cuda:0") is None
    reason = capability_reason(build, (12, 0), "cuda:0")
    assert reason is not None
    assert "rebuild with LAYERSKIP_CUDA_ARCHS=120" in reason


def test_a_gpu_that_is_too_old() -> None:
    assert capability_reason(ALL, (7, 5), "cuda:0 (T4)") == (
        "cuda:0 (T4) has compute capability 7.5, the CUDA kernels need 8.0"
    )


def test_the_table_asks_for_the_gpu_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_cuda_build", lambda: ALL)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index == 0 else (7, 0))
    _extension.device_reason.cache_clear()
    supports = _extension._supports_cuda
    with FakeTensorMode():
        new, old = (torch.empty(1, device=f"cuda:{index}") for index in range(2))
    assert supports(new) is None
    assert supports(old) == "cuda:1 (GPU 1) has compute capability 7.0, the CUDA kernels need 8.0"
    assert supports(torch.empty(1)) == "the tensors are on cpu"
    with FakeTensorMode():
        int8, int4 = (torch.empty(4, size, device="cuda:0", dtype=torch.uint8) for size in (34, 18))
    assert supports(new, int8) is supports(new, [int8] * 9) is None
    assert supports(new, [int8] * 3 + [int4] * 6) == "q, k and v of different formats are not served"
    assert supports(new, [int4] * 7 + [int8] * 2) == "gate and up of different formats are not served"
    _extension.device_reason.cache_clear()


def test_a_torch_without_cuda() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    assert _extension.cuda_reason == f"torch {torch.__version__} was built without CUDA"
