"""What the compiler makes of every launch, without a GPU: ``python -m tools.triton_report``.

The launchers run on meta tensors of real shapes while `JITFunction.run` only records, so what is compiled here is what
a GPU would be given.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from layerskip_kernels.formats import FORMATS
from layerskip_kernels.schemas import REQUIRED_WEIGHTS, KVCache, LayerWeights, derive, flatten, layer_shapes
from layerskip_kernels.triton import (
    _launch,
    accept_greedy,
    accept_sampled,
    draft,
    early_exit_loss,
    exit_head,
    linear,
    partial_forward,
)
from layerskip_kernels.triton._launch import PDL_COMPILES

from .sass import tool

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
HIP = GPUTarget("hip", "gfx942", 64)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have, CUDA guide, table 30
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.int32: "i32",
    torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip
TILES = ("ROWS", "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_T", "SPLITS", "num_warps", "num_stages")
HEAD = """# Triton kernels: what the compiler reports

Written by `make triton-report`, which compiles every launch for each target and needs no GPU.

"""
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name, and the compiler's options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Kernel, dtype of its first tensor, and tile."""
        first = next(arg for arg in self.arguments.values() if isinstance(arg, Tensor))
        head = self.arguments.get("head_ptr")
        kind = f"{TYPES[first.dtype]}" + (" int8 head" if head is not None and head.dtype == torch.int8 else "")
        kind += f" int{self.arguments['BITS']}" if "BITS" in self.arguments else ""
        kind += f" groups={32 * self.arguments['BLOCKS']}" if "BLOCKS" in self.arguments else ""
        kind += " zero" if self.arguments.get("HAS_ZERO") else ""
        kind += " transposed" if self.arguments.get("a_row") == 1 else ""
        kind += " sampling" if self.arguments.get("SAMPLES") else ""
        kind += " logits" if self.arguments.get("HAS_LOGITS") else ""
        known = {**self.arguments, **self.options}
        tile = [f"{name.lower()}={known[name]}" for name in TILES if name in known]
        return f"{self.kernel.__name__.removesuffix('_kernel')} ({', '.join([kind, *tile])})"


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes of shared memory, bytes of stack and local memory."""

    registers: int
    shared: int
    spilled: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block no kernel runs; the list that it yields collects the launches."""
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        launches.append(Launch(self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}, options))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def _source(launch: Launch) -> ASTSource:
    """Types, constants and divisibility as the just-in-time path derives them from the arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        special = not param.do_not_specialize
        if param.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[param.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[param.name] = f"*{TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    """The compiled kernel (``asm``, ``metadata``), with programmatic dependent launch from sm_90 on."""
    dependent = PDL_COMPILES and target.backend == "cuda" and target.arch >= 90
    source = _source(replace(launch, arguments={**launch.arguments, "PDL": dependent}))
    return triton.compile(
        source, target=target, options={**launch.options, **({"launch_pdl": True} if dependent else {})}
    )


def resources(compiled: Any) -> Resources:
    """Read from the cubin with cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool("cuobjdump")), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(found["REG"], compiled.metadata.shared, found["STACK"] + found["LOCAL"])


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    hidden: int
    features: int
    heads: int
    groups: int
    size: int
    vocabulary: int


LLAMA_1B = Shape(2048, 8192, 32, 8, 64, 128256)
LLAMA_8B = Shape(4096, 14336, 32, 8, 128, 128256)
ODD = Shape(328, 904, 6, 2, 40, 1009)  # nothing is a power of two


def _layer(shape: Shape, dtype: torch.dtype, full: bool) -> list[Tensor]:
    shapes = layer_shapes(shape.hidden, shape.heads, shape.groups, shape.size, shape.features)
    names = LayerWeights._fields if full else REQUIRED_WEIGHTS
    return [torch.empty(shapes[name], dtype=dtype, device="meta") for name in names]


def _loss_launches(hiddens: Tensor, head: Tensor) -> None:
    exits, rows, width = hiddens.shape
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    grad, weights = (torch.empty(size, device="meta") for size in ((), (exits,)))
    inputs = (hiddens, head.new_empty(width), head, labels, weights)
    _, _, lse, slope = early_exit_loss.early_exit_loss(*inputs)
    early_exit_loss.early_exit_loss_backward(grad, *inputs, lse, slope, 1e-5, -100, True)


def _sampling_launches(hidden: Tensor, norm: Tensor, head: Tensor, extra: tuple[Tensor, ...], vocabulary: int) -> None:
    """A draft's head with noise, the verifying head's logits, and acceptance, of two sequences."""
    batch, rows = 2, hidden.shape[0] // 2
    temperature, seed = (torch.empty(len(hidden), dtype=kind, device="meta") for kind in (torch.float32, torch.int64))
    logits = [torch.empty(len(hidden), size, device="meta") for size in (head.shape[0], vocabulary)]
    token_map, scale = extra or (None, None)
    exit_head.exit_head(hidden, norm, head, 1e-5, token_map, scale, temperature, seed, seed, logits[0])
    exit_head.exit_head(hidden, norm, norm.new_empty(vocabulary, norm.shape[0]), 1e-5, logits=logits[1])
    drafts = torch.empty(batch, rows - 1, dtype=torch.int64, device="meta")
    scores = [one.view(batch, rows, -1) for one in logits]
    accept_sampled.accept_sampled(
        drafts, scores[0][:, 1:], scores[1], seed[:batch], temperature[:batch], seed[:batch], token_map
    )


