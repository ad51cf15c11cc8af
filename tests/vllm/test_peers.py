"""vLLM as the benchmark of peers drives it."""

from __future__ import annotations

from benchmarks.peers.worker import Vllm

from .engines import engine, generate
from .models import prompts


def test_its_tokens_in_the_groups_in_which_they_arrive(model):
    (text,) = prompts(1)
    with engine(model, dtype="bfloat16") as llm:
        (expected,) = generate(llm, [text], 12)
    peer = Vllm(str(model), threads=1, length=128, enforce_eager=True)
    for _ in range(2):
        answer = peer.decode(text, 12)
        assert answer["tokens"] == expected
        assert answer["first_tokens"] == 1
    peer._engine.engine_core.shutdown()
