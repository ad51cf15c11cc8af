"""`accept_sampled`: whatever the drafts' distribution, what comes out has the target's, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels import _noise

from .common import PATHS, Inputs, assert_same_bits, assert_threads_agree, chi_square_p, running_on, strided

NAMES = ("draft", "draft_logits", "target_logits", "seq_lens", "temperature", "seed", "token_map")


def drawn_from(logits: Tensor, temperature: Tensor, seed: Tensor, seq_lens: Tensor, tokens: Tensor) -> Tensor:
    """Drafts [B, K] as `draft` draws them from its logits."""
    offset = seq_lens[:, None, None] + torch.arange(logits.shape[1])[:, None]
    noise = _noise.gumbel(seed[:, None, None], offset, tokens, _noise.DRAW)
    divisor = torch.where(temperature > 0, temperature, 1.0)[:, None, None]
    noise = torch.where(temperature[:, None, None] > 0, noise, torch.zeros(()))
    return tokens[(logits / divisor + noise).argmax(-1)]


def inputs(batch: int, drafted: int, vocab_size: int, scored: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Drafts that are sometimes right; every fifth sequence is greedy, every seventh drafts less than it could."""
    make = Inputs(torch.float32, seed=seed)
    token_map = None
    if scored is not None:
        token_map = torch.randperm(vocab_size, generator=make.generator)[:scored]
    tokens = torch.arange(vocab_size) if token_map is None else token_map
    draft_logits = make.normal(batch, drafted, tokens.numel(), scale=2.0)
    target_logits = make.normal(batch, drafted + 1, vocab_size)
    target_logits[:, :drafted, tokens] += draft_logits
    temperature = 0.3 + 1.5 * torch.rand(batch, generator=make.generator)
    temperature[::5] = 0
    seeds, seq_lens = make.integers(-(2**62), 2**62, batch), make.integers(0, 2**34, batch)
    draft = drawn_from(draft_logits, temperature, seeds, seq_lens, tokens)
    draft[::7, 2:] = -1
    return dict(zip(NAMES, (draft, draft_logits, target_logits, seq_lens, temperature, seeds, token_map), strict=True))


