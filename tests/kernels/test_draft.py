"""`draft`: the loop of embedding, partial_forward and exit_head, bit for bit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels.speculative import compose_draft

from .common import DTYPES, PATHS, Inputs, assert_same_bits, assert_threads_agree, run, running_on
from .examples import EPS, SIZES, example


def args_of(dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    """The example, with NaN in the cache beyond the lengths."""
    args = example("draft", dtype)
    for name in ("k_cache", "v_cache"):
        for b, length in enumerate(args["seq_lens"].tolist()):
            args[name][:, b, :, length:] = float("nan")
    return {**args, **changes}


def composed(args: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the other ops, one step at a time; the caches of ``args`` are written."""
    token, tokens, states, logits, sums = args["token"], [], [], [], []
    temperature, seed, written = (args.get(name) for name in ("temperature", "seed", "logits"))
    depth, layers, split = args["exit_layer"], len(args["k_cache"]), 9 * args["exit_layer"]

    def forward(hidden: Tensor, weights: list[Tensor], row: int, start: int, end: int) -> Tensor:
        places = (args["k_cache"], args["v_cache"], args["cos"], args["sin"], args["seq_lens"] + row)
        return run("partial_forward", hidden, weights, *places, start, end, EPS, args.get("slots"))

    for row in range(args["num_speculations"] + args["extend"]):
        hidden = forward(args["embedding"][token.clamp_min(0)][:, None], args["weights"][:split], row, 0, depth)
        states.append(hidden[:, 0])
        hidden = forward(hidden, args["weights"][split:], row, layers - args.get("num_draft_layers", 0), layers)
        if row < args["num_speculations"]:
            head = (args["norm_weight"], args["head_weight"], EPS, args["token_map"], args["scale"])
            draws = (None, None, None) if temperature is None else (temperature, seed, args["seq_lens"] + row)
            out = None if written is None else written[:, row]
            token, logit, logsumexp = lk.exit_head(hidden[:, 0], *head, *draws, out)
            for found, kept in ((token, tokens), (logit, logits), (logsumexp, sums)):
                kept.append(found)
    probability = (torch.stack(logits, 1) - torch.stack(sums, 1)).exp()
    return torch.stack(tokens, 1), torch.stack(states, 1), probability


