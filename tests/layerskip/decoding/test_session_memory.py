"""The memory of a session's cache: taken as sequences grow."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_model
from tiny import prompt_of

from layerskip import SelfSpeculativeDecoder, SharedKVCache

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS = 131_072


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_long_session_takes_memory_as_it_grows():
    decoder = SelfSpeculativeDecoder(tiny_model("llama2", max_position_embeddings=POSITIONS), 1, 4)
    decoder.open_session(1, max_seq_len=16).step()  # what is loaded when first used
    before = resident()
    session = decoder.open_session(8)
    cache = session._cache
    nominal = cache.k.nbytes + cache.v.nbytes
    assert nominal > 1_000_000_000
    tables = sum(table.nbytes for table in decoder.model.decoder.rope_tables)
    assert resident() - before < 3 * tables + 20_000_000
    session.add(prompt_of(200), 30, eos_token_id=[])
    while len(session):
        session.step()
    grown = resident() - before
    assert grown < 3 * tables + 40_000_000, (
        f"{grown / 1e6:.0f} MB of {nominal / 1e6:.0f} for 230 positions of one sequence"
    )


def test_a_cache_that_does_not_fit_names_its_size():
    with pytest.raises(MemoryError, match=r"8 sequences of 1000000000 positions take .* GB, .* smaller max_seq_len"):
        SharedKVCache(32, 8, 8, 10**9, 128, torch.bfloat16)
