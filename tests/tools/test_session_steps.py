"""The clock of `tools.session_steps`."""

from __future__ import annotations

import itertools

import pytest

from layerskip import SelfSpeculativeDecoder
from tools import session_steps


def test_rounds_prompts_and_steps_go_by_one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="the model is one of transformers'")
    monkeypatch.setattr(session_steps, "STEPS", 3)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    decoder, ticks = SelfSpeculativeDecoder(transformers.LlamaForCausalLM(config).eval(), 1), itertools.count()

    def another() -> float:
        raise AssertionError("another clock was asked")

    decoder.clock = another
    quiet, busy, last = session_steps.measure(decoder, "autoregressive", 1, 8, "auto", lambda: float(next(ticks)))
    assert len(quiet) == 3
    assert all(seconds == int(seconds) > 0 for seconds in [*quiet, *busy])
    assert last > sum(busy)