def launches(shape: Shape, dtype: torch.dtype, full: bool = False) -> list[Launch]:
    """Every launch of a draft step of ``shape``, one of each kernel, and of the other ops.

    Parameters
    ----------
    shape : Shape
    dtype : torch.dtype
    full : bool
        With biases and norms of q and k, cache slots, and for drafts an int8 head of part of the vocabulary.
    """

    def empty(*sizes: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=kind, device="meta")

    batch, rows, capacity = 2, 7, 4096
    lengths = empty(batch, kind=torch.int64)
    cache = [empty(1, batch + full, shape.groups, capacity, shape.size) for _ in range(2)]
    angles = [empty(capacity, shape.size // 2, kind=torch.float32) for _ in range(2)]
    draft_vocab_size = shape.vocabulary // 2 if full else shape.vocabulary
    head = empty(draft_vocab_size, shape.hidden, kind=torch.int8 if full else dtype)
    extra = (empty(draft_vocab_size, kind=torch.int64), empty(draft_vocab_size, kind=torch.float32)) if full else ()
    drafts, target = empty(batch, rows - 1, kind=torch.int64), empty(batch, rows, kind=torch.int64)
    with recorded() as found:
        hidden, weights = empty(batch, rows, shape.hidden), _layer(shape, dtype, full)
        slots = lengths if full else None
        places = KVCache(cache[0], cache[1], angles[0], angles[1], lengths, slots)
        layers = flatten("partial_forward", places, hidden=hidden, weights=weights, start=0, end=1, eps=1e-5)
        partial_forward.partial_forward(*layers)
        hidden, norm = hidden.view(-1, shape.hidden), empty(shape.hidden)
        embedding = empty(shape.vocabulary, shape.hidden)
        draft.draft(*derive(
            "draft", layers, token=lengths, embedding=embedding, exit_layer=1, norm_weight=norm, head_weight=embedding,
            num_speculations=1, extend=False,
        ))  # fmt: skip
        exit_head.exit_head(hidden, norm, head, 1e-5, *extra)
        _sampling_launches(hidden, norm, head, extra, shape.vocabulary)
        accept_greedy.accept_greedy(drafts, target, lengths)
        _loss_launches(empty(3, 2048, shape.hidden), empty(shape.vocabulary, shape.hidden))
    return list({launch.name: launch for launch in found}.values())


def packed_launches(shape: Shape, dtype: torch.dtype) -> list[Launch]:
    """Those of `linear` and `swiglu` with packed weights, in every format that is served."""
    x = torch.empty(7, shape.hidden, dtype=dtype, device="meta")
    with recorded() as found:
        for form in FORMATS.values():
            if not form.is_float:
                size = (shape.features, form.row_bytes(shape.hidden))
                weight = torch.empty(size, dtype=torch.uint8, device="meta")
                linear.linear(x, weight, x.new_empty(shape.features), x.new_empty(7, shape.features))
                linear.swiglu(x, weight, weight)
    return found


def tuned(launch: Launch) -> list[Launch]:
    """A launch in every configuration of the tuning space; itself where there is nothing to tune."""
    if "BLOCK_N" not in launch.arguments:
        return [launch]
    return [
        replace(
            launch,
            arguments={**launch.arguments, "BLOCK_N": config.block_n},
            options={**launch.options, "num_warps": config.num_warps, "num_stages": config.num_stages},
        )
        for config in _launch.SPACE
    ]


def table(found: list[Launch], targets: dict[str, GPUTarget]) -> str:
    """The launches and what they take on every target, as Markdown."""
    lines = [f"| kernel | {' | '.join(targets)} |", "|---|" + "---|" * len(targets)]
    for launch in found:
        cells = []
        for target in targets.values():
            used = resources(compile_for(launch, target))
            cells.append(f"{used.registers} / {used.shared / 1024:.1f} / {used.spilled}")
        lines.append(f"| {launch.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(expand: Callable[[Launch], list[Launch]] = lambda launch: [launch]) -> str:
    """The tables of a few shapes and dtypes."""
    parts = [f"triton {triton.__version__}; registers / KiB of shared memory / bytes spilled.\n"]
    for title, shape, dtype, full in (
        ("Llama-3.2-1B, bf16", LLAMA_1B, torch.bfloat16, False),
        ("Llama-3-8B, bf16, with biases, norms of q and k, cache slots, an int8 head", LLAMA_8B, torch.bfloat16, True),
        ("Llama-3.2-1B, fp32", LLAMA_1B, torch.float32, False),
    ):
        found = [one for launch in launches(shape, dtype, full) for one in expand(launch)]
        parts.append(f"### {title}\n\n{table(found, TARGETS)}\n")
    packed = [one for launch in packed_launches(LLAMA_1B, torch.bfloat16) for one in expand(launch)]
    parts.append(f"### Llama-3.2-1B, packed weights, bf16\n\n{table(packed, TARGETS)}\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Print registers, shared memory and spills of every launch, or write them to a page."""
    parser = argparse.ArgumentParser(prog="python -m tools.triton_report", description=main.__doc__)
    parser.add_argument("--space", action="store_true", help="every configuration of the tuning space")
    parser.add_argument("--output", type=Path, help="a Markdown file to write")
    args = parser.parse_args(argv)
    text = report(tuned) if args.space else report()
    if args.output is None:
        print(text)
        return
    args.output.write_text(f"{HEAD}{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