def accept(args: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """accepted, next_token, and the advanced lengths; ``args`` stay."""
    seq_lens = args["seq_lens"].clone()
    return *lk.accept_sampled(*{**args, "seq_lens": seq_lens}.values()), seq_lens


def by_hand(args: dict[str, Any], b: int) -> tuple[int, int]:
    """One sequence in float64, token by token, as the paper has it."""
    draft, q_logits, p_logits, lengths, temperatures, seeds, token_map = (args[name] for name in NAMES)
    vocab_size, temperature = p_logits.shape[2], float(temperatures[b])
    tokens = torch.arange(vocab_size) if token_map is None else token_map
    for i in range(draft.shape[1] + 1):
        token = int(draft[b, i]) if i < draft.shape[1] else -1
        if temperature == 0:
            best = int(p_logits[b, i].argmax())
            if token == best:
                continue
            return i, best
        p = (p_logits[b, i].double() / temperature).softmax(0)
        at = lengths[b : b + 1] + i
        rest = p
        if token >= 0:
            q = torch.zeros(vocab_size, dtype=torch.float64)
            q[tokens] = (q_logits[b, i].double() / temperature).softmax(0)
            u = float(_noise.uniform(seeds[b : b + 1], at, torch.zeros_like(at), _noise.ACCEPT))
            if u < float(p[token] / q[token]):
                continue
            rest = (p - q).clamp_min(0)
        noise = _noise.gumbel(seeds[b : b + 1], at, torch.arange(vocab_size), _noise.RESIDUAL)
        return i, int((rest.log() + noise.double()).argmax())
    raise AssertionError("the last row always gives a token")


@pytest.mark.parametrize(
    ("drafted", "vocab_size", "scored"), [(5, 97, None), (5, 97, 41), (1, 1003, 300), (3, 17, 17), (0, 13, None)]
)
@pytest.mark.parametrize("path", PATHS)
def test_by_hand(path: str, drafted: int, vocab_size: int, scored: int | None) -> None:
    args = inputs(70, drafted, vocab_size, scored, seed=drafted)
    with running_on(path):
        accepted, next_token, seq_lens = accept(args)
    expected = [by_hand(args, b) for b in range(70)]
    assert list(zip(accepted.tolist(), next_token.tolist(), strict=True)) == expected
    assert torch.equal(seq_lens, args["seq_lens"] + accepted + 1)
    if drafted > 1:
        assert len(set(accepted.tolist())) > 2, "the case tests nothing"


def test_large_vocabularies_agree_with_the_reference(isa: str) -> None:
    args = inputs(6, 3, 40_001, 5003, seed=3)
    ours = accept(args)
    with running_on("reference"):
        assert_same_bits(ours, accept(args))
    assert_threads_agree(lambda: accept(args))


def test_a_sequence_does_not_depend_on_the_batch(isa: str) -> None:
    args = inputs(30, 4, 513, 97)
    together = accept(args)
    for b in range(30):
        own = {name: arg[b : b + 1] if name != "token_map" else arg for name, arg in args.items()}
        assert_same_bits(accept(own), [one[b : b + 1] for one in together])


def test_strides(path: str) -> None:
    args = inputs(9, 4, 41)
    expected = accept(args)
    assert_same_bits(accept({**args, "draft": args["draft"].T.contiguous().T}), expected)
    for name in ("draft_logits", "target_logits"):
        for other in strided(args[name]):
            assert_same_bits(accept({**args, name: other}), expected)
    padded = torch.full((9, 6, 41), float("nan"))
    padded[:, :4] = args["draft_logits"]
    assert_same_bits(accept({**args, "draft_logits": padded[:, :4]}), expected)


def test_zero_temperature_is_accept_greedy(path: str) -> None:
    args = inputs(50, 4, 23)
    args["temperature"].zero_()
    args["draft"] = torch.where(args["draft"] % 2 == 0, args["target_logits"].argmax(-1)[:, :4], args["draft"])
    seq_lens = args["seq_lens"].clone()
    expected = lk.accept_greedy(args["draft"], args["target_logits"].argmax(-1), seq_lens)
    assert_same_bits(accept(args), (*expected, seq_lens))
    assert len(set(expected.accepted.tolist())) > 2


def test_zero_temperature_separates_close_logits(path: str) -> None:
    """One spacing of fp32 at 1.0 decides, although it vanishes in logits - logsumexp."""
    target = torch.full((1, 1, 4000), 1.0)
    target[0, 0, 3210] = 1 + 2.0**-23
    none = torch.zeros(1, 0, dtype=torch.int64)
    args = (none, torch.zeros(1, 0, 4000), target, torch.tensor([5]), torch.zeros(1), torch.tensor([0]), None)
    assert lk.accept_sampled(*args).next_token.tolist() == [3210]


MANY = 100_000
TEMPERATURE = 0.8


def many(scored: int | None, drafted: int = 2) -> tuple[dict[str, Any], Tensor]:
    """The same logits for seeds 0, 1, 2 …; and p of each of the rows. q is flat where p is not, and has a mask."""
    make = Inputs(torch.float32, seed=11)
    vocab_size = 7
    token_map = None if scored is None else torch.tensor([4, 1, 6, 0, 3])[:scored]
    tokens = torch.arange(vocab_size) if token_map is None else token_map
    draft_logits = make.normal(drafted, tokens.numel())
    target_logits = make.normal(drafted + 1, vocab_size, scale=1.2)
    target_logits[0, 1], draft_logits[1, 0] = float("-inf"), float("-inf")
    temperature, seed = torch.full((MANY,), TEMPERATURE), torch.arange(MANY)
    seq_lens = torch.full((MANY,), 5)
    q_logits = draft_logits.expand(MANY, *draft_logits.shape)
    draft = drawn_from(q_logits, temperature, seed, seq_lens, tokens)
    values = (draft, q_logits, target_logits.expand(MANY, -1, -1), seq_lens, temperature, seed, token_map)
    return dict(zip(NAMES, values, strict=True)), (target_logits.double() / TEMPERATURE).softmax(-1)


def emitted(args: dict[str, Any], accepted: Tensor, next_token: Tensor, row: int) -> Tensor:
    """The tokens that sequences emit at a row, where they get there."""
    reached = accepted >= row
    drafts = torch.cat([args["draft"], args["draft"].new_full((MANY, 1), -1)], 1)[:, row]
    return torch.where(accepted > row, drafts, next_token)[reached]


@pytest.mark.parametrize("scored", [None, 5])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_emitted_has_the_distribution_of_the_target(path: str, scored: int | None) -> None:
    """Chi-square at every row, over the sequences that get there."""
    args, p = many(scored)
    with running_on(path):
        accepted, next_token, _ = accept(args)
    shares = [float((accepted == count).float().mean()) for count in range(3)]
    assert min(shares) > 0.03, "the case tests nothing"
    for row in range(3):
        assert chi_square_p(emitted(args, accepted, next_token, row), p[row]) > 1e-4
    undrafted = {**args, "draft": args["draft"].clone().index_fill_(1, torch.tensor([1]), -1)}
    with running_on(path):
        accepted, next_token, _ = accept(undrafted)
    assert int(accepted.max()) == 1
    assert chi_square_p(emitted(undrafted, accepted, next_token, 1), p[1]) > 1e-4


def test_acceptance_rate(path: str) -> None:
    """The share of accepted first drafts is Σ min(p, q), within five standard deviations."""
    args, p = many(None)
    q = (args["draft_logits"][0, 0].double() / TEMPERATURE).softmax(0)
    truth = float(torch.minimum(p[0], q).sum())
    share = float((accept(args)[0] > 0).double().mean())
    assert abs(share - truth) < 5 * (truth * (1 - truth) / MANY) ** 0.5


@pytest.mark.parametrize("wrong", ["accepts always", "does not subtract q", "re-uses the draft's noise"])
def test_wrong_rules_are_detected(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check above is worth: rules that are nearly right fail it."""
    args, p = many(None)
    if wrong == "re-uses the draft's noise":
        monkeypatch.setattr(_noise, "ACCEPT", _noise.DRAW)
        monkeypatch.setattr(_noise, "RESIDUAL", _noise.DRAW)
    with running_on("reference"):
        accepted, next_token, _ = accept(args)
    if wrong == "does not subtract q":
        noise = _noise.gumbel(args["seed"][:, None], args["seq_lens"][:, None], torch.arange(7), _noise.RESIDUAL)
        next_token = (p[0].log() + noise).argmax(-1)
    found = args["draft"][:, 0] if wrong == "accepts always" else emitted(args, accepted, next_token, 0)
    assert chi_square_p(found, p[0]) < 1e-6


def test_equal_distributions_accept_everything(path: str) -> None:
    args = inputs(200, 3, 31)
    args["temperature"].clamp_min_(0.3)
    args["draft"] = args["draft"].clamp_min(0)
    args["target_logits"][:, :3] = args["draft_logits"]
    assert accept(args)[0].tolist() == [3] * 200


def test_disjoint_distributions_accept_nothing(path: str) -> None:
    """p is 0 wherever q is not: every first draft is rejected, and the next token is one of p's."""
    args = inputs(200, 3, 32)
    args["temperature"].clamp_min_(0.3)
    args["draft_logits"][:, :, 16:] = float("-inf")
    args["target_logits"][:, :, :16] = float("-inf")
    args["draft"] = args["draft"] % 16
    accepted, next_token, _ = accept(args)
    assert accepted.tolist() == [0] * 200
    assert bool((next_token >= 16).all())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite(path: str, wrong: float, temperature: float) -> None:
    """The first such row ends the sequence there, with -1; rows that are never read may hold anything."""
    args = inputs(4, 3, 32)
    args["temperature"].fill_(temperature)
    args["target_logits"][:, :3] = 20 * args["draft_logits"]
    args["draft"] = args["draft_logits"].argmax(-1)
    if wrong == float("-inf"):
        args["target_logits"][0, 1] = wrong
    args["target_logits"][0, 1, 3] = wrong  # one -inf of many is only a mask
    args["draft"][1, 1:] = -1
    args["draft_logits"][1, 1:], args["target_logits"][1, 2:] = wrong, wrong
    args["draft_logits"][2, 1] = wrong
    if temperature == 0:
        args["draft_logits"][2, 1] = 0
    accepted, next_token, seq_lens = accept(args)
    assert accepted[0] == 1
    assert next_token[0] == -1
    assert accepted[1] == 1
    assert next_token[1] >= 0
    if temperature:
        assert (accepted[2], next_token[2]) == (1, -1)
    assert (accepted[3], next_token[3] >= 0) == (3, True)
    assert torch.equal(seq_lens, args["seq_lens"] + accepted + 1)


def test_tokens_that_cannot_have_been_drafted(path: str) -> None:
    args = inputs(5, 2, 32, 7)
    args["temperature"].fill_(1.0)
    foreign = next(token for token in range(32) if token not in args["token_map"].tolist())
    for change, message in (
        ({"draft": torch.full_like(args["draft"], 32)}, "draft holds 32, the vocabulary of target_logits has 32"),
        ({"token_map": args["token_map"] + 32}, r"token_map holds \d+, the vocabulary of target_logits has 32"),
        ({"token_map": args["token_map"] - 32}, r"token_map holds -\d+, the vocabulary of target_logits has 32"),
        ({"draft": torch.full_like(args["draft"], foreign)}, f"draft.* is {foreign}, which is not in token_map"),
        ({"temperature": -args["temperature"]}, r"temperature\[0\] is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            accept({**args, **change})
