"""draft and speculative_round on CUDA: the compositions that the reference says, and lossless to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layerskip_kernels import reference
from layerskip_kernels.schemas import bind
from layerskip_kernels.speculative import compose_draft, compose_round

from ..common import TOLERANCES, Inputs, assert_same_bits, double
from ..examples import SIZES, example, with_draft_layers, with_packed_draft_layers
from .runners import Emulated, Ops

DTYPES = (torch.float32, torch.bfloat16)


def args_of(op: str, dtype: torch.dtype = torch.float32, options: bool = False, **changes: Any) -> dict[str, Any]:
    """The example, with NaN in the cache beyond the lengths."""
    args = example(op, dtype, options)
    slots = args["slots"].tolist() if options else range(SIZES["B"])
    for name in ("k_cache", "v_cache"):
        for slot, length in zip(slots, args["seq_lens"].tolist(), strict=True):
            args[name][:, slot, :, length:] = float("nan")
    return {**args, **changes}


def copied(args: dict[str, Any]) -> dict[str, Any]:
    return {name: arg.clone() if isinstance(arg, Tensor) else arg for name, arg in args.items()}


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Sums in another order; in bf16 any of the dozen roundings on the way may fall on the neighbour, 2^-8 relative."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-5}[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def as_good(actual: Tensor, expected: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """The mean square error against float64, as test_partial_forward takes it: of numbers that are not of size 1."""
    found, allowed = (float((one.double() - truth).square().mean().sqrt()) for one in (actual, expected))
    assert found <= 1.1 * allowed + TOLERANCES[dtype] * float(truth.abs().max()), f"{found:.3e} against {allowed:.3e}"


def parts(ops: Ops) -> dict[str, Callable[..., Any]]:
    """What a draft and a round are made of."""
    names = ("draft", "partial_forward", "exit_head", "accept_greedy", "accept_sampled")
    return {name: getattr(ops, name) for name in names}


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draft_is_the_composition_of_the_ops(ops: Ops, dtype: torch.dtype, options: bool) -> None:
    args = args_of("draft", dtype, options)
    theirs = copied(args)
    out, expected = ops.draft(*args.values()), compose_draft(parts(ops), *theirs.values())
    assert_same_bits(tuple(out[:2]), expected[:2])
    torch.testing.assert_close(out.probability, expected[2], rtol=1e-6, atol=0)  # exp's last bits
    if options:
        stopped = int((expected[0] < 0).any(1).all())
        assert_same_bits(args["logits"][expected[0] >= 0], theirs["logits"][expected[0] >= 0])
        assert not stopped  # one of the two drafts to the end
    else:
        assert_same_bits((args["k_cache"], args["v_cache"]), (theirs["k_cache"], theirs["v_cache"]))


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize(("num_draft_layers", "packed"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draft_with_draft_layers(
    ops: Ops, dtype: torch.dtype, num_draft_layers: int, packed: bool, extend: bool
) -> None:
    """The composition, also in what is written; a layer of the cache lies between those of the draft."""
    args = with_draft_layers(args_of("draft", dtype, extend=extend), num_draft_layers)
    args = with_packed_draft_layers(args) if packed else args
    theirs, before, exit_layer = copied(args), copied(args), args["exit_layer"]
    out, expected = ops.draft(*bind("draft", **args)), compose_draft(parts(ops), *bind("draft", **theirs))
    assert_same_bits(tuple(out[:2]), expected[:2])
    torch.testing.assert_close(out.probability, expected[2], rtol=1e-6, atol=0)  # exp's last bits
    for name in ("k_cache", "v_cache"):
        assert_same_bits(args[name], theirs[name])
        assert_same_bits(args[name][exit_layer], before[name][exit_layer])
        assert not torch.equal(args[name][-num_draft_layers], before[name][-num_draft_layers])
    true = reference.draft_ref(*bind("draft", **before))
    assert out.tokens.tolist() == true[0].tolist()
    close(out.states, true[1], dtype)
    close(out.probability, true[2], dtype)


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_is_the_composition_of_the_ops(ops: Ops, dtype: torch.dtype, options: bool) -> None:
    args = args_of("speculative_round", dtype, options)
    theirs = copied(args)
    out = ops.speculative_round(*args.values())
    expected = compose_round(parts(ops), *theirs.values())
    assert_same_bits(tuple(out), tuple(expected))
    assert_same_bits(args["seq_lens"], theirs["seq_lens"])


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize(("num_speculations", "extend"), [(4, True), (1, False), (0, True), (0, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draft_matches_the_reference(
    ops: Ops, dtype: torch.dtype, num_speculations: int, extend: bool, options: bool
) -> None:
    """With slots, sampling, logits and a threshold that stops a sequence, and without; the head is int8."""
    args = args_of("draft", dtype, options, num_speculations=num_speculations, extend=extend)
    if options:
        args.update(draft_threshold=0.03, logits=torch.zeros(SIZES["B"], num_speculations, SIZES["V"]))
    theirs, truth = copied(args), {name: double(arg) for name, arg in args.items()}
    out, expected = ops.draft(*args.values()), reference.draft_ref(*theirs.values())
    assert out.tokens.tolist() == expected[0].tolist()
    close(out.states, expected[1], dtype)
    close(out.probability, expected[2], dtype)
    if not options:  # past a stop the cache is void
        close(args["k_cache"], theirs["k_cache"], dtype)
        close(args["v_cache"], theirs["v_cache"], dtype)
    else:
        alive = expected[0] >= 0
        assert reference.draft_ref(*truth.values())[0].tolist() == expected[0].tolist()
        if alive.any():
            as_good(*(one["logits"][alive] for one in (args, theirs, truth)), dtype)
    assert args["seq_lens"].tolist() == theirs["seq_lens"].tolist(), "lengths are not advanced"


def test_a_threshold_stops_each_sequence_on_its_own(ops: Ops) -> None:
    """The token that falls short and all later ones are -1, and so are the states after it 0."""
    whole = ops.draft(*args_of("draft").values())
    first, second = sorted(whole.probability[:, 0].tolist())
    out = ops.draft(*args_of("draft", slots=None, draft_threshold=(first + second) / 2).values())
    stopped = int(whole.probability[:, 0].argmin())
    assert out.tokens[stopped].tolist() == [-1] * SIZES["K"]
    assert out.probability[stopped].tolist() == [whole.probability[stopped, 0].item()] + [0.0] * (SIZES["K"] - 1)
    assert_same_bits(out.states[stopped, 0], whole.states[stopped, 0])
    assert not out.states[stopped, 1:].any()
    assert out.tokens[1 - stopped, 0] == whole.tokens[1 - stopped, 0]
    assert out.states[1 - stopped, 1].any()


def test_a_probability_that_is_the_threshold_is_enough(ops: Ops) -> None:
    """And the next larger number is not."""
    whole = ops.draft(*args_of("draft").values())
    least = whole.probability.min()
    equal = ops.draft(*args_of("draft", slots=None, draft_threshold=float(least)).values())
    assert_same_bits(tuple(equal), tuple(whole))
    above = float(torch.nextafter(least, torch.tensor(1.0)))
    tokens = ops.draft(*args_of("draft", slots=None, draft_threshold=above).values()).tokens
    assert (tokens.flatten()[whole.probability.argmin()]) == -1


def test_a_head_without_finite_logits_names_no_token(ops: Ops) -> None:
    """And the draft continues from row 0 of the embedding, without reading outside it."""
    args = args_of("draft")
    args["norm_weight"] = torch.full_like(args["norm_weight"], float("nan"))
    out = ops.draft(*args.values())
    assert (out.tokens == -1).all()
    assert out.probability.isnan().all()
    assert out.states.isfinite().all()


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_matches_the_reference(ops: Ops, dtype: torch.dtype, options: bool) -> None:
    """Greedy, and with slots, a temperature (0 for one sequence) and a threshold; the draft's head is int8."""
    args = args_of("speculative_round", dtype, options)
    theirs = copied(args)
    out, expected = ops.speculative_round(*args.values()), reference.speculative_round_ref(*theirs.values())
    for name, one, other in zip(out._fields[:3], out, expected, strict=False):
        assert one.tolist() == other.tolist(), name
    close(out.probability, expected[3], dtype)
    assert args["seq_lens"].tolist() == theirs["seq_lens"].tolist()