def assert_same_draft(actual: Any, expected: Any) -> None:
    """Tokens and states to the bit; probabilities up to the last bits of exp."""
    assert_same_bits(tuple(actual[:2]), tuple(expected[:2]))
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("extend", [True, False])
@pytest.mark.parametrize("num_speculations", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_it_is_the_composition_of_the_ops(path: str, dtype: torch.dtype, num_speculations: int, extend: bool) -> None:
    args, other = (args_of(dtype, num_speculations=num_speculations, extend=extend) for _ in range(2))
    with running_on(path):
        drafted = run("draft", *args.values())
        expected = composed(other)
    assert_same_draft(drafted, expected)
    assert_same_bits((args["k_cache"], args["v_cache"]), (other["k_cache"], other["v_cache"]))
    assert torch.equal(args["seq_lens"], example("draft")["seq_lens"]), "lengths are not advanced"


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_native_op_is_the_composite_in_python(isa: str, dtype: torch.dtype, options: bool) -> None:
    """`compose_draft` over the native ops, with a threshold that ends some drafts where ``options`` are."""
    args, other = (example("draft", dtype, options) for _ in range(2))
    ops = {op: getattr(torch.ops.layerskip_native, op) for op in ("partial_forward", "exit_head")}
    drafted, expected = run("draft", *args.values()), compose_draft(ops, *other.values())
    assert_same_draft(drafted, expected)
    written = ("k_cache", "v_cache", *(("logits",) if options else ()))
    assert_same_bits([args[name] for name in written], [other[name] for name in written])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_slots_samples_and_logits(path: str, dtype: torch.dtype) -> None:
    """One sequence is drawn, one is greedy; the row of the cache between their slots is not touched."""
    args, other = ({**example("draft", dtype, True), "draft_threshold": 0.0} for _ in range(2))
    args["logits"] = torch.full((SIZES["B"], 2 * SIZES["K"], SIZES["V"]), float("nan"))[:, ::2]
    with running_on(path):
        assert_same_draft(run("draft", *args.values()), composed(other))
    assert_same_bits([args[name] for name in ("k_cache", "v_cache", "logits")],
                     [other[name] for name in ("k_cache", "v_cache", "logits")])  # fmt: skip


@pytest.mark.parametrize("extend", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_drafting_stops_below_the_probability(path: str, extend: bool) -> None:
    """Thresholds between all probabilities that occur: of each sequence, all from the first below it are missing."""
    with running_on(path):
        full = run("draft", *args_of(torch.bfloat16, extend=extend).values())
        levels = [0.0, *full.probability.flatten().sort().values.tolist(), 1.0]
        lengths = set()
        for low, high in pairwise(levels):
            limit = (low + high) / 2
            tokens, states, probability = run("draft", **args_of(torch.bfloat16, extend=extend, draft_threshold=limit))
            for b in range(SIZES["B"]):
                below = (full.probability[b] < limit).nonzero().flatten().tolist()
                count = below[0] if below else SIZES["K"]
                lengths.add(count)
                assert_same_bits(tokens[b, :count], full.tokens[b, :count])
                assert (tokens[b, count:] == -1).all()
                assert_same_bits(probability[b, : count + 1], full.probability[b, : count + 1])
                assert (probability[b, count + 1 :] == 0).all()
                assert_same_bits(states[b, : count + 1], full.states[b, : count + 1])
                assert (states[b, count + 1 :] == 0).all()
    assert len(lengths) > 2, "the case tests nothing"


@pytest.mark.parametrize("path", PATHS)
def test_a_probability_that_is_the_threshold_is_enough(path: str) -> None:
    """The least of all probabilities as the threshold ends nothing, the next larger number ends that draft there."""
    with running_on(path):
        full = run("draft", *args_of(torch.float32).values())
        least = full.probability.min()
        equal = run("draft", **args_of(torch.float32, draft_threshold=float(least)))
        assert_same_bits(tuple(equal), tuple(full))
        above = float(torch.nextafter(least, torch.tensor(1.0)))
        ended = run("draft", **args_of(torch.float32, draft_threshold=above)).tokens < 0
    b, row = divmod(int(full.probability.argmin()), SIZES["K"])
    assert ended[b].tolist() == [False] * row + [True] * (SIZES["K"] - row)
    assert not ended[1 - b].any()


@pytest.mark.parametrize("path", PATHS)
def test_a_certain_token_is_drafted_at_a_threshold_of_1(path: str) -> None:
    """A head of one token gives it the probability exp(0)."""
    head = {"head_weight": Inputs(torch.float32).normal(1, SIZES["D"]), "token_map": torch.tensor([5]), "scale": None}
    with running_on(path):
        out = run("draft", **args_of(torch.float32, draft_threshold=1.0, **head))
    assert out.tokens.tolist() == [[5] * SIZES["K"]] * SIZES["B"]
    assert out.probability.tolist() == [[1.0] * SIZES["K"]] * SIZES["B"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_full_head_drafts_too(dtype: torch.dtype) -> None:
    head = Inputs(dtype, seed=1).normal(SIZES["V"], SIZES["D"])
    args, other = (args_of(dtype, head_weight=head, token_map=None, scale=None) for _ in range(2))
    with running_on("portable"):
        assert_same_draft(run("draft", *args.values()), composed(other))


@pytest.mark.parametrize("path", PATHS[1:])
def test_sequences_are_independent(path: str) -> None:
    """A sequence of a batch has the bits that it has alone, for any number of threads."""
    whole = args_of(torch.bfloat16)
    with running_on(path):
        assert_threads_agree(lambda: tuple(run("draft", *args_of(torch.bfloat16).values())))
        together = run("draft", *whole.values())
        for b in range(SIZES["B"]):
            own = args_of(torch.bfloat16)
            caches = {name: own[name][:, b : b + 1].contiguous() for name in ("k_cache", "v_cache")}
            alone = {**own, **caches, "token": own["token"][b : b + 1], "seq_lens": own["seq_lens"][b : b + 1]}
            assert_same_bits(tuple(run("draft", *alone.values())), tuple(one[b : b + 1] for one in together))


@pytest.mark.parametrize("path", ["reference", "portable"])
def test_a_head_without_finite_logits_names_no_token(path: str) -> None:
    args = args_of(torch.float32)
    args["norm_weight"] = torch.full_like(args["norm_weight"], float("nan"))
    with running_on(path):
        tokens, states, probability = run("draft", *args.values())
    assert (tokens == -1).all()
    assert probability.isnan().all()
    assert states.isfinite().all()


@pytest.mark.parametrize("path", ["reference", "portable"])
def test_a_sequence_ends_at_a_head_without_finite_logits(path: str) -> None:
    """With a threshold: -1 and NaN, and then nothing; the state of the row that failed is there."""
    args = args_of(torch.float32, draft_threshold=0.1)
    args["norm_weight"] = torch.full_like(args["norm_weight"], float("nan"))
    with running_on(path):
        tokens, states, probability = run("draft", **args)
    assert (tokens == -1).all()
    assert probability[:, 0].isnan().all()
    assert (probability[:, 1:] == 0).all()
    assert (states[:, 0] != 0).any()
    assert (states[:, 1:] == 0).all()


@pytest.mark.parametrize("path", ["reference", "portable"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_speculations": -1}, "num_speculations must not be negative, got -1"),
        ({"exit_layer": 0}, "got 0"),
        ({"num_speculations": 12}, "capacity|outside the cache"),
        ({"token": torch.tensor([0, 37])}, "37"),
        ({"token": torch.tensor([0, -1])}, "-1"),
        ({"draft_threshold": 1.5}, r"draft_threshold must lie in \[0, 1\], got 1.5"),
        (
            {"temperature": torch.tensor([1.0, -1.0]), "seed": torch.tensor([0, 0])},
            r"temperature\[1\] is -1, expected a finite number of at least 0|temperature\[1\] is -1.0, expected",
        ),
    ],
)
def test_bad_arguments(path: str, change: dict[str, Any], message: str) -> None:
    with running_on(path), pytest.raises((ValueError, IndexError), match=message):
        run("draft", **args_of(torch.float32, **change))
