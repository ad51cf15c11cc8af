"""The adapters that come with the package draft well in their own tasks, and change no token."""

from __future__ import annotations

import pytest
import torch

from layerskip import DraftHead, SelfSpeculativeDecoder, load
from layerskip.cli.arguments import read_prompts
from layerskip_kernels.formats import dequantize
from tests.example_package import PACKAGE, requires_weights

models = pytest.importorskip("layerskip_smollm2.models", reason=f"needs {PACKAGE}")
demo = pytest.importorskip("layerskip_smollm2.demo")

# Exit layer, draft tokens a round, prompts, and tokens a round, at least; the stock model gives 1.0 to 1.1.
ADAPTERS = {
    "smollm2-layerskip": (4, 8, "commands", 3.0),
    "smollm2-layerskip-summarization": (2, 2, "abstracts", 1.2),
    "smollm2-layerskip-coding": (2, 3, "functions", 1.2),
}

pytestmark = [pytest.mark.slow, pytest.mark.time_limit(7200), requires_weights]


def test_every_adapter_is_tested_and_the_demo_begins_with_the_stock_model():
    assert set(models.ADAPTERS) == set(ADAPTERS)
    first, *_, last = demo.EXHIBITS
    assert (first.model, first.exit_layer, first.num_speculations, first.exit) == (models.STOCK, None, None, "auto")
    assert [exhibit.counterexample for exhibit in demo.EXHIBITS] == [False] * (len(demo.EXHIBITS) - 1) + [True]
    assert last.model == models.STOCK


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_in_its_task(name):
    exit_layer, num_speculations, prompts, tokens_a_round = ADAPTERS[name]
    head = DraftHead.load(name)
    decoder = SelfSpeculativeDecoder.from_pretrained(
        name, exit_layer=exit_layer, num_speculations=num_speculations, draft_head=head
    )
    rounds = tokens = 0
    for prompt in read_prompts(str(demo.PROMPTS / f"{prompts}.jsonl")):
        ids = decoder.tokenizer(prompt.text, return_tensors="pt").input_ids
        plain = decoder.generate(ids, 48, strategy="autoregressive")
        out = decoder.generate(ids, 48)
        assert out.sequences.tolist() == plain.sequences.tolist()
        rounds, tokens = rounds + out.stats.rounds, tokens + out.stats.new_tokens - 1
    assert tokens / rounds >= tokens_a_round


def test_an_adapter_is_merged_before_the_weights_are_packed():
    """The packed weight is the merged one's, which is farther from the stock one's than packing takes it."""
    packed, _ = load("smollm2-layerskip", torch.float32, weights="int8")
    merged, stock = load("smollm2-layerskip", torch.float32)[0], load("smollm2", torch.float32)[0]
    assert packed.weights == "int8"
    found = dequantize(packed.decoder.layer(4).o, 576)
    errors = [
        float((found - model.model.layers[4].self_attn.o_proj.weight.detach()).norm() / found.norm())
        for model in (merged, stock)
    ]
    assert errors[0] < 0.006
    assert errors[1] > 2 * errors[0]


def test_what_is_merged_has_no_native_file():
    with pytest.raises(
        ValueError, match="smollm2-layerskip comes in no file of quantized weights; weights may be int8"
    ):
        load("smollm2-layerskip", weights="native")


def test_a_packed_model_in_its_task():
    decoder = SelfSpeculativeDecoder.from_pretrained(
        "smollm2-layerskip", weights="int8", exit_layer=4, num_speculations=8
    )
    ids = decoder.tokenizer("Command: turn on the hall light\nParse:", return_tensors="pt").input_ids
    plain = decoder.generate(ids, 48, strategy="autoregressive")
    out = decoder.generate(ids, 48)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert "[IN:HassTurnOn" in decoder.tokenizer.decode(out.new_tokens[0])
    assert out.stats.new_tokens / out.stats.rounds >= 2