def agreeing(dtype: torch.dtype) -> dict[str, Any]:
    """A round whose deep layer changes little, so that some drafts hold and some do not."""
    args = args_of("speculative_round", dtype)
    args.update(draft_head_weight=None, draft_token_map=None, draft_head_scale=None, num_speculations=3)
    args["head_weight"] = args["embedding"] = Inputs(dtype, seed=4).normal(SIZES["V"], SIZES["D"])
    each = len(args["weights"]) // SIZES["L"]
    args["weights"] = [w * 0.5 if i == each + 4 or i == each + 8 else w for i, w in enumerate(args["weights"])]
    return args


def decode(ops: Ops, args: dict[str, Any], num_speculations: int, wanted: int) -> tuple[list[list[int]], list[int]]:
    """Each sequence's first ``wanted`` tokens, and what its rounds accepted."""
    emitted: list[list[int]] = [[] for _ in range(SIZES["B"])]
    accepts = []
    while min(len(tokens) for tokens in emitted) < wanted:
        out = ops.speculative_round(*bind("speculative_round", **{**args, "num_speculations": num_speculations}))
        for b, tokens in enumerate(emitted):
            tokens += [*out.tokens[b, : out.accepted[b]].tolist(), int(out.next_token[b])]
        accepts += out.accepted.tolist()
        args["token"] = out.next_token
    return [tokens[:wanted] for tokens in emitted], accepts


