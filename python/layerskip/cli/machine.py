"""What every measurement says of itself: the model and how it was run, the machine and the versions."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import layerskip_kernels

from .. import devices
from ..models import LayerSkipModel

_MEASURED = ("layerskip-kernels", "torch", "transformers", "triton")


def settings(args: argparse.Namespace, model: LayerSkipModel) -> dict[str, Any]:
    """Of the model, and where it ran."""
    return {
        "model": str(args.model),
        "dtype": args.dtype,
        "weights": model.weights,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "layers": model.num_layers,
    }


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
