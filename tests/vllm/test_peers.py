"""vLLM as the benchmark of peers drives it."""

from __future__ import annotations

from benchmarks.peers.worker import Vllm

from .engines import engine, generate
from .models import prompts


def test_its_tokens_in_the_groups_in_which_they_arrive(model):
    (text,) = prompts(1)
    plain = Vllm(str(model), threads=1, length=128, enforce_eager=True)
    answer = plain.decode(text, 12)
    with engine(model, dtype="bfloat16") as llm:
        assert answer["tokens"] == generate(llm, [text], 12)[0]
    assert answer["first_tokens"] == 1
    assert plain.decode(text, 12)["tokens"] == answer["tokens"]
