"""On a GPU, in both of vLLM's model runners. Never yet run: no GPU has been at hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from .engines import engine, generate
from .models import copied, prompts, write_model
from .test_sampling import LIMIT, SAMPLES, TEMPERATURE, TOKENS, TOP_K, chi_square, exact

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LENGTHS = (3, 17, 40, 100, 7, 9, 64, 200)
OURS = {"load_format": "layerskip", "model_loader_extra_config": {"exit_layer": 2}}


@pytest.fixture(params=["0", "1"], ids=["runner V1", "runner V2"], autouse=True)
def model_runner(request, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", request.param)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_greedy_tokens_are_those_without_speculation(model, eager):
    with engine(model, enforce_eager=eager) as llm:
        expected = generate(llm, prompts(*LENGTHS))
    with engine(model, enforce_eager=eager, **OURS) as llm:
        assert generate(llm, prompts(*LENGTHS)) == expected
        assert llm.drafts.acceptance > 0.2


def test_blocks_that_are_the_next_layers_draft_rightly(tmp_path):
    write_model(tmp_path, upper=1.0)
    with engine(tmp_path) as llm:
        expected = generate(llm, prompts(*LENGTHS))
    with engine(tmp_path, **copied(tmp_path)) as llm:
        assert generate(llm, prompts(*LENGTHS)) == expected
        assert llm.drafts.acceptance > 0.9


def test_sampling_has_the_models_distribution(model):
    (prompt,) = prompts(6)
    expected = exact(model, prompt)
    with engine(model, max_num_seqs=64, **OURS) as llm:
        texts = generate(llm, [prompt] * SAMPLES, tokens=TOKENS, temperature=TEMPERATURE, top_k=TOP_K)
        assert llm.drafts.accepted > SAMPLES / 10
    drawn = Counter(map(tuple, texts))
    assert set(drawn) <= set(expected)
    assert chi_square(drawn, expected) < LIMIT
