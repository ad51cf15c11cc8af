"""The drafts of a head that is spread over ranks are those of the whole head, whatever part of it each rank scores."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from layerskip import DraftHead, EarlyExitHead, Exit

from . import engines  # noqa: F401  skips where there is no vLLM

VOCABULARY, FIRST, WIDTH = 301, 160, 64  # ranks of 160 and of 141 tokens, the second padded to 160 as vLLM does


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    norm = 1 + 0.3 * torch.randn(WIDTH, generator=generator)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator)
    head[FIRST + 3] = head[7]  # equal logits on both ranks
    return norm, head


def shards(weights, draft_head, exit=None):
    """The heads of two ranks, without the processes."""
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    from layerskip.vllm.head import make_head

    norm, head = weights
    found = []
    for first, rows in ((0, head[:FIRST]), (FIRST, head[FIRST:])):
        padded = torch.cat([rows, torch.zeros(FIRST - len(rows), WIDTH)])
        lm_head = SimpleNamespace(
            weight=padded,
            tp_size=2,
            shard_indices=SimpleNamespace(org_vocab_start_index=first, num_org_elements=len(rows)),
            quant_method=UnquantizedEmbeddingMethod(),
        )
        model = SimpleNamespace(norm=SimpleNamespace(weight=norm, variance_epsilon=1e-5))
        target = SimpleNamespace(lm_head=lm_head, model=model, config=SimpleNamespace(vocab_size=VOCABULARY))
        found.append(make_head(target, model.norm, draft_head, exit))
    return found


def drafted(heads, hidden, monkeypatch):
    """Tokens that each of the ranks drafts; the exchange is a concatenation."""
    said = []
    monkeypatch.setattr("layerskip.vllm.head.tensor_model_parallel_all_gather", lambda best, dim: said.append(best) or
                        torch.cat([best, best], dim))  # fmt: skip
    for head in heads:
        head(hidden)
    monkeypatch.setattr("layerskip.vllm.head.tensor_model_parallel_all_gather", lambda best, dim: torch.cat(said, dim))
    return [head(hidden) for head in heads]


def states(*tokens, weights):
    """Random states, and some that point at tokens."""
    generator = torch.Generator().manual_seed(1)
    norm, head = weights
    return torch.cat([torch.randn(40, WIDTH, generator=generator), head[list(tokens)] / norm])


@pytest.mark.parametrize("draft_head", ["full", "int8"])
def test_two_ranks_draft_what_one_drafts(draft_head, weights, monkeypatch):
    hidden = states(0, 7, FIRST - 1, FIRST, VOCABULARY - 1, weights=weights)
    norm, head = weights
    whole = EarlyExitHead(norm, head, 1e-5)
    expected = (whole.quantize() if draft_head == "int8" else whole)(hidden).token
    first, second = drafted(shards(weights, draft_head), hidden, monkeypatch)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert {bool(token < FIRST) for token in expected} == {True, False}
    assert expected[-4] == 7  # of equal logits the first


@pytest.mark.parametrize(
    "chosen",
    [[5, 9, 100, FIRST - 1, FIRST, 200, VOCABULARY - 1], [3, 4], [FIRST, 299]],
    ids=["both", "first", "second"],
)
def test_a_reduced_head_may_leave_a_rank_without_tokens(chosen, weights, monkeypatch, tmp_path):
    DraftHead(chosen, VOCABULARY).save(tmp_path)
    hidden = states(*chosen, weights=weights)
    norm, head = weights
    expected = EarlyExitHead(norm, head, 1e-5).quantize(torch.tensor(chosen))(hidden).token
    first, second = drafted(shards(weights, str(tmp_path)), hidden, monkeypatch)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert set(expected.tolist()) == set(chosen)


@pytest.mark.parametrize("chosen", [None, [5, 9, FIRST, 200]], ids=["all", "some"])
def test_the_rows_that_an_exit_names_and_corrects(chosen, weights, monkeypatch):
    norm, head = weights
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(3, WIDTH, generator=generator) * 0.1, torch.randn(VOCABULARY, 3, generator=generator)
    exit = Exit(1, norm, 2, VOCABULARY, (), None if chosen is None else torch.tensor(chosen), down, up)
    hidden = states(5, 9, FIRST, 200, weights=weights)
    whole = EarlyExitHead(norm, head + up @ down, 1e-5)
    expected = (whole if chosen is None else whole.quantize(torch.tensor(chosen)))(hidden).token
    first, second = drafted(shards(weights, "exit", exit), hidden, monkeypatch)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert not torch.equal(expected, drafted(shards(weights, "full"), hidden, monkeypatch)[0])


def test_a_state_that_is_not_finite_drafts_some_token(weights, monkeypatch):
    hidden = torch.full((3, WIDTH), torch.nan)
    for tokens in drafted(shards(weights, "full"), hidden, monkeypatch):
        assert ((tokens >= 0) & (tokens < VOCABULARY)).all()


def test_a_quantised_head_is_vllms_to_read(weights):
    from layerskip.vllm.head import make_head

    target = SimpleNamespace(lm_head=SimpleNamespace(quant_method=object()))
    with pytest.raises(NotImplementedError, match=r"the head is quantised \(object\).*\"draft_head\": \"vllm\""):
        make_head(target, None, "full", None)
    assert make_head(target, None, "vllm", None) is None
