"""Engines of vLLM in this process, and what their schedulers saw."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm", reason="these tests have an environment of their own: make test-vllm")

GREEDY = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
MEMORY = 48 << 20
"""Bytes for keys and values."""


@dataclasses.dataclass
class Drafts:
    """Counts of an engine's scheduler."""

    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Of the drafts, how many were accepted."""
        return self.accepted / self.drafted


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """An `LLM` whose core, worker and model live in this process; ``drafts`` of it counts."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "seed": 0,
        "enforce_eager": True,
        "kv_cache_memory_bytes": MEMORY,
        "disable_log_stats": False,
        "distributed_executor_backend": "uni",
    }
    llm = vllm.LLM(str(model), **{**defaults, **options})
    llm.drafts = _watch(core(llm).scheduler)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def core(llm: Any) -> Any:
    """The engine's core."""
    return llm.llm_engine.engine_core.engine_core


def runner(llm: Any) -> Any:
    """The worker's model runner, which has the model and the drafter."""
    return core(llm).model_executor.driver_worker.worker.model_runner


def cache_blocks(llm: Any) -> int:
    return core(llm).scheduler.kv_cache_config.num_blocks


def generate(llm: Any, texts: list[list[int]], tokens: int = 32, **sampling: Any) -> list[list[int]]:
    """New token ids for token ids."""
    params = vllm.SamplingParams(**{**GREEDY, "max_tokens": tokens, **sampling})
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _watch(scheduler: Any) -> Drafts:
    seen, plain = Drafts(), scheduler.make_spec_decoding_stats

    def count(*args: Any, num_draft_tokens: int, num_accepted_tokens: int, **kwargs: Any) -> Any:
        seen.drafted += num_draft_tokens
        seen.accepted += num_accepted_tokens
        return plain(*args, num_draft_tokens=num_draft_tokens, num_accepted_tokens=num_accepted_tokens, **kwargs)

    scheduler.make_spec_decoding_stats = count
    return seen
