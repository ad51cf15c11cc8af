"""What is compared: each way of decoding, by the engine that does it and its settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerskip import registry

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
    yield from _ours(task, forms, {"threads": threads, "max_seq_len": length})
    if "transformers" in engines:
        yield from _transformers(task, {"model": str(forms.directory()), "threads": threads})
    if "llama.cpp" in engines:
        yield from _llama(task, forms, {"threads": threads, "length": length})
    if "openvino" in engines:
        for kind in ("f16", "q8_0", "q4_0"):
            vino = {"model": str(forms.gguf(kind)), "threads": threads}
            yield Way("openvino", "generate", kind, vino, plain=True)
            yield Way("openvino", "prompt lookup", kind, {**vino, "lookup": LOOKUP})
    if "vllm" in engines:
        yield from _vllm(task, {"model": str(forms.directory()), "threads": threads, "length": length})


def _ours(task: Task, forms: Forms, common: dict[str, Any]) -> Iterator[Way]:
    drafts = {
        "exit_layer": task.exit_layer, "num_speculations": task.num_speculations, "draft_head": task.model,
        "strategy": "self_speculative",
    }  # fmt: skip
    for weights in ("bf16", "int8", "int4"):
        own = {**common, "model": str(forms.directory() if weights == "bf16" else forms.packed(weights))}
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


def _llama(task: Task, forms: Forms, common: dict[str, Any]) -> Iterator[Way]:
    for kind in ("bf16", "q8_0", "q4_0", "q4_1"):
        own = {**common, "model": str(forms.gguf(kind))}
        yield Way("llama.cpp", "generate", kind, own, plain=True)
        yield Way("llama.cpp", "prompt lookup", kind, {**own, "drafted": LOOKUP})
        first = {"draft": str(forms.gguf(kind, task.exit_layer)), "drafted": task.num_speculations}
        yield Way("llama.cpp", "first layers as draft model", kind, {**own, **first})


def _vllm(task: Task, common: dict[str, Any]) -> Iterator[Way]:
    yield Way("vllm", "generate", "bf16", common, plain=True)
    lookup = {"method": "ngram", "num_speculative_tokens": LOOKUP, "prompt_lookup_max": 3}
    yield Way("vllm", "n-gram speculation", "bf16", {**common, "speculative_config": lookup})
    exits = {
        "exit_layer": task.exit_layer, "num_speculations": task.num_speculations,
        "draft_head": str(registry.draft_head(task.model)),
    }  # fmt: skip
    ours = {"load_format": "layerskip", "model_loader_extra_config": exits}
    yield Way("vllm", "the layerskip plugin", "bf16", {**common, **ours})
