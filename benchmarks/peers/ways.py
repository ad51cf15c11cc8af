"""What is compared: each way of decoding, by the engine that does it and its settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .models import Forms

OURS = "layerskip"
LOOKUP = 8  # tokens that the peers' prompt lookup drafts


@dataclass(frozen=True)
class Task:
    """Prompts, and the model that was trained for early exit on such: E and K are those that serve it best."""

    prompts: str
    model: str
    exit_layer: int
    num_speculations: int


TASKS = {
    "parsing": Task("parsing:test", "smollm2-layerskip", 4, 8),
    "coding": Task("coding:humaneval", "smollm2-layerskip-coding", 2, 3),
    "summarization": Task("summarization:test", "smollm2-layerskip-summarization", 2, 2),
}


@dataclass(frozen=True)
class Way:
    """A way of decoding. ``plain`` ones draft nothing; the weights' format is that of the engine's own name."""

    engine: str
    name: str
    weights: str
    settings: dict[str, Any] = field(default_factory=dict)
    plain: bool = False

    def __str__(self) -> str:
        return f"{self.engine} {self.weights}, {self.name}"

    @property
    def is_baseline(self) -> bool:
        """Whether the others are compared with it."""
        return self.engine == OURS and self.plain and self.weights == "bf16"


def ways(task: Task, engines: Sequence[str], forms: Forms, threads: int, length: int) -> Iterator[Way]:
    """The ways of some engines for one task; the baseline is the first."""
    yield from _ours(task, threads, length)
    if "transformers" in engines:
        yield from _transformers(task, {"model": str(forms.directory()), "threads": threads})
    if "llama.cpp" in engines:
        for kind in ("bf16", "q8_0", "q4_0", "q4_1"):
            llama = {"model": str(forms.gguf(kind)), "threads": threads, "length": length}
            yield Way("llama.cpp", "generate", kind, llama, plain=True)
            yield Way("llama.cpp", "prompt lookup", kind, {**llama, "lookup": LOOKUP})
    if "openvino" in engines:
        for kind in ("q8_0", "q4_0"):
            vino = {"model": str(forms.gguf(kind)), "threads": threads}
            yield Way("openvino", "generate", kind, vino, plain=True)
            yield Way("openvino", "prompt lookup", kind, {**vino, "lookup": LOOKUP})


def _ours(task: Task, threads: int, length: int) -> Iterator[Way]:
    ours = {"model": task.model, "threads": threads, "max_seq_len": length}
    drafts = {
        "exit_layer": task.exit_layer, "num_speculations": task.num_speculations, "draft_head": task.model,
        "strategy": "self_speculative",
    }  # fmt: skip
    for weights in ("bf16", "int8", "int4"):
        own = {**ours, "weights": None if weights == "bf16" else weights}
        yield Way(OURS, "autoregressive", weights, {**own, "strategy": "autoregressive"}, plain=True)
        yield Way(OURS, "self-speculative", weights, {**own, **drafts})
        free = {**own, **drafts, "draft_source": "auto", "num_speculations": "auto"}
        yield Way(OURS, "self-speculative, n-grams or the exit", weights, free)


def _transformers(task: Task, common: dict[str, Any]) -> Iterator[Way]:
    yield Way("transformers", "generate", "bf16", common, plain=True)
    yield Way("transformers", "static cache, torch.compile", "bf16", {**common, "compiled": True}, plain=True)
    exits = {"assistant_early_exit": task.exit_layer, "num_assistant_tokens": task.num_speculations}
    yield Way("transformers", "assistant_early_exit", "bf16", {**common, **exits})
    yield Way("transformers", "prompt_lookup_num_tokens", "bf16", {**common, "prompt_lookup_num_tokens": LOOKUP})