@pytest.mark.parametrize("num_draft_layers", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_drafts_are_lossless_to_the_bit(ops: Ops, dtype: torch.dtype, num_draft_layers: int) -> None:
    """Without drafts and with three a round: the same tokens, and the same bits in the cache of all layers."""
    alone, drafted = agreeing(dtype), agreeing(dtype)
    if num_draft_layers:
        drafted = with_draft_layers(drafted, num_draft_layers)
        drafted["weights"] = [w * 0.3 if i in (22, 26) else w for i, w in enumerate(drafted["weights"])]  # o and down
    wanted = 4
    first, _ = decode(ops, alone, 0, wanted)
    second, accepts = decode(ops, drafted, 3, wanted)
    assert first == second
    assert any(accepts)
    for b, start in enumerate(example("speculative_round")["seq_lens"].tolist()):
        for name in ("k_cache", "v_cache"):
            written = slice(start, start + wanted)
            assert_same_bits(alone[name][:, b, :, written], drafted[name][: SIZES["L"], b, :, written])


def test_schedules_and_architectures_agree(emulated: type[Emulated]) -> None:
    expected = emulated().speculative_round(*args_of("speculative_round", torch.bfloat16, True).values())
    for seed, arch in ((1, 90), (2, 80)):
        out = emulated(seed, arch).speculative_round(*args_of("speculative_round", torch.bfloat16, True).values())
        assert_same_bits(tuple(out), tuple(expected), f"with seed {seed} on sm_{arch}")


def test_a_batch_equals_its_sequences(ops: Ops) -> None:
    """A sequence of a batch drafts the bits that it drafts alone."""
    together = ops.draft(*args_of("draft", torch.bfloat16).values())
    for b in range(SIZES["B"]):
        own = args_of("draft", torch.bfloat16)
        caches = {name: own[name][:, b : b + 1].contiguous() for name in ("k_cache", "v_cache")}
        alone = {**own, **caches, "token": own["token"][b : b + 1], "seq_lens": own["seq_lens"][b : b + 1]}
        assert_same_bits(tuple(ops.draft(*alone.values())), tuple(one[b : b + 1] for one in together))
