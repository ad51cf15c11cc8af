"""`speculative_round`: draft, verify, accept as one call; the composition of its ops, lossless, and exact."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels.schemas import REQUIRED_WEIGHTS, bind
from layerskip_kernels.speculative import compose_round

from .common import (
    DTYPES,
    PATHS,
    Inputs,
    assert_same_bits,
    assert_same_result,
    assert_threads_agree,
    chi_square_p,
    rope_tables,
    run,
    running_on,
)
from .examples import EPS, SIZES, example

IN_PLACE = ("k_cache", "v_cache", "seq_lens")


def composed(args: dict[str, Any]) -> tuple[Tensor, ...]:
    """The same by the ops it is made of, with every row verified; ``args`` are written."""
    layers = [args[name] for name in ("k_cache", "v_cache", "cos", "sin", "seq_lens")]
    head, depth, first = (args["norm_weight"], args["head_weight"], EPS), SIZES["L"], 9 * args["exit_layer"]
    deep, draft_layers = args["weights"][first : 9 * depth], args["weights"][9 * depth :]
    draft_norm_weight = args.get("draft_norm_weight")
    slots, temperature, limit = args.get("slots"), args.get("temperature"), args.get("draft_threshold", 0.0)
    draws = () if temperature is None else (temperature, args["seed"])
    batch, num_speculations, device = len(args["token"]), args["num_speculations"], args["token"].device
    draft_vocab_size = len(args["draft_head_weight"])
    draft_logits = torch.empty(batch, num_speculations, draft_vocab_size, device=device) if draws else None
    drafted = run(
        "draft", args["token"], args["embedding"], args["weights"][:first] + draft_layers, *layers, args["exit_layer"],
        head[0] if draft_norm_weight is None else draft_norm_weight, args["draft_head_weight"], EPS, num_speculations,
        True, args["draft_token_map"], args["draft_head_scale"], slots, limit, *(draws or (None, None)), draft_logits,
        args.get("num_draft_layers", 0),
    )  # fmt: skip
    hidden = run("partial_forward", drafted.states, deep, *layers, args["exit_layer"], depth, EPS, slots)
    logits = torch.empty(batch, num_speculations + 1, SIZES["V"], device=device)
    target = lk.exit_head(hidden.flatten(0, 1), *head, logits=logits.view(-1, SIZES["V"])).token.view(logits.shape[:2])
    if draws:
        accepted = lk.accept_sampled(
            drafted.tokens, draft_logits.nan_to_num(0), logits, args["seq_lens"], *draws, args["draft_token_map"]
        )
    else:
        accepted = lk.accept_greedy(drafted.tokens, target, args["seq_lens"])
    return drafted.tokens, *accepted, drafted.probability


def with_nan(args: dict[str, Any]) -> dict[str, Any]:
    """NaN in the cache beyond the lengths."""
    for name in ("k_cache", "v_cache"):
        for b, length in enumerate(args["seq_lens"].tolist()):
            args[name][:, args["slots"][b] if "slots" in args else b, :, length:] = float("nan")
    return args


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("draft_threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_it_is_the_composition_of_the_ops(path: str, dtype: torch.dtype, draft_threshold: float, options: bool) -> None:
    args, other = (with_nan(example("speculative_round", dtype, options)) for _ in range(2))
    for one in (args, other):
        one["draft_threshold"] = draft_threshold
        if draft_threshold and options:  # only a greedy draft may end before a token
            one.update(temperature=None, seed=None)
    with running_on(path):
        out, expected = tuple(run("speculative_round", **args)), composed(other)
    assert_same_bits(out, expected)
    assert_same_bits(args["seq_lens"], other["seq_lens"])
    for b, length in enumerate(args["seq_lens"].tolist()):
        row = int(args["slots"][b]) if options else b
        for name in ("k_cache", "v_cache"):  # what lies beyond is void
            assert_same_result(path, args[name][:, row, :, :length], other[name][:, row, :, :length])


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_native_op_is_the_composite_in_python(isa: str, dtype: torch.dtype, options: bool) -> None:
    """`compose_round` over the native ops: the same results, and the same bits in everything that is written."""
    args, other = (example("speculative_round", dtype, options) for _ in range(2))
    names = ("draft", "partial_forward", "exit_head", "accept_greedy", "accept_sampled")
    ops = {op: getattr(torch.ops.layerskip_native, op) for op in names}
    out, expected = run("speculative_round", *args.values()), compose_round(ops, *other.values())
    assert_same_bits(tuple(out), expected)
    assert_same_bits([args[name] for name in IN_PLACE], [other[name] for name in IN_PLACE])


@pytest.mark.parametrize("change", [{"num_speculations": 0}, {"exit_layer": SIZES["L"]}])
def test_edges(path: str, change: dict[str, int]) -> None:
    """No drafts at all is one step of the whole model; an exit after the last layer leaves no deep ones."""
    args, other = ({**with_nan(example("speculative_round")), **change} for _ in range(2))
    assert_same_bits(tuple(run("speculative_round", **args)), composed(other))


@pytest.mark.parametrize("full_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_give_the_tokens_of_autoregressive_decoding(isa: str, dtype: torch.dtype, full_head: bool) -> None:
    """Greedy, to the bit, whatever the draft head."""
    args = with_nan(example("speculative_round", dtype))
    args.update(num_speculations=2)
    if full_head:
        args.update(draft_head_weight=None, draft_token_map=None, draft_head_scale=None)
    plain = with_nan(example("speculative_round", dtype))
    layers = [plain[name] for name in ("weights", "k_cache", "v_cache", "cos", "sin", "seq_lens")]
    head = plain["norm_weight"], plain["head_weight"], EPS
    expected = run("draft", plain["token"], plain["embedding"], *layers, SIZES["L"], *head, 5, False).tokens
    texts: list[list[int]] = [[], []]
    while min(map(len, texts)) < 4:
        out = run("speculative_round", **args)
        for b, text in enumerate(texts):
            text += [*out.tokens[b, : out.accepted[b]].tolist(), int(out.next_token[b])]
        args["token"] = out.next_token
    for b, text in enumerate(texts):
        assert text[:4] == expected[b, : len(text[:4])].tolist()


def starts(tokens: list[int]) -> dict[str, Any]:
    """A sequence for each token, without a past; the deep layer adds nothing, so that every draft is accepted."""
    args, batch = example("speculative_round"), len(tokens)
    args.update(draft_head_weight=None, draft_token_map=None, draft_head_scale=None)
    args.update(token=torch.tensor(tokens), seq_lens=torch.zeros(batch, dtype=torch.int64))
    for name in ("k_cache", "v_cache"):
        args[name] = torch.zeros(SIZES["L"], batch, *args[name].shape[2:])
    each = len(args["weights"]) // SIZES["L"]
    for place, name in enumerate(REQUIRED_WEIGHTS, each):
        if name in ("o", "down"):
            args["weights"][place] = torch.zeros_like(args["weights"][place])
    return args


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_longest_draft_sets_the_rows_to_verify(path: str, order: tuple[int, ...]) -> None:
    """A threshold leaves three sequences four drafts, some and none, in every order; each is accepted whole."""
    free = run("speculative_round", **starts(list(range(SIZES["V"]))))
    assert (free.accepted == SIZES["K"]).all()
    threshold = float(free.probability[:, 0].median()) - 1e-4
    counts = (free.probability >= threshold).long().cumprod(1).sum(1)
    chosen = [int((counts == count).nonzero()[0]) for count in (SIZES["K"], int(counts[counts > 0].min()), 0)]
    chosen = [chosen[place] for place in order]
    out = run("speculative_round", **starts(chosen), draft_threshold=threshold)
    assert len({*counts[chosen].tolist()}) == 3
    assert out.accepted.tolist() == counts[chosen].tolist()
    following = torch.cat([free.tokens, free.next_token[:, None]], 1)  # [V, K + 1]
    assert out.next_token.tolist() == following[chosen, counts[chosen]].tolist()


def test_unsupported_heads() -> None:
    a = bind("speculative_round", **example("speculative_round"))
    cache = lk.KVCache(a.k_cache, a.v_cache, a.cos, a.sin, a.seq_lens)
    decoder = (a.token, a.embedding, a.weights, cache, a.exit_layer)
    reduced = lk.Head(a.norm_weight, a.draft_head_weight, a.draft_token_map, a.draft_head_scale)
    with pytest.raises(ValueError, match="head has a token_map or a scale: what verifies must be the full head"):
        lk.speculative_round(*decoder, reduced, 2, eps=EPS)


def test_sequences_are_independent(isa: str) -> None:
    make = lambda: with_nan(example("speculative_round", torch.bfloat16, True))  # noqa: E731
    assert_threads_agree(lambda: tuple(run("speculative_round", **make())))
    together = tuple(run("speculative_round", **make()))
    for b in range(SIZES["B"]):
        own = make()
        for name in ("token", "seq_lens", "slots", "temperature", "seed"):
            own[name] = own[name][b : b + 1].clone()
        assert_same_bits(tuple(run("speculative_round", **own)), tuple(one[b : b + 1] for one in together))


def test_a_model_that_is_not_finite_says_so(path: str) -> None:
    args = example("speculative_round")
    args["norm_weight"] = torch.full_like(args["norm_weight"], float("nan"))
    out = run("speculative_round", **args)
    assert (out.tokens[:, 0] == -1).all()
    assert out.accepted.tolist() == [0, 0]
    assert out.next_token.tolist() == [-1, -1]


def tiny_model(batch: int) -> dict[str, Any]:
    """Two layers and eleven tokens, the draft's head knows seven of them; many sequences of one token."""
    make, size, vocab_size = Inputs(torch.float32, seed=2), 8, 11
    shapes = [(8,), (8, 8), (8, 8), (8, 8), (8, 8), (8,), (12, 8), (12, 8), (8, 12)]
    weights = [make.norm(8) if len(shape) == 1 else make.weight(*shape) for _ in range(2) for shape in shapes]
    cos, sin = rope_tables(6, size)
    return {
        "token": torch.full((batch,), 3), "embedding": make.normal(vocab_size, 8), "weights": weights,
        "k_cache": torch.zeros(2, batch, 1, 6, size), "v_cache": torch.zeros(2, batch, 1, 6, size), "cos": cos,
        "sin": sin, "seq_lens": torch.zeros(batch, dtype=torch.int64), "exit_layer": 1, "norm_weight": make.norm(8),
        "head_weight": make.weight(vocab_size, 8), "eps": EPS, "num_speculations": 2,
    }  # fmt: skip


