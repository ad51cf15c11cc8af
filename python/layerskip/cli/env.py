"""Show versions, devices, and which backend serves each op and why the others do not."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import layerskip_kernels
from layerskip_kernels import _extension, dispatch

from .. import devices, registry
from ..models.architectures import supported_architectures
from ..models.weight_arena import HUGE, WeightArena
from . import options
from .rendering import table

PACKAGES = (
    "layerskip-kernels", registry.PACKAGE, "torch", "transformers", "triton", "safetensors", "accelerate", "peft",
)  # fmt: skip


def example_arguments(device: str) -> dict[str, tuple[Any, ...]]:
    """The smallest call of every op: one row, D = 8, one head of size 8."""
    row, weight, square = (torch.ones(*shape, device=device) for shape in ((1, 8), (8,), (8, 8)))
    heads, cache = torch.ones(1, 1, 1, 8, device=device), torch.zeros(1, 1, 2, 8, device=device)
    cos, sin = torch.ones(2, 4, device=device), torch.zeros(2, 4, device=device)
    lengths = torch.zeros(1, dtype=torch.int64, device=device)
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    layer = [weight, square, square, square, square, weight, square, square, square]
    return {
        "rms_norm": (row, weight, 1e-5),
        "linear": (row, square, None, None),
        "swiglu": (row, square, square),
        "rope_kv_append": (heads, heads, heads, cos, sin, cache, cache.clone(), lengths),
        "verify_attention": (heads, cache, cache, lengths),
        "exit_head": (row, weight, square, 1e-5, None, None),
        "partial_forward": (row[None], layer, cache[None], cache[None].clone(), cos, sin, lengths, 0, 1, 1e-5),
        "draft": (
            tokens[0, :1], square, layer, cache[None], cache[None].clone(), cos, sin, lengths, 1, weight, square, 1e-5,
            1, True, None, None,
        ),
        "accept_greedy": (tokens[:, :1], tokens, lengths.clone()),
        "accept_sampled": (tokens[:, :1], row[None], row[None].expand(1, 2, 8), lengths.clone(), weight[:1], lengths),
        "speculative_round": (
            tokens[0, :1], square, layer, cache[None], cache[None].clone(), cos, sin, lengths.clone(), 1, weight,
            square, 1e-5, 1,
        ),
        "early_exit_loss": (row[None], weight, square, tokens[0, :1], torch.ones(1, device=device), 1e-5, -100),
    }  # fmt: skip


def _pages() -> str:
    """The page size that the kernel gives to an arena of weights."""
    arena = WeightArena(2 * HUGE)
    arena.take(torch.ones(2 * HUGE, dtype=torch.uint8))
    if arena.huge_bytes() == 2 * HUGE:
        return "huge pages of 2 MiB"
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    reason = setting.read_text().strip() if setting.is_file() else "not a Linux with transparent huge pages"
    return f"pages of 4 KiB; the kernel gives no huge pages ({reason})"


def _facts() -> Table:
    facts = Table(show_header=False, box=None)
    facts.add_row("python", platform.python_version())
    for package in PACKAGES:
        found = options.version(package)
        where = f": {registry.WHERE}" if package == registry.PACKAGE and found == "not installed" else ""
        facts.add_row(package, found + where)
    instructions = f"{torch.get_num_threads()} threads, instruction set: {options.instructions()}"
    facts.add_row("cpu", f"{platform.machine()}, {instructions}")
    facts.add_row("weights in", _pages())
    facts.add_row("cuda library", _extension.cuda_reason or "loaded")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts.add_row("GPUs", ", ".join(gpus) or "none")
    facts.add_row("--device auto", devices.described(devices.find("auto")))
    facts.add_row("architectures", escape(", ".join(supported_architectures())))
    for what, group in (("models", registry.MODELS), ("tasks", registry.TASKS)):
        facts.add_row(f"{what} by name", ", ".join(registry.names(group)) or "none")
    return facts


def _backends(device: str) -> Table:
    """Which are available; whether one serves an op also depends on its arguments, see `_ops`."""
    arguments = example_arguments(device)["rms_norm"]
    states = ((name, dispatch.reason_against("rms_norm", name, arguments) or "ready") for name in dispatch.BACKENDS)
    return table(f"backends for {device} tensors", ("backend", "state"), ((name, escape(one)) for name, one in states))


def _ops(device: str) -> Table:
    rows = []
    for op, args in example_arguments(device).items():
        try:
            explanation = layerskip_kernels.explain(op, *args)
            served, skipped = explanation.backend, explanation.skipped
        except layerskip_kernels.BackendError as error:
            served, skipped = "none", {"all": str(error)}
        rows.append((op, served, escape("; ".join(f"{name}: {reason}" for name, reason in skipped.items()))))
    return table(f"ops on {device} tensors", ("op", "served by", "why not the others"), rows)


def run(args: argparse.Namespace, console: Console) -> int:
    """Print the tables."""
    console.print(_facts())
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        console.print(_backends(device))
        console.print(_ops(device))
    return 0
