"""Heads that score the drafts: the model's own, in int8, of fewer tokens; all change nothing but the acceptance."""

from __future__ import annotations

import pytest
import torch

from layerskip import DraftHead

from .engines import engine, generate, runner
from .models import VOCABULARY, prompts, write_model

LENGTHS = (3, 17, 40, 7)


def options(head):
    return {"load_format": "layerskip", "model_loader_extra_config": {"exit_layer": 2, "draft_head": head}}


@pytest.fixture(scope="module")
def expected(model):
    with engine(model) as llm:
        return generate(llm, prompts(*LENGTHS))


@pytest.fixture(scope="module")
def acceptance_of_vllm(model, expected):
    with engine(model, **options("vllm")) as llm:
        assert generate(llm, prompts(*LENGTHS)) == expected
        return llm.drafts.acceptance


def test_our_kernel_drafts_what_vllm_drafts(model, expected, acceptance_of_vllm):
    with engine(model, **options("full")) as llm:
        assert generate(llm, prompts(*LENGTHS)) == expected
        assert llm.drafts.acceptance == acceptance_of_vllm


def test_int8(model, expected, acceptance_of_vllm):
    with engine(model, **options("int8")) as llm:
        assert generate(llm, prompts(*LENGTHS)) == expected
        assert llm.drafts.acceptance > 0.8 * acceptance_of_vllm


def test_a_saved_head_drafts_its_tokens_only(model, expected, tmp_path):
    chosen = sorted({token for tokens in expected for token in tokens[::2]})
    DraftHead(chosen, VOCABULARY).save(tmp_path)
    with engine(model, **options(str(tmp_path))) as llm:
        drafted, draft = [], runner(llm).drafter.model
        plain = draft._head.forward
        draft._head.forward = lambda hidden: drafted.append(plain(hidden)) or drafted[-1]
        assert generate(llm, prompts(*LENGTHS)) == expected
        assert set(torch.cat(drafted).tolist()) <= set(chosen)
        assert llm.drafts.accepted > 0


def test_the_padding_of_the_vocabulary_is_never_drafted(tmp_path):
    """All logits are negative, so the rows of zeros that vLLM adds would win."""
    write_model(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = -weights["lm_head.weight"].abs()
    weights["model.norm.weight"] = weights["model.norm.weight"].abs()
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].abs() * 100  # states stay positive
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with engine(tmp_path, **options("full")) as llm:
        drafted, draft = [], runner(llm).drafter.model
        plain = draft._head.forward
        draft._head.forward = lambda hidden: drafted.append(plain(hidden)) or drafted[-1]
        generate(llm, prompts(5), tokens=8)
        assert drafted
        assert int(torch.cat(drafted).max()) < VOCABULARY


def test_a_head_of_another_vocabulary_is_refused(model, tmp_path):
    DraftHead([1, 2], 7).save(tmp_path)
    with (
        pytest.raises(ValueError, match=r"is for a vocabulary of 7, the model has 300"),
        engine(model, **options(str(tmp_path))),
    ):
        pass
