"""The clock around the ops, and the time of a round outside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import layerskip_kernels
from layerskip import SelfSpeculativeDecoder
from tools.op_clock import op_clock, outside_ops


def tiny() -> Any:
    transformers = pytest.importorskip("transformers", reason="the model is one of transformers'")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_the_op_clock_counts_and_takes_itself_off() -> None:
    table = {op: dict(backends) for op, backends in layerskip_kernels.dispatch._table.items()}
    x, weight = torch.ones(1, 8), torch.ones(8)
    with op_clock() as clock:
        layerskip_kernels.rms_norm(x, weight, 1e-5)
        once = clock.seconds
        layerskip_kernels.rms_norm(x, weight, 1e-5)
    assert 0 < once < clock.seconds
    assert layerskip_kernels.dispatch._table == table


def test_some_of_a_round_is_outside_the_ops() -> None:
    decoder = SelfSpeculativeDecoder(tiny(), exit_layer=1, num_speculations=2)
    found = outside_ops(decoder, torch.ones(1, 4, dtype=torch.int64), 12)
    assert 0 < found["fraction"] < 1
    assert found["seconds_per_round"] > 0