def true_probabilities(model: dict[str, Any], tokens: list[int], temperature: float) -> Tensor:
    """What the whole model gives after ``tokens``, in float64."""
    hidden = model["embedding"][torch.tensor([tokens])]
    caches = [torch.zeros(2, 1, 1, 6, 8) for _ in range(2)]
    start = torch.zeros(1, dtype=torch.int64)
    hidden = run("partial_forward", hidden, model["weights"], *caches, model["cos"], model["sin"], start, 0, 2, EPS)
    logits = torch.empty(1, 11)
    lk.exit_head(hidden[:, -1], model["norm_weight"], model["head_weight"], EPS, logits=logits)
    return (logits[0].double() / temperature).softmax(0)


@pytest.mark.parametrize("head", ["full", "subset", "behind a draft layer"])
@pytest.mark.parametrize("path", ["reference", "avx2"])
def test_sampled_rounds_have_the_distribution_of_the_whole_model(path: str, head: str) -> None:
    """The first token, and the second given the first, over many seeds."""
    batch, temperature = 60_000, 0.9
    model = tiny_model(batch)
    draws = {"temperature": torch.full((batch,), temperature), "seed": torch.arange(batch)}
    if head == "subset":
        draft_token_map = torch.tensor([9, 0, 4, 5, 7, 1, 2])
        draws.update(draft_head_weight=model["head_weight"][draft_token_map], draft_token_map=draft_token_map)
    if head == "behind a draft layer":  # the second layer, more or less: some drafts hold
        layer = [weight * 0.7 for weight in model["weights"][9:]]
        draws.update(
            weights=model["weights"] + layer, num_draft_layers=1, draft_norm_weight=model["norm_weight"].flip(0)
        )
        draws.update({name: torch.zeros(3, *model[name].shape[1:]) for name in ("k_cache", "v_cache")})
    with running_on(path):
        out = run("speculative_round", **{**model, **draws})
        first = torch.where(out.accepted > 0, out.tokens[:, 0], out.next_token)
        assert chi_square_p(first, true_probabilities(model, [3], temperature)) > 1e-4
        assert 0.1 < float((out.accepted > 0).float().mean()) < 0.95
        second = torch.where(out.accepted > 1, out.tokens[:, 1], out.next_token)
        reached = out.accepted > 0
        common = int(torch.bincount(first[reached & (first != 3)]).argmax())  # two threes give what one gives
        chosen = reached & (first == common)
        assert chi_square_p(second[chosen], true_probabilities(model, [3, common], temperature)) > 1e-4
        assert chi_square_p(second[chosen], true_probabilities(model, [3], temperature)) < 1e-6
