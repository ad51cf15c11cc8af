"""What a measurement depends on besides its settings: the machine and the versions."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

import layerskip_kernels

from .. import devices

_MEASURED = ("layerskip-kernels", "torch", "transformers", "triton")


def facts(device: torch.device) -> dict[str, str]:
    """By name, in words, with the time."""
    return {
        "processor": processor(),
        "instruction set": instructions(),
        "device": devices.described(device),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in _MEASURED},
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def version(package: str) -> str:
    """The version of an installed package, or that it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def instructions() -> str:
    """The instruction set that the native kernels use, or why there are none."""
    try:
        return layerskip_kernels.cpu_isa()
    except RuntimeError as error:
        return str(error)


def processor() -> str:
    """Its name, where Linux or Python knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
